"""The content of a .vmz in one pass, each frame checked, up to the proven end."""

from collections import deque
from collections.abc import Iterator
from itertools import accumulate
from threading import local

from ..errors import Damaged
from ..io.descriptors import memory
from ..io.readers import Reader, exactly, fill, read_up_to
from . import zstd
from .file_format import (
    AHEAD,
    END,
    END_LIMIT,
    FRAME_HEAD,
    GROUP,
    HEAD,
    HEAD_FORM,
    MEMORY,
    MOST_PACKED,
    TABLE,
    TABLE_LIMIT,
    FileTally,
    Table,
    check_frame,
    check_totals,
    parse_end,
    parse_head,
    parse_table,
)
from .workers import Pool, processors


class Unvmz:
    """The content of a .vmz, whose first frame stands at `offset` of the input; a `Reader`, 0 only at the proven end.

    `pieces` gives the same without a copy.  records: those of the end record, once that has been read.
    """

    def __init__(self, source: Reader, offset: int = 0, threads: int = 0) -> None:
        self._source = source
        self._base = offset
        threads = max(1, min(processors(threads), MEMORY // (2 * GROUP)))
        self._pool = Pool(threads, threads + AHEAD)
        self._own = local()
        # Packed groups: one is being read, the others are in the pool.
        self._free = [memory(MOST_PACKED) for _ in range(threads + AHEAD + 1)]
        self._busy: deque[memoryview] = deque()
        self.tally = FileTally()
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
