"""Content into a .vmz in one pass."""

from collections import deque
from threading import local

from ..io.descriptors import memory, write_all, write_pieces
from ..io.output import WriteBack
from . import zstd
from .file_format import (
    AHEAD,
    END,
    FRAME,
    FRAME_HEAD,
    GROUP,
    HEAD,
    MEMORY,
    OTHER_BYTES,
    REC_GROUPS,
    REC_TOTALS,
    RECORD_HEAD,
    TABLE,
    TABLE_ENTRY,
    FileTally,
    digest,
)
from .workers import Pool, processors


class Writer:
    """Content to a .vmz at a descriptor: `write` all of it, then `finish`.

    What is written without `finish` is damaged to whoever reads it.  `written` counts the bytes at the descriptor.
    """

    def __init__(self, fd: int, level: int, threads: int = 0, *, other: bool = False) -> None:
        self._fd = fd
        self._write_back = WriteBack(fd)
        self._level = level
        _, context = zstd.packer(level, FRAME)
        threads = max(1, min(processors(threads), MEMORY // (2 * GROUP + context)))
        self._pool = Pool(threads, threads + AHEAD)
        self._own = local()
        # One is being filled, the others are in the pool.
        self._free = [memory(GROUP) for _ in range(threads + AHEAD + 1)]
        self._busy: deque[memoryview] = deque()
        self._buffer = self._free.pop()
        self._filled = 0
        self.tally = FileTally(FRAME, OTHER_BYTES if other else 0)

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
        write_pieces(self._fd, [FRAME_HEAD.pack(zstd.SKIPPABLE + TABLE, len(table)), table, *frames])
        self._write_back.begin()
        self.tally.group(table, frames)

    def _pack(self, content: memoryview) -> tuple[bytes, list[bytes]]:
        if not hasattr(self._own, "pack"):
            self._own.pack, _ = zstd.packer(self._level, FRAME)
        frames = [self._own.pack(content[at : at + FRAME]) for at in range(0, len(content), FRAME)]
        entries = b"".join(TABLE_ENTRY.pack(len(frame), digest(frame)) for frame in frames)
        head = len(content).to_bytes(4, "little")
        return digest(head + entries).to_bytes(8, "little") + head + entries, frames


def pack(data: bytes) -> bytes:
    """The content of a record, as one frame."""
    return zstd.packer(3, max(1, len(data)))[0](memoryview(data))
