"""What the source sends, into the QEMU that waits for it, until that has said itself that it has all of it.

Source: docs/link.md.
"""

import select
import socket

from ..errors import CannotDo, Damaged, GuestGone, VmstateError
from ..io.descriptors import channel, write_all
from ..io.pipeline import ShellPipeline
from ..qemu import control
from ..qemu.incoming import NO_ROUNDS
from ..qemu.state import query, query_once
from ..signals import hold_signals, no_more_signals, release_signals
from ..stream import constants
from . import decision, filters, link
from .link import LOST, ROOM, SILENT, LinkFrame
from .reception import Phase, Reception

# In postcopy the guest stands still until it is noticed here, in ms.
LOOK_MS = 2


class Inlet:
    """Where the data go: into QEMU's channel, through `filters` where what undoes them (`back`) is on the way."""

    def __init__(self, qemu: socket.socket, back: str | None) -> None:
        self.filters = ShellPipeline(back, "sink", qemu.fileno()) if back else None
        self.fd = self.filters.fd if self.filters else qemu.fileno()

    def end(self) -> None:
        if self.filters:
            self.filters.end()


def first_frame(of: Reception) -> LinkFrame:
    """What begins it; the source may go over to postcopy before its first byte is here."""
    if not of.link.comes(SILENT):
        raise silent()
    frame = of.link.receive()
    if frame is None or frame.kind not in (link.DATA, link.SWITCH):
        raise broken_off(of, frame)
    return frame


def silent() -> CannotDo:
    return CannotDo(f"the source has said nothing for {SILENT:.0f} s")


def broken_off(of: Reception, frame: LinkFrame | None) -> VmstateError:
    """The error for what is no data."""
    if frame is None:
        return CannotDo("the link was lost before the source had sent all of its guest, which runs on there")
    if frame.kind == link.CANCEL and of.phases.now is not Phase.CROSSED:
        return of.taken_back()
    return Damaged(f"the source said '{chr(frame.kind)}' in the midst of its data")


def begin(of: Reception) -> "Loading":
    """QEMU loads from now on."""
    back = filters.inverse(of.hello.through, of.plan.back)
    on = ("postcopy-ram",) if of.hello.postcopy else ()
    hold_signals()
    ours, theirs = channel(ROOM)
    with theirs:
        of.undo.add("the channel to QEMU", ours.close)
        of.waiting.hold_and_load(theirs, on, of.facts)
    of.phases.go(Phase.LOADING)
    inlet = Inlet(ours, back)
    of.undo.add("the filter", inlet.end)
    release_signals()
    if of.waiting.had_no_rounds:
        of.report.note(NO_ROUNDS)
    return Loading(of, ours, inlet)


class Loading:
    """From the first byte on.  `bytes` counts those that have come, before what undoes the filters."""

    def __init__(self, of: Reception, qemu: socket.socket, inlet: Inlet) -> None:
        self._of = of
        self._qemu = qemu
        self._inlet = inlet
        # The part of a message of QEMU's return path that has come.
        self._said = b""
        # The source has said that this was all; QEMU has.
        self._whole = False
        self._shut = False
        self.bytes = 0

    def run(self, first: LinkFrame | None = None) -> None:
        """Until QEMU has said itself that it has loaded everything (SHUT 0).  first: what has come already."""
        if first:
            self._hear_source(first)
        # Filters may have bytes of their own behind QEMU's.
        while not (self._shut and (self._whole or not self._of.hello.through)):
            ready = self._wait()
            if self._qemu.fileno() in ready:
                self._hear_qemu()
            elif ready:
                self._hear_source(self._of.link.receive())
            elif self._of.phases.now is Phase.SWITCHING:
                self._let_run_in_postcopy()

    def _wait(self) -> set[int]:
        """Which descriptors have something to say; none where it is time to look at the guest."""
        poll = select.poll()
        poll.register(self._of.link.reading, select.POLLIN)
        if not self._shut:
            poll.register(self._qemu, select.POLLIN)
        if self._of.phases.now is Phase.SWITCHING:
            return {fd for fd, _ in poll.poll(LOOK_MS)}
        ready = {fd for fd, _ in poll.poll(SILENT * 1000)}
        if not ready:
            raise silent()
        return ready

    def _hear_source(self, frame: LinkFrame | None) -> None:
        kind = frame.kind if frame else None
        if frame and kind == link.DATA and not self._whole:
            self._pass(frame.data)
        elif kind == link.SWITCH:
            # It may say so again until it sees its own QEMU go over.
            if self._of.phases.now is Phase.LOADING:
                self._of.phases.go(Phase.SWITCHING)
        elif kind == link.END:
            self._finish_filters()
            self._whole = True
        else:
            raise broken_off(self._of, frame)

    def _hear_qemu(self) -> None:
        """Its return path: SHUT is for us, and where it may come to postcopy all the rest for the source."""
        try:
            more = self._qemu.recv(1 << 16)
        except ConnectionError:
            more = b""
        if self._of.phases.now is Phase.CROSSED:
            # Not all of it is messages (the bitmaps of a recovery), and none is for us; SHUT is the last one.
            self._shut = not more
            return self._tell_source(more) if more else None
        if not more:
            raise self._refusal(CannotDo("QEMU has ended its channel"))
        self._said += more
        while len(self._said) >= 4 and len(self._said) >= (size := 4 + int.from_bytes(self._said[2:4], "big")):
            message, self._said = self._said[:size], self._said[size:]
            self._shut = int.from_bytes(message[:2], "big") == constants.MIG_RP_MSG_SHUT
            if self._shut and any(message[4:]):
                raise self._refusal(CannotDo("QEMU has refused it"))
            if self._of.hello.postcopy and not self._shut:
                self._tell_source(message)
        return None

    def _tell_source(self, said: bytes) -> None:
        try:
            self._of.link.send_bytes(link.BACK, memoryview(said))
        except OSError as error:
            raise CannotDo(LOST) from error

    def _pass(self, data: memoryview) -> None:
        try:
            write_all(self._inlet.fd, data)
        except ConnectionError as error:
            self._finish_filters()
            raise self._refusal(error) from error
        self.bytes += len(data)

    def _finish_filters(self) -> None:
        """CannotDo where one has failed, unless QEMU has given up: its reason comes first, and they end over it."""
        if self._inlet.filters and not self._qemu_gave_up():
            self._inlet.filters.finish()

    def _qemu_gave_up(self) -> bool:
        try:
            return query_once(self._of.path).migration == "failed"
        except GuestGone:
            return True
        except VmstateError:
            return False

    def _refusal(self, error: Exception) -> VmstateError:
        return self._of.refusal(error, self._whole)

    def _let_run_in_postcopy(self) -> None:
        """The source has crossed over: from now on the guest is here, and asks for its pages."""
        of = self._of
        try:
            monitor = of.near.open()
        except GuestGone:
            raise
        except CannotDo:
            # Somebody else has it; the next look will do.
            return
        guest_state = query(monitor)
        if guest_state.migration == "postcopy-active" and guest_state.run == "paused":
            of.phases.go(Phase.CROSSED)
            no_more_signals()
            decision.arrive(monitor, of.facts, control.rhythm_of(monitor) if of.may_announce else None)
            of.near.leave()
