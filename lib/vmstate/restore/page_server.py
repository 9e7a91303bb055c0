"""Pages of a state to a QEMU whose guest runs already: those that it asks for first, all others beside them.

One thread, one loop: what QEMU asks is read before anything else is begun, and at most `CHUNK` bytes of the rest are on
their way, so that a request never waits behind much.  What comes next of the rest is unpacked ahead by other threads.
"""

import os
import select
import time
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..errors import CannotDo, Damaged
from ..stream import constants
from ..stream.page_map import NORMAL
from ..vmz.state_file import StateFile
from ..vmz.workers import processors
from .postcopy import PAGE, STRIDE, Opening, ReturnPath, Said

# Of the rest, on its way at once
CHUNK = 64 << 10
# Pieces that are unpacked ahead
AHEAD = 8
VECTORS = 64

Place = tuple[bytes, int]


class Lost(CannotDo):
    """QEMU's end of the channel is closed, and it has not said that it has everything."""


@dataclass
class ServedPages:
    """asked: pages that QEMU asked for; order: these, as they were asked for.  when: seconds from the server's start to
    a request; waited: from there to its page's last byte.  sent: pages in all.  bytes: that left."""

    asked: int = 0
    sent: int = 0
    bytes: int = 0
    waited: "array[float]" = field(default_factory=lambda: array("d"))
    when: "array[float]" = field(default_factory=lambda: array("d"))
    order: list[Place] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def values(self) -> dict[str, Any]:
        """For `--json`; asked_at: when each hundredth of the requests came, in seconds."""
        waited = sorted(self.waited)
        share = {"median": 0.5, "p99": 0.99}
        times = {f"wait_{name}": waited[int(len(waited) * part)] if waited else None for name, part in share.items()}
        asked_at = [round(self.when[len(self.when) * part // 100], 4) for part in range(100)] if self.when else []
        numbers = {"asked": self.asked, "sent": self.sent, "bytes": self.bytes}
        return {**numbers, **times, "seconds": round(time.monotonic() - self.begun, 4), "asked_at": asked_at}


class PageServer:
    """`run` until QEMU has everything.  reading, writing: the two directions of its channel; `run` leaves them open.

    first: pages to be sent before the rest.
    on_demand: nothing but what is asked for, until `finish_up` is called.
    """

    def __init__(
        self,
        file: StateFile,
        opening: Opening,
        reading: int,
        writing: int,
        *,
        on_demand: bool = False,
        first: Iterable[Place] = (),
    ) -> None:
        self._file = file
        self._opening = opening
        self._reading, self._writing = reading, writing
        self._on_demand = on_demand
        self._have = {name: bytearray(-(-size // PAGE)) for name, size in opening.blocks.items()}
        self._runs = _runs(file)
        self._places = array("Q", (place for place, _, _, _ in self._runs))
        self._path = ReturnPath()
        self._said: list[Said] = []
        self._out: deque[memoryview] = deque()
        self._block: bytes | None = None
        self._queued = 0
        # What was asked for and is on its way: where its last byte stands, and since when it is waited for
        self._awaited: deque[tuple[int, float]] = deque()
        self._hot: deque[int] = deque()
        self._done = bytearray(len(file.pieces))
        self._next = 0
        self._first = self._listed(first)
        self._rest = self._all()
        self._pool = ThreadPoolExecutor(min(processors(), 4))
        self._ahead: dict[int, Future[memoryview]] = {}
        self._woken, self._waker = os.pipe()
        self._closed = False
        self._over = False
        self._give_up = False
        self.damage: Damaged | None = None
        self.tally = ServedPages()

    def take_up(self, have: dict[bytes, bytearray], path: ReturnPath, said: list[Said]) -> None:
        """QEMU has the pages of `have` (a byte for each); it has `said` something, and `path` may hold more."""
        self._have = have
        self._path = path
        self._said = said

    # for other threads

    def finish_up(self) -> None:
        """Send everything, though it is not asked for."""
        self._on_demand = False
        self._wake()

    def give_up(self) -> None:
        """End `run` as soon as what is on its way has left."""
        self._give_up = True
        self._wake()

    def _wake(self, _future: object = None) -> None:
        os.write(self._waker, b"x")

    # the loop

    def run(self, first: bytes = b"") -> None:
        """Send `first`, then serve.  Lost where QEMU goes away; Damaged where a page that it asked for cannot be read.

        Where one of the rest cannot be read, that is the `damage`; what is asked for is served nevertheless, until
        `give_up` is called.
        """
        for fd in (self._reading, self._writing, self._woken):
            os.set_blocking(fd, False)
        try:
            self._put(memoryview(first))
            for said in [*self._said, *self._path.feed(b"")]:
                self._answer(said)
            while not self._over and not (self._give_up and not self._out):
                if not self._out and not self._closed:
                    self._fill()
                self._turn()
        except ConnectionError as error:
            raise Lost("QEMU has closed its channel") from error
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _turn(self) -> None:
        wanted = {self._woken: select.POLLIN, self._reading: select.POLLIN}
        if self._out:
            wanted[self._writing] = wanted.get(self._writing, 0) | select.POLLOUT
        poll = select.poll()
        for fd, event in wanted.items():
            poll.register(fd, event)
        for fd, event in poll.poll():
            if fd == self._woken:
                os.read(fd, 4096)
            elif fd == self._reading and event != select.POLLOUT:
                self._hear()
        if self._out:
            self._send()

    def _hear(self) -> None:
        try:
            data = os.read(self._reading, 64 << 10)
        except BlockingIOError:
            return
        if not data:
            raise Lost("QEMU has closed its channel")
        for said in self._path.feed(data):
            self._answer(said)

    def _answer(self, said: Said) -> None:
        if said.kind == constants.MIG_RP_MSG_SHUT:
            if said.value:
                raise Lost(f"QEMU ended with status {said.value}")
            self._over = True
        elif said.kind in (constants.MIG_RP_MSG_REQ_PAGES_ID, constants.MIG_RP_MSG_REQ_PAGES) and not self._closed:
            self._requested(said, time.monotonic())

    def _send(self) -> None:
        try:
            views = [view for view, _ in zip(self._out, range(VECTORS), strict=False)]
            count = os.writev(self._writing, views)
        except BlockingIOError:
            return
        self.tally.bytes += count
        while count:
            if count < len(self._out[0]):
                self._out[0] = self._out[0][count:]
                break
            count -= len(self._out.popleft())
        now = time.monotonic()
        while self._awaited and self._awaited[0][0] <= self.tally.bytes:
            self.tally.waited.append(now - self._awaited.popleft()[1])

    def _put(self, *views: bytes | memoryview) -> None:
        for view in views:
            if view:
                self._out.append(memoryview(view))
                self._queued += len(view)

    # what is asked for

    def _requested(self, said: Said, now: float) -> None:
        numbers = range(said.start // PAGE, (said.start + said.size) // PAGE)
        # On a channel that was taken up QEMU goes on in a block that it named on the old one: any that has the page.
        names = [said.block] if said.block else list(self._have)
        found = [name for name in names if numbers and numbers[-1] < len(self._have.get(name, b""))]
        if said.start % PAGE or not found:
            raise CannotDo(f"QEMU asks for {said.size} bytes at {said.start:#x} of {said.block!r}, which is not there")
        for name in found:
            for number in numbers:
                if not self._have[name][number]:
                    self.tally.asked += 1
                    self.tally.when.append(now - self.tally.begun)
                    self.tally.order.append((name, number))
                    self._put_page(name, number)
                    self._awaited.append((self._queued, now))

    def _put_page(self, name: bytes, number: int) -> None:
        kind, place = self._file.blocks[name].find(number)
        if kind & NORMAL:
            self._put_run(name, number, 1, place)
            # Its neighbours have been unpacked with it, and are likely to be wanted next.
            self._hot.append(bisect_right(self._file.pieces, place) - 1)
        else:
            self._put(self._word(name, number, constants.RAM_SAVE_FLAG_ZERO), b"\0")
            self._mark(name, number, 1)

    def _put_run(self, name: bytes, number: int, count: int, place: int) -> None:
        """`count` neighbours, the content of the first at `place` of the stream: from there on they are records that
        QEMU can be given as they are."""
        try:
            data = self._file.read(place, (count - 1) * STRIDE + PAGE)
        except (Damaged, OSError, IndexError) as error:
            begin, end = number * PAGE, (number + count) * PAGE
            text = f"{begin:#x} to {end:#x} of RAM block {name.decode(errors='replace')!r} cannot be read: {error}"
            raise Damaged(text) from error
        self._put(self._word(name, number, constants.RAM_SAVE_FLAG_PAGE), data)
        self._mark(name, number, count)

    def _word(self, name: bytes, number: int, flag: int) -> bytes:
        if name == self._block:
            return constants.U64.pack(number * PAGE | flag | constants.RAM_SAVE_FLAG_CONTINUE)
        self._block = name
        return constants.U64.pack(number * PAGE | flag) + bytes((len(name),)) + name

    def _mark(self, name: bytes, number: int, count: int) -> None:
        self._have[name][number : number + count] = b"\1" * count
        self.tally.sent += count

    # the rest

    def _fill(self) -> None:
        """The next of what nobody has asked for."""
        if self.damage or self._on_demand:
            return
        try:
            size = self._queued
            for waits in self._rest:
                if waits or self._queued - size >= CHUNK:
                    return
            self._put(self._opening.closing())
            self._closed = True
        except Damaged as error:
            self.damage = error

    def _all(self) -> Iterator[bool]:
        """Put one run after the other; True where the next one has not been unpacked yet."""
        for name, number in self._first:
            kind, place = self._file.blocks[name].find(number)
            if kind & NORMAL and not self._have[name][number]:
                self._put_run(name, number, 1, place)
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
            future.add_done_callback(self._wake)
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
        have, at, end = self._have[name], number, number + count
        while (at := have.find(0, at, end)) >= 0:
            behind = have.find(1, at, min(end, at + CHUNK // PAGE))
            behind = behind if behind >= 0 else min(end, at + CHUNK // PAGE)
            self._put_run(name, at, behind - at, place + (at - number) * STRIDE)
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
