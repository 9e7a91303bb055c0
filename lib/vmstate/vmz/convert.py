"""The jobs of `vm-compress`: a state, judged on its way, into a .vmz; a .vmz or a zstd file back; what a file says."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import CannotDo, Damaged
from ..io.descriptors import HOLD, write_all
from ..io.readers import Pushback, Reader, blocks, read_up_to
from ..stream.validate import validate
from . import file_format, reader
from .decompress import FIRST, hints_for, recognise, words_for
from .page_index import PageIndexBuilder, parse
from .vmz_file import vmz_file
from .writer import Writer
from .zstd import Unzstd

ANY = "with --any other bytes than those of a state are taken, and proven less"


def compress(source: Reader, fd: int, level: int, threads: int = 0, *, other: bool = False) -> int:
    """A whole state as a .vmz; other: any bytes, without an index.  The number of bytes written.

    Damaged where the input is no whole state (other: where it is empty); what has been written then has no end record.
    """
    writer = Writer(fd, level, threads, other=other)
    try:
        writer.finish(_all(source, writer) if other else _state(source, writer))
        return writer.written
    except Damaged as error:
        writer.flush()
        if writer.tally.content == 0 and not other:
            error.hints = (*error.hints, ANY)
        raise
    finally:
        writer.close()


def _all(source: Reader, writer: Writer) -> list[tuple[int, bytes]]:
    came = 0
    for block in blocks(source):
        came += len(block)
        writer.write(block)
    if not came:
        raise Damaged("the input is empty")
    return []


def _state(source: Reader, writer: Writer) -> list[tuple[int, bytes]]:
    builder = PageIndexBuilder()
    state = validate(source, writer.write, builder.see)
    return builder.records(state)


def decompress(source: Reader, fd: int | None, threads: int = 0, *, other: bool = False) -> int:
    """The content of a .vmz or of a zstd file to `fd` (None: nowhere); the number of bytes.

    Damaged where the file is not proven whole, or its content is no whole state; other: it may be any bytes.
    """
    first = read_up_to(source, FIRST)
    kind = recognise(first)
    if not first:
        raise Damaged("the input is empty")
    # Of less than a magic `Unzstd` says what it could have become.
    if kind not in ("vmz", "zstd") and len(first) >= 4:
        found = words_for(first)
        raise Damaged(f"no zstd file: found {found} at offset 0", *hints_for(first))
    whole, written = Pushback(first, source), _Written(fd)
    if kind != "vmz":
        content: Reader = Unzstd(whole)
    else:
        content = unvmz = reader.Unvmz(whole, threads=threads)
        if other or file_format.is_state(first):
            for piece in _held(_whole(unvmz)):
                written(piece)
            return written.count
    if other:
        for block in blocks(content):
            written(block)
    else:
        try:
            validate(content, written)
        except Damaged as error:
            if written.count == 0:
                error.hints = (*error.hints, ANY)
            raise
    return written.count


class _Written:
    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self.count = 0

    def __call__(self, data: bytes | memoryview) -> None:
        if self._fd is not None:
            write_all(self._fd, data)
        self.count += len(data)


def _held(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same; but the last ones, `HOLD` bytes at least, only when the end has been proven."""
    held: deque[bytes] = deque()
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        while size - len(held[0]) >= HOLD:
            size -= len(held[0])
            yield held.popleft()
    yield from held


def _whole(unvmz: reader.Unvmz) -> Iterator[bytes]:
    """The content, with its index proven before the end is reached."""
    yield from unvmz.pieces()
    assert unvmz.records is not None
    parse(unvmz.tally, unvmz.records)


def listing(source: Reader, fd: int) -> dict[str, Any]:
    """What a .vmz is made of, by name; from its end record alone where the file can seek, else by reading all of it."""
    file = vmz_file(fd)
    if file:
        tally, records, size = file.tally, file.records, file.size
    else:
        first = read_up_to(source, FIRST)
        if not first:
            raise Damaged("the input is empty")
        if recognise(first) != "vmz":
            raise CannotDo(f"no .vmz: found {words_for(first)}", "zstd -l tells of zstd files")
        unvmz = reader.Unvmz(Pushback(first, source))
        for _ in unvmz.pieces():
            pass
        assert unvmz.records is not None
        tally, records = unvmz.tally, unvmz.records
        size = tally.offset
    index = sum(len(data) for kind in (file_format.REC_STATE, file_format.REC_BLOCK) for data in records.get(kind, ()))
    facts, indexed = parse(tally, records)
    found, facts = indexed.values(), facts or {}
    return {
        "machine": facts.get("machine"),
        "runstate": facts.get("runstate"),
        "content": tally.content,
        "packed": size,
        "ratio": round(tally.content / size, 3),
        "frames": sum(-(-content // tally.size) for content in tally.contents),
        "groups": len(tally.digests),
        "frame_content": tally.size,
        "index": index if facts else None,
        "ram": sum(block.block.size for block in found) if facts else None,
        "runs": sum(len(block.starts) for block in found) if facts else None,
    }
