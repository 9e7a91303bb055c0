"""The pages that nobody has asked for: in which order, unpacked ahead by other threads, as runs of neighbours."""

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ..stream.page_map import NORMAL
from ..vmz.state_file import StateFile
from ..vmz.workers import processors
from .page_order import Place
from .page_queue import PageQueue
from .postcopy import PAGE, STRIDE

# On its way at once
CHUNK = 64 << 10
# Pieces that are unpacked ahead
AHEAD = 8


class BackgroundFill:
    """`put` the next of them into `queue`, until there are none.

    first: pages that come before all others.  wake: called in another thread, once there is something to be put.
    """

    def __init__(self, file: StateFile, queue: PageQueue, first: Iterable[Place], wake: Callable[[], object]) -> None:
        self._file = file
        self._queue = queue
        self._wake = wake
        self._runs = _runs(file)
        self._places = array("Q", (place for place, _, _, _ in self._runs))
        self._first = self._listed(first)
        self._hot: deque[int] = deque()
        self._done = bytearray(len(file.pieces))
        self._next = 0
        self._rest = self._all()
        self._pool = ThreadPoolExecutor(min(processors(), 4))
        self._ahead: dict[int, Future[memoryview]] = {}

    def put(self) -> bool:
        """A chunk, or as much as is unpacked; False where nothing is left.  Damaged where one cannot be read."""
        end = self._queue.queued + CHUNK
        # Each step of `_rest` puts some.
        return any(waits or self._queue.queued >= end for waits in self._rest)

    def prefer(self, place: int) -> None:
        """The page there was asked for: its neighbours have been unpacked with it, and are likely to be wanted next."""
        self._hot.append(bisect_right(self._file.pieces, place) - 1)

    def end(self) -> None:
        """Nothing more is unpacked."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _all(self) -> Iterator[bool]:
        """Put one run after the other; True where the next one has not been unpacked yet."""
        for name, number in self._first:
            kind, place = self._file.blocks[name].find(number)
            if kind & NORMAL and not self._queue.have[name][number]:
                self._queue.put_run(name, number, 1, place)
                yield False
        while (piece := self._choose()) is not None:
            while not self._unpacked(piece):
                yield True
            self._done[piece] = 1
            for name, number, count, place in self._in_piece(piece):
                yield from self._put_missing(name, number, count, place)

    def _choose(self) -> int | None:
        while self._hot:
            piece = self._hot.popleft()
            if not self._done[piece]:
                return piece
        self._next = self._done.find(0, self._next)
        return self._next if self._next >= 0 else None

    def _unpacked(self, piece: int) -> bool:
        """Whether a piece is at hand; if not, it will wake us.  Those behind it are unpacked as well."""
        for number in range(piece, min(piece + AHEAD, len(self._done))):
            if number not in self._ahead and not self._done[number]:
                self._ahead[number] = self._pool.submit(self._file.read, self._file.pieces[number], 1)
        future = self._ahead[piece]
        if not future.done():
            future.add_done_callback(lambda _: self._wake())
            return False
        # What is wrong with it is said with the page that it is about.
        del self._ahead[piece]
        return True

    def _in_piece(self, piece: int) -> Iterator[tuple[bytes, int, int, int]]:
        """Of each run what begins in a piece: block, first page, number of pages, place."""
        pieces = self._file.pieces
        begin, end = pieces[piece], pieces[piece + 1] if piece + 1 < len(pieces) else self._file.content
        number = max(0, bisect_right(self._places, begin) - 1)
        while number < len(self._runs) and self._places[number] < end:
            place, name, start, count = self._runs[number]
            low = max(0, -(-(begin - place) // STRIDE))
            high = min(count, -(-(end - place) // STRIDE))
            if low < high:
                yield name, start + low, high - low, place + low * STRIDE
            number += 1

    def _put_missing(self, name: bytes, number: int, count: int, place: int) -> Iterator[bool]:
        """What QEMU lacks of a run."""
        have, at, end = self._queue.have[name], number, number + count
        while (at := have.find(0, at, end)) >= 0:
            behind = have.find(1, at, min(end, at + CHUNK // PAGE))
            behind = behind if behind >= 0 else min(end, at + CHUNK // PAGE)
            self._queue.put_run(name, at, behind - at, place + (at - number) * STRIDE)
            at = behind
            yield False

    def _listed(self, first: Iterable[Place]) -> list[Place]:
        """Those that are in this state at all."""
        blocks = self._file.blocks
        return [(name, number) for name, number in first if name in blocks and number < blocks[name].pages]


def _runs(file: StateFile) -> list[tuple[int, bytes, int, int]]:
    """Place, block, first page and number of pages of each run that has content, in the order of the stream."""
    found = []
    for name, block in file.blocks.items():
        found += [(place, name, start, count) for start, count, kind, place in block.runs() if kind & NORMAL]
    return sorted(found)
