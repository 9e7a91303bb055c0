"""Pages of a state to a QEMU whose guest runs already: those that it asks for first, all others beside them.

One thread, one loop: what QEMU asks is read before anything else is begun, and at most a chunk of the rest is on its
way, so that a request never waits behind much.
"""

import os
import select
import time
from collections.abc import Iterable
from enum import Enum

from ..errors import CannotDo, Damaged
from ..phases import Phases
from ..stream import constants
from ..vmz.state_file import StateFile
from .background_fill import BackgroundFill
from .page_order import Place
from .page_queue import PageQueue, ServedPages
from .postcopy import PAGE, Opening, ReturnPath, Said


class Phase(Enum):
    ON_DEMAND = "nothing but what is asked for is sent"
    FILLING = "the rest is sent as well"
    FILLED = "all of it was sent; its end waits until QEMU has loaded the devices"
    BROKEN = "of the rest something cannot be read; what is asked for is sent on"
    GIVEN_UP = "what is on its way is the last"
    CLOSED = "everything was sent, and the end of it"
    OVER = "QEMU has everything"


NEXT = {
    Phase.ON_DEMAND: frozenset({Phase.FILLING, Phase.OVER}),
    Phase.FILLING: frozenset({Phase.FILLED, Phase.BROKEN, Phase.OVER}),
    # Until then it may ask for a page of zeros, and wait for it, which nobody can bring behind the end.
    Phase.FILLED: frozenset({Phase.CLOSED, Phase.OVER}),
    Phase.BROKEN: frozenset({Phase.GIVEN_UP, Phase.OVER}),
    Phase.GIVEN_UP: frozenset({Phase.OVER}),
    Phase.CLOSED: frozenset({Phase.OVER}),
}
# What other threads say; only the loop goes from phase to phase.
WAKE, FINISH_UP, GIVE_UP = b"w", b"f", b"g"
REQUESTS = (constants.MIG_RP_MSG_REQ_PAGES_ID, constants.MIG_RP_MSG_REQ_PAGES)


class Lost(CannotDo):
    """QEMU's end of the channel is closed, and it has not said that it has everything."""


class PageServer:
    """`run` until QEMU has everything.  reading, writing: the two directions of its channel; `run` leaves them open.

    first: pages to be sent before the rest.  on_demand: nothing but what is asked for, until `finish_up` is called.
    damage: of the rest something cannot be read.
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
        self._opening = opening
        self._reading, self._writing = reading, writing
        self._phase = Phases(Phase.ON_DEMAND if on_demand else Phase.FILLING, NEXT)
        self._path = ReturnPath()
        self._said: list[Said] = []
        # QEMU has loaded the devices.
        self._loaded = False
        self._woken, self._waker = os.pipe()
        self._queue = PageQueue(file, opening)
        self._rest = BackgroundFill(file, self._queue, first, lambda: self._say(WAKE))
        self.damage: Damaged | None = None

    @property
    def tally(self) -> ServedPages:
        return self._queue.tally

    def take_up(self, have: dict[bytes, bytearray], path: ReturnPath, said: list[Said]) -> None:
        """QEMU has the pages of `have` (a byte for each); it has `said` something, and `path` may hold more."""
        self._queue.have = have
        self._path = path
        self._said = said
        self._loaded = True

    # for other threads

    def finish_up(self) -> None:
        """Send everything, though it is not asked for."""
        self._say(FINISH_UP)

    def give_up(self) -> None:
        """There is damage: end `run` as soon as what is on its way has left."""
        self._say(GIVE_UP)

    def _say(self, what: bytes) -> None:
        os.write(self._waker, what)

    # the loop

    def run(self, first: bytes = b"") -> None:
        """Send `first`, then serve.  Lost where QEMU goes away; Damaged where a page that it asked for cannot be read.

        Where one of the rest cannot be read, that is the `damage`; what is asked for is served nevertheless, until
        `give_up` is called.
        """
        for fd in (self._reading, self._writing, self._woken):
            os.set_blocking(fd, False)
        try:
            self._queue.put(first)
            for said in [*self._said, *self._path.feed(b"")]:
                self._answer(said)
            while not self._ended():
                if self._queue.empty and self._phase.now is Phase.FILLING:
                    self._fill()
                if self._loaded and self._phase.now is Phase.FILLED:
                    self._queue.put(self._opening.closing())
                    self._phase.go(Phase.CLOSED)
                self._turn()
        except ConnectionError as error:
            raise Lost("QEMU has closed its channel") from error
        finally:
            self._rest.end()

    def _ended(self) -> bool:
        return self._phase.now is Phase.OVER or (self._phase.now is Phase.GIVEN_UP and self._queue.empty)

    def _fill(self) -> None:
        """The next of what nobody has asked for."""
        try:
            if self._rest.put():
                return
            self._phase.go(Phase.FILLED)
        except Damaged as error:
            self._phase.go(Phase.BROKEN)
            self.damage = error

    def _turn(self) -> None:
        wanted = {self._woken: select.POLLIN, self._reading: select.POLLIN}
        if not self._queue.empty:
            wanted[self._writing] = wanted.get(self._writing, 0) | select.POLLOUT
        poll = select.poll()
        for fd, event in wanted.items():
            poll.register(fd, event)
        for fd, event in poll.poll():
            if fd == self._woken:
                self._obey(os.read(fd, 4096))
            elif fd == self._reading and event != select.POLLOUT:
                self._hear()
        if not self._queue.empty:
            self._queue.send(self._writing)

    def _obey(self, said: bytes) -> None:
        if FINISH_UP in said and self._phase.now is Phase.ON_DEMAND:
            self._phase.go(Phase.FILLING)
        if GIVE_UP in said and self._phase.now is Phase.BROKEN:
            self._phase.go(Phase.GIVEN_UP)

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
        if self._phase.now is Phase.OVER:
            return
        if said.kind == constants.MIG_RP_MSG_SHUT:
            if said.value:
                raise Lost(f"QEMU ended with status {said.value}")
            self._phase.go(Phase.OVER)
        elif said.kind == constants.MIG_RP_MSG_PONG:
            self._loaded = True
        elif said.kind in REQUESTS and self._phase.now is not Phase.CLOSED:
            self._requested(said, time.monotonic())

    def _requested(self, said: Said, now: float) -> None:
        numbers = range(said.start // PAGE, (said.start + said.size) // PAGE)
        # On a channel that was taken up QEMU goes on in a block that it named on the old one: any that has the page.
        have = self._queue.have
        names = [said.block] if said.block else list(have)
        found = [name for name in names if numbers and numbers[-1] < len(have.get(name, b""))]
        if said.start % PAGE or not found:
            raise CannotDo(f"QEMU asks for {said.size} bytes at {said.start:#x} of {said.block!r}, which is not there")
        for name in found:
            for number in numbers:
                if not have[name][number]:
                    self._queue.asked(name, number, now)
                    if place := self._queue.put_page(name, number):
                        self._rest.prefer(place)
                    self._queue.awaited(now)
