"""A buffer over an input, in which a reader finds its records."""

from collections.abc import Callable

from .descriptors import EVEN, memory
from .readers import Reader

# Small enough to stay in a core's cache between being written and read.
WINDOW = 1 << 20


class Window:
    """An input seen through one buffer: the bytes from `offset` on that are at hand, in one piece.

    `have()` are those bytes, `need(n)` reads until there are n, `take(n)` leaves n behind.  What is left behind goes to
    `sink` in large pieces, once more room is needed or `flush()` asks for it: never before it has been looked at.
    """

    def __init__(self, source: Reader, sink: Callable[[memoryview], object] | None = None, size: int = WINDOW) -> None:
        self._source = source
        self.sink = sink
        self._buffer = memory(size)
        self._left, self._at, self._end = 0, 0, 0
        self._before = 0

    @property
    def offset(self) -> int:
        """Of the next byte, in the input."""
        return self._before + self._at

    @property
    def came(self) -> int:
        """Bytes that have been read."""
        return self._before + self._end

    def have(self) -> memoryview:
        return self._buffer[self._at : self._end]

    def more(self) -> bool:
        """Read some more; False at the end of the input."""
        if self._end == len(self._buffer):
            self._make_room()
        odd = -self._end % EVEN
        count = self._source.readinto(self._buffer[self._end : self._end + (odd or len(self._buffer))])
        self._end += count
        return bool(count)

    def need(self, count: int) -> memoryview | None:
        """The next `count` bytes, still ahead; None where the input ends before."""
        while self._end - self._at < count:
            if not self.more():
                return None
        return self._buffer[self._at : self._at + count]

    def take(self, count: int) -> None:
        self._at += count

    def flush(self) -> None:
        if self.sink and self._at > self._left:
            self.sink(self._buffer[self._left : self._at])
        self._left = self._at

    def _make_room(self) -> None:
        self.flush()
        ahead = self._end - self._at
        target = self._buffer
        if ahead + EVEN > len(target) // 2:
            target = memory(2 * (ahead + EVEN))
        # What is read next comes to an even place.
        start = -ahead % EVEN
        # The two may overlap; views are moved as memmove does.
        target[start : start + ahead] = self._buffer[self._at : self._end]
        self._buffer = target
        self._before += self._at - start
        self._left, self._at, self._end = start, start, start + ahead
