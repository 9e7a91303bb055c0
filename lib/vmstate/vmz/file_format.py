"""The file format .vmz (docs/vmz.md), written and read as a stream: a zstd file that proves its end.

Content goes in groups of frames; a table before each group has the size and a checksum of every frame, so that a
group can be read at once, and its frames packed and unpacked by all processors.  The end record comes only behind a
content that was whole.
"""

import os
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from threading import local

from ..errors import Damaged
from ..io.descriptors import Reader, exactly, fill, memory, read_up_to, write_all
from . import zstd

VERSION = 1
# Measured on guests' RAM: with less the file grows, with more a page takes longer than half a millisecond.
FRAME = 192 << 10
GROUP = 21 * FRAME
# What a reader takes of others
LEAST_FRAME, MOST_FRAME = 64 << 10, 1 << 20
MOST_GROUP = 4 << 20
MOST_FRAMES = MOST_GROUP // LEAST_FRAME
END_LIMIT = INDEX_LIMIT = 1 << 30
# Frames of bytes that cannot be packed are a little larger than those are.
MOST_PACKED = MOST_GROUP + MOST_GROUP // 32
# A thread has a group and its frames; all together they stay below what a filter may use.
MEMORY = 128 << 20
# Groups that are done, or wait, while all threads work
AHEAD = 2

# Numbers of skippable frames; SEEK is that of zstd's seekable format.
HEAD, TABLE, END, SEEK = 6, 7, 8, 14
FRAME_HEAD = struct.Struct("<II")  # magic, size
HEAD_FORM = struct.Struct("<3sBII")  # "VMZ", version, content of a frame, flags
TABLE_HEAD = struct.Struct("<QI")  # digest of what follows, content of the group
TABLE_ENTRY = struct.Struct("<IQ")  # packed size, digest of the packed bytes
TABLE_LIMIT = TABLE_HEAD.size + MOST_FRAMES * TABLE_ENTRY.size
RECORD_HEAD = struct.Struct("<HHI")  # kind, 0, size
TOTALS = struct.Struct("<QQIQ")  # content, packed bytes before the end record, groups, digest of all before it
SEEK_ENTRY = struct.Struct("<III")  # packed size, content, low half of the content's XXH64
SEEK_END = struct.Struct("<IBI")  # frames, descriptor, magic
SEEK_MAGIC, SEEK_CHECKSUMS = 0x8F92EAB1, 0x80
NO_CONTENT = 0x51D8E999  # of XXH64 of nothing

OTHER_BYTES = 1  # flag: not judged as a state
# Kinds of records; who does not know a mandatory one refuses the file.
MANDATORY = 0x8000
REC_TOTALS = 1 | MANDATORY
REC_GROUPS, REC_STATE, REC_BLOCK = 2, 3, 4
KNOWN = (REC_TOTALS,)


@dataclass
class Tally:
    """What a file is made of, as far as it has been written or read; enough to write or to check its last two frames.

    contents, packed, digests: of each group its content, its bytes with its table, the digest in its table.
    """

    size: int = FRAME
    flags: int = 0
    offset: int = 0
    content: int = 0
    contents: "array[int]" = field(default_factory=lambda: array("I"))
    packed: "array[int]" = field(default_factory=lambda: array("I"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    seek: "array[int]" = field(default_factory=lambda: array("I"))

    def passed(self, packed: int, content: int = 0, checksum: int = NO_CONTENT) -> None:
        """A frame, of whatever kind, has been written or read."""
        self.offset += packed
        self.seek.extend((packed, content, checksum))

    def group(self, table: bytes, frames: Sequence[bytes | memoryview]) -> None:
        """A group has been written or read; `table` is what is in its table."""
        digest_, content = TABLE_HEAD.unpack_from(table)
        before = self.offset
        self.passed(FRAME_HEAD.size + len(table))
        for number, frame in enumerate(frames):
            size = min(self.size, content - number * self.size)
            self.passed(len(frame), size, int.from_bytes(frame[-4:], "little"))
        self.content += content
        self.contents.append(content)
        self.packed.append(self.offset - before)
        self.digests.append(digest_)

    def head(self) -> bytes:
        """What is in the first frame."""
        return HEAD_FORM.pack(b"VMZ", VERSION, self.size, self.flags)

    def totals(self) -> bytes:
        proof = digest(self.head() + packed(self.digests))
        return TOTALS.pack(self.content, self.offset, len(self.digests), proof)

    def seek_table(self) -> bytes:
        """The last frame, all of it; to be asked for once the end record has `passed`."""
        count = len(self.seek) // 3
        end = SEEK_END.pack(count, SEEK_CHECKSUMS, SEEK_MAGIC)
        return zstd.skippable(SEEK, packed(self.seek) + end)

    def groups(self) -> bytes:
        return b"".join(map(packed, (self.contents, self.packed, self.digests)))


def packed(column: "array[int]") -> bytes:
    """Little-endian, whatever this machine's order."""
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        column = array(column.typecode, column)
        column.byteswap()
    return column.tobytes()


def numbers(data: bytes, code: str = "I") -> "array[int]":
    """What `packed` made bytes of."""
    column = array(code, data)
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        column.byteswap()
    return column


class _Pool:
    """Work for all processors, whose results come in the order in which it was given."""

    def __init__(self, threads: int, ahead: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._ahead = ahead
        self._waiting: deque[Future[tuple[bytes, list[bytes]]]] = deque()

    def give(self, work: Callable[..., tuple[bytes, list[bytes]]], *arguments: object) -> None:
        self._waiting.append(self._pool.submit(work, *arguments))

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._ahead

    def ready(self) -> bool:
        return bool(self._waiting) and self._waiting[0].done()

    def next(self) -> tuple[bytes, list[bytes]]:
        """The oldest result, once it is there; raises what the work raised."""
        return self._waiting.popleft().result()

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def processors(threads: int = 0) -> int:
    return threads or len(os.sched_getaffinity(0))


class Writer:
    """Content to a .vmz at a descriptor: `write` all of it, then `finish`.

    What is written without `finish` is damaged to whoever reads it.  `written` counts the bytes at the descriptor.
    """

    def __init__(self, fd: int, level: int, threads: int = 0, *, other: bool = False) -> None:
        self._fd = fd
        self._level = level
        _, context = zstd.packer(level, FRAME)
        threads = max(1, min(processors(threads), MEMORY // (2 * GROUP + context)))
        self._pool = _Pool(threads, threads + AHEAD)
        self._own = local()
        # One is being filled, the others are in the pool.
        self._free = [memory(GROUP) for _ in range(threads + AHEAD + 1)]
        self._busy: deque[memoryview] = deque()
        self._buffer = self._free.pop()
        self._filled = 0
        self.tally = Tally(FRAME, OTHER_BYTES if other else 0)

    @property
    def written(self) -> int:
        return self.tally.offset

    def write(self, view: memoryview) -> None:
        while view:
            count = min(len(view), GROUP - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == GROUP:
                self._give()

    def flush(self) -> None:
        """All that has come so far goes to the descriptor."""
        if self._filled:
            self._give()
        while self._pool:
            self._settle()

    def finish(self, records: list[tuple[int, bytes]]) -> None:
        """The end record with `records`, kind and content of each, and the seek table."""
        self.flush()
        self._begin()
        tally = self.tally
        records = [(REC_TOTALS, tally.totals()), (REC_GROUPS, pack(tally.groups())), *records]
        body = b"".join(RECORD_HEAD.pack(kind, 0, len(data)) + data for kind, data in records)
        end = zstd.skippable(END, digest(body).to_bytes(8, "little") + body)
        write_all(self._fd, end)
        tally.passed(len(end))
        seek = tally.seek_table()
        write_all(self._fd, seek)
        tally.offset += len(seek)

    def close(self) -> None:
        self._pool.close()

    def _give(self) -> None:
        self._pool.give(self._pack, self._buffer[: self._filled])
        self._busy.append(self._buffer)
        while self._pool.full or self._pool.ready():
            self._settle()
        self._buffer, self._filled = self._free.pop(), 0

    def _begin(self) -> None:
        """Nothing comes out where nothing came in."""
        if not self.tally.offset:
            head = zstd.skippable(HEAD, self.tally.head())
            write_all(self._fd, head)
            self.tally.passed(len(head))

    def _settle(self) -> None:
        table, frames = self._pool.next()
        self._begin()
        self._free.append(self._busy.popleft())
        write_all(self._fd, FRAME_HEAD.pack(zstd.SKIPPABLE + TABLE, len(table)) + table)
        for frame in frames:
            write_all(self._fd, frame)
        self.tally.group(table, frames)

    def _pack(self, content: memoryview) -> tuple[bytes, list[bytes]]:
        if not hasattr(self._own, "pack"):
            self._own.pack, _ = zstd.packer(self._level, FRAME)
        frames = [self._own.pack(content[at : at + FRAME]) for at in range(0, len(content), FRAME)]
        entries = b"".join(TABLE_ENTRY.pack(len(frame), digest(frame)) for frame in frames)
        head = len(content).to_bytes(4, "little")
        return digest(head + entries).to_bytes(8, "little") + head + entries, frames


def digest(data: bytes | memoryview) -> int:
    """XXH3, 64 bits: against accidents, not against somebody who wants to deceive."""
    from xxhash import xxh3_64_intdigest

    return xxh3_64_intdigest(data)


def pack(data: bytes) -> bytes:
    """The content of a record, as one frame."""
    return zstd.packer(3, max(1, len(data)))[0](memoryview(data))


def unpack(data: bytes, limit: int, offset: int) -> bytes:
    """The content of a record's frame; Damaged where it would be more than `limit` bytes."""
    size = zstd.content_size(data)
    if not 0 <= size <= limit:
        raise Damaged(f"record at offset {offset}: expected a frame of at most {limit} bytes, found {size}")
    return zstd.unpacker()(data, size, offset)


@dataclass(frozen=True)
class Table:
    """What stands before a group: sizes and digests of its packed frames, and how much they hold."""

    raw: bytes
    content: int
    sizes: tuple[int, ...]
    digests: tuple[int, ...]

    @property
    def digest(self) -> int:
        """Its own."""
        return int.from_bytes(self.raw[:8], "little")


def parse_head(content: bytes) -> Tally:
    """What the first frame says."""
    if len(content) != HEAD_FORM.size:
        raise Damaged(f"head of a .vmz: expected {HEAD_FORM.size} bytes, found {len(content)}")
    magic, version, size, flags = HEAD_FORM.unpack(content)
    if magic != b"VMZ":
        raise Damaged(f"head of a .vmz: expected 'VMZ', found {magic!r}")
    if version != VERSION or flags & ~OTHER_BYTES:
        hint = "a newer vm-compress can read it; zstd -d gives the content, but proves nothing"
        raise Damaged(f"a .vmz of another version: expected {VERSION}, found {version}, flags {flags:#x}", hint)
    if not LEAST_FRAME <= size <= MOST_FRAME:
        raise Damaged(f"head of a .vmz: frames of {size} bytes")
    return Tally(size, flags)


def is_state(first: bytes) -> bool:
    """Whether a .vmz with these first bytes says that it holds a state."""
    return not parse_head(first[FRAME_HEAD.size : FRAME_HEAD.size + HEAD_FORM.size]).flags & OTHER_BYTES


def parse_table(raw: bytes, size: int, offset: int) -> Table:
    """A table at `offset`; Damaged unless it is whole and of frames of `size` bytes."""
    count, odd = divmod(len(raw) - TABLE_HEAD.size, TABLE_ENTRY.size)
    if odd or not 1 <= count <= MOST_FRAMES or digest(raw[8:]) != int.from_bytes(raw[:8], "little"):
        raise Damaged(f"corrupt table of frames at offset {offset}")
    content = int.from_bytes(raw[8:12], "little")
    sizes, digests = zip(*TABLE_ENTRY.iter_unpack(raw[TABLE_HEAD.size :]), strict=True)
    sensible = content <= MOST_GROUP and -(-content // size) == count
    sensible = sensible and sum(sizes) <= MOST_PACKED
    if not sensible or not all(8 <= packed <= size + size // 64 for packed in sizes):
        raise Damaged(f"table of frames at offset {offset} makes no sense: {count} frames for {content} bytes")
    return Table(raw, content, sizes, digests)


def parse_end(content: bytes, offset: int) -> dict[int, list[bytes]]:
    """The records of an end record at `offset`, by kind."""
    if len(content) < 8 or digest(content[8:]) != int.from_bytes(content[:8], "little"):
        raise Damaged(f"corrupt end record at offset {offset}")
    records: dict[int, list[bytes]] = {}
    at = 8
    while at < len(content):
        if at + RECORD_HEAD.size > len(content):
            raise Damaged(f"end record at offset {offset}: cut in a record")
        kind, _, size = RECORD_HEAD.unpack_from(content, at)
        at += RECORD_HEAD.size
        if at + size > len(content):
            raise Damaged(f"end record at offset {offset}: cut in a record")
        if kind & MANDATORY and kind not in KNOWN:
            hint = "a newer vm-compress can read it; zstd -d gives the content, but proves nothing"
            raise Damaged(f"end record at offset {offset}: unknown mandatory record {kind:#x}", hint)
        records.setdefault(kind, []).append(content[at : at + size])
        at += size
    if len(records.get(REC_TOTALS, ())) != 1:
        raise Damaged(f"end record at offset {offset}: no totals")
    return records


def check_frame(frame: bytes | memoryview, expected: int, offset: int) -> None:
    if digest(frame) != expected:
        raise Damaged(f"corrupt frame at offset {offset}: its digest is not that of the table before it")


class Unvmz:
    """The content of a .vmz, whose first frame stands at `offset` of the input; a `Reader`, 0 only at the proven end.

    `pieces` gives the same without a copy.  records: those of the end record, once that has been read.
    """

    def __init__(self, source: Reader, offset: int = 0, threads: int = 0) -> None:
        self._source = source
        self._base = offset
        threads = max(1, min(processors(threads), MEMORY // (2 * GROUP)))
        self._pool = _Pool(threads, threads + AHEAD)
        self._own = local()
        # Packed groups: one is being read, the others are in the pool.
        self._free = [memory(MOST_PACKED) for _ in range(threads + AHEAD + 1)]
        self._busy: deque[memoryview] = deque()
        self.tally = Tally()
        self.records: dict[int, list[bytes]] | None = None
        self._end_size = 0
        self._pieces = self.pieces()
        self._piece = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        count = min(len(view), len(self._piece))
        view[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    def pieces(self) -> Iterator[bytes]:
        """The content, a frame at a time; ends only where the file is whole."""
        try:
            self._read_head()
            while self._read_group():
                while self._pool.full or self._pool.ready():
                    yield from self._settle()
            while self._pool:
                yield from self._settle()
            self._read_end()
        finally:
            self._pool.close()

    @property
    def _at(self) -> int:
        return self._base + self.tally.offset

    def _bytes(self, count: int, behind: int, what: str) -> bytes:
        return exactly(self._source, count, self._at + behind, what)

    def _read_head(self) -> None:
        what = "the head"
        magic, size = FRAME_HEAD.unpack(self._bytes(FRAME_HEAD.size, 0, what))
        if magic != zstd.SKIPPABLE + HEAD or size != HEAD_FORM.size:
            raise Damaged(f"no .vmz at offset {self._at}: found a frame {magic:#x} of {size} bytes")
        self.tally = parse_head(self._bytes(size, FRAME_HEAD.size, what))
        self.tally.passed(FRAME_HEAD.size + size)

    def _read_group(self) -> bool:
        """Give the next group to a thread; False where the end record stands in its place."""
        offset = self._at
        start = read_up_to(self._source, FRAME_HEAD.size)
        if len(start) < FRAME_HEAD.size:
            where = "in the head of a frame" if start else "before the end record"
            raise Damaged(f"truncated at offset {offset + len(start)}, {where}")
        magic, size = FRAME_HEAD.unpack(start)
        if magic == zstd.SKIPPABLE + END:
            self._end_size = size
            return False
        if magic != zstd.SKIPPABLE + TABLE:
            raise Damaged(f"no table of frames at offset {offset}: found a frame {magic:#x}")
        if size > TABLE_LIMIT:
            raise Damaged(f"table of frames at offset {offset}: found {size} bytes")
        raw = self._bytes(size, len(start), "a table of frames")
        table = parse_table(raw, self.tally.size, offset)
        at = len(start) + size
        buffer = self._free.pop()
        self._busy.append(buffer)
        have = fill(self._source, buffer[: sum(table.sizes)])
        if have < sum(table.sizes):
            raise Damaged(f"truncated at offset {offset + at + have}, in a group of frames")
        ends = list(accumulate(table.sizes))
        frames = [buffer[end - packed : end] for packed, end in zip(table.sizes, ends, strict=True)]
        self.tally.group(raw, frames)
        self._pool.give(self._unpack, table, frames, offset + at)
        return True

    def _settle(self) -> list[bytes]:
        content = self._pool.next()[1]
        self._free.append(self._busy.popleft())
        return content

    def _unpack(self, table: Table, frames: list[memoryview], offset: int) -> tuple[bytes, list[bytes]]:
        if not hasattr(self._own, "unpack"):
            self._own.unpack = zstd.unpacker()
        found, size = [], self.tally.size
        for number, (frame, expected) in enumerate(zip(frames, table.digests, strict=True)):
            check_frame(frame, expected, offset)
            found.append(self._own.unpack(frame, min(size, table.content - number * size), offset))
            offset += len(frame)
        return b"", found

    def _read_end(self) -> None:
        if self._end_size > END_LIMIT:
            raise Damaged(f"end record at offset {self._at}: found {self._end_size} bytes")
        content = self._bytes(self._end_size, FRAME_HEAD.size, "the end record")
        records = parse_end(content, self._at)
        check_totals(records, self.tally, self._at)
        self.tally.passed(FRAME_HEAD.size + len(content))
        seek = self.tally.seek_table()
        if (found := self._bytes(len(seek), 0, "the seek table")) != seek:
            at = next(n for n, (one, other) in enumerate(zip(found, seek, strict=True)) if one != other)
            raise Damaged(f"corrupt seek table at offset {self._at}: it is not that of the frames, from byte {at} on")
        self.tally.offset += len(seek)
        if behind := read_up_to(self._source, 4):
            raise Damaged(f"junk behind the seek table, at offset {self._at}: expected the end, found {behind!r}")
        self.records = records


def check_totals(records: dict[int, list[bytes]], tally: Tally, offset: int) -> None:
    if records[REC_TOTALS][0] != tally.totals():
        raise Damaged(f"end record at offset {offset} is not of the frames before it")
    if (packed := records.get(REC_GROUPS)) and unpack(packed[0], INDEX_LIMIT, offset) != tally.groups():
        raise Damaged(f"end record at offset {offset}: its table of groups is not of the frames before it")
