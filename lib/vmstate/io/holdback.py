"""Hold back the newest bytes between two descriptors, until it is known that those before them are good.

`take(fd)` takes some of what has come, `drain(fd, keep)` lets all go but the newest `keep` bytes; `left` counts those
that went.  In pipes they wait without being copied; where no pipes are to be had, in memory.
"""

import contextlib
import errno
import fcntl
import os
import select
from collections import deque

from .descriptors import BLOCK, EVEN, F_SETPIPE_SZ, SPLICE_F_NONBLOCK, memory, splice, wait, write_all
from .readers import FdReader


class Ring:
    """In one fixed piece of memory, with room for `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.came = 0
        self.left = 0
        self._view = memory(size)

    def take(self, fd: int) -> int:
        """The number of bytes that came, 0 at the end; BlockingIOError where there is no room."""
        space = self._space()
        if not space:
            raise BlockingIOError
        count = FdReader(fd).readinto(space)
        self.came += count
        return count

    def drain(self, fd: int, keep: int = 0) -> None:
        while ready := self._oldest(keep):
            write_all(fd, ready)
            self.left += len(ready)

    def close(self) -> None:
        """There is nothing to give back."""

    def _space(self) -> memoryview:
        """Where the next bytes go: one piece of at most a block."""
        at = self.came % self.size
        free = self.size - (self.came - self.left)
        return self._view[at : at + min(free, self.size - at, -at % EVEN or BLOCK)]

    def _oldest(self, keep: int) -> memoryview:
        """The bytes next to leave, in one piece."""
        at = self.left % self.size
        ready = max(0, self.came - self.left - keep)
        return self._view[at : at + min(ready, self.size - at)]


class _Pipe:
    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.bytes = 0


class Pipes:
    """In a row of pipes, which fill up one after the other; OSError where there cannot be enough of them.

    They leave by whole pipes, so that up to one pipe more than asked for is kept, and none where all are to go.
    """

    def __init__(self, size: int) -> None:
        self.came = 0
        self.left = 0
        self._buffer: memoryview | None = None
        self._row: deque[_Pipe] = deque()
        self._free: list[_Pipe] = []
        try:
            for _ in range(-(-size // BLOCK) + 1):
                self._free.append(_Pipe())
                fcntl.fcntl(self._free[-1].writing, F_SETPIPE_SZ, BLOCK)
        except OSError:
            self.close()
            raise
        self._row.append(self._free.pop())

    def take(self, fd: int) -> int:
        """The number of bytes that came, 0 at the end.  Raises OSError where another pipe is needed and not had."""
        wait(fd, select.POLLIN)
        while True:
            newest = self._row[-1]
            try:
                count = os.splice(fd, newest.writing, BLOCK, flags=SPLICE_F_NONBLOCK)
            except BlockingIOError:
                # A pipe has room for so many pieces, of whatever size.
                self._row.append(self._free.pop() if self._free else _Pipe())
                continue
            newest.bytes += count
            self.came += count
            return count

    def drain(self, fd: int, keep: int = 0) -> None:
        while self._row and self.came - self.left - self._row[0].bytes >= keep:
            oldest = self._row[0]
            while oldest.bytes:
                count = self._move(oldest, fd)
                oldest.bytes -= count
                self.left += count
            self._free.append(self._row.popleft())
        if not self._row:
            self._row.append(self._free.pop())

    def close(self) -> None:
        for pipe in (*self._row, *self._free):
            os.close(pipe.reading)
            os.close(pipe.writing)
        self._row.clear()
        self._free.clear()

    def _move(self, pipe: _Pipe, fd: int) -> int:
        if self._buffer is None:
            try:
                return splice(pipe.reading, fd, pipe.bytes)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # A file that is only appended to, and some devices, take copies only.
                self._buffer = memory(BLOCK)
        count = os.readv(pipe.reading, [self._buffer])
        write_all(fd, self._buffer[:count])
        return count


Place = Pipes | Ring


def hold(size: int) -> Place:
    """A place where `size` bytes can wait."""
    with contextlib.suppress(OSError):
        return Pipes(size)
    return Ring(size + BLOCK)
