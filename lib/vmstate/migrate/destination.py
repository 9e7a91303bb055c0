"""A guest on its way in over a link, from 'accept' to 'running'.

Source: docs/link.md, which has the conversation and what is done when it breaks off.
"""

import contextlib
import select
from dataclasses import dataclass, field
from typing import Any

from ..errors import CannotDo, Damaged, GuestGone, InDoubt, Stopped, VmstateError
from ..io.descriptors import channel, write_all
from ..io.pipeline import ShellPipeline
from ..qemu import control, markers
from ..qemu.incoming import NO_ROUNDS, Waiting
from ..qemu.launch import Process
from ..qemu.monitor import Monitor
from ..qemu.state import query, query_once, with_retry
from ..report import Report
from ..restore.outcome import nics_of, refusal_of
from ..signals import hold_signals, no_more_signals, release_signals, step_back
from ..stream import constants
from . import decision, filters, link
from .finding import Finding
from .link import ROOM, Link, LinkFrame
from .messages import Go, Hello, told
from .postcopy_link import recover

# A source that has heard 'loaded' goes on at once.
SOON = 1.0
# Longer than any source waits before it takes its guest back.
LONG = 600.0
# In postcopy the guest stands still until it is noticed here, in ms.
LOOK_MS = 2


@dataclass(frozen=True)
class ReceivePlan:
    """path: the waiting guest, or command: the QEMU to start.  back: the inverse of the filters on the way.

    announce: whether to announce the guest in the network once it runs.
    """

    path: str | None = None
    command: list[str] = field(default_factory=list)
    back: str | None = None
    announce: bool = True


class IncomingMigration:
    """One guest.  hello: what its source has said; process: the QEMU, where we have started it."""

    def __init__(
        self, plan: ReceivePlan, path: str, report: Report, link: Link, hello: Hello, process: Process | None
    ) -> None:
        self._plan = plan
        self._path = path
        self._report = report
        self._link = link
        self._hello = hello
        self._process = process
        self._waiting = Waiting(path)
        self._ours, self._theirs = channel(ROOM)
        self._pipeline: ShellPipeline | None = None
        self._bytes = 0
        self._whole = False
        self._near: Monitor | None = None
        self._rhythm: dict[str, int] | None = None
        self._sink = -1
        self._said = b""
        self._shut = False
        # The source wants to go over to postcopy; it has, and the guest is here.
        self._switched = False
        self._crossed = False
        # The guest runs on at the source, which has said so.
        self._cancelled = False
        # Loaded, and perhaps the only one there is.
        self._loaded = False
        self._granted = False
        self._facts = {"move": hello.move, "run": hello.run, **hello.origin._asdict()}

    @property
    def _may_announce(self) -> bool:
        return self._plan.announce and self._hello.announce

    def run(self, findings: list[Finding]) -> dict[str, Any]:
        """The outcome as values.  findings: what speaks against the move, for the source to tell."""
        try:
            self._link.tell(link.ACCEPT, guest=self._path, findings=told(findings))
            self._load()
            state = self._finish_postcopy() if self._crossed else self._commit()
        except BaseException as error:
            raise self._put_back(error) from error
        self._announce(state)
        self._set_clock(state)
        if self._process and self._process.added:
            self._report.hint(f"the guest's monitor is {self._path}")
        return {"guest": self._path, "state": state, "bytes": self._bytes}

    def resume(self) -> dict[str, Any]:
        """Of a guest that has crossed over, when the link was lost: the rest of its pages."""
        self._ours.close()
        self._ours = recover(self._path, self._hello.move)
        self._crossed = self._waiting.begun = True
        self._hello = self._hello._replace(postcopy=True)
        self._sink = self._ours.fileno()
        try:
            self._link.tell(link.ACCEPT)
            self._load()
            return {"guest": self._path, "state": self._finish_postcopy()}
        except BaseException as error:
            raise self._put_back(error) from error

    def _load(self) -> None:
        """Everything that the source has to say, to QEMU, until that has said itself that it has loaded it (SHUT 0)."""
        # Filters may have bytes of their own behind QEMU's.
        while not (self._shut and (self._whole or not self._hello.through)):
            ready = self._wait()
            if self._ours.fileno() in ready:
                self._hear_qemu()
            elif ready:
                self._hear_source(self._link.receive())
            elif self._switched and not self._crossed:
                self._let_run_in_postcopy()

    def _wait(self) -> set[int]:
        """Which descriptors have something to say; none where it is time to look at the guest."""
        poll = select.poll()
        poll.register(self._link.reading, select.POLLIN)
        if self._waiting.begun and not self._shut:
            poll.register(self._ours, select.POLLIN)
        return {fd for fd, _ in poll.poll(LOOK_MS if self._switched and not self._crossed else None)}

    def _hear_source(self, frame: LinkFrame | None) -> None:
        if frame is None:
            raise CannotDo("the link was lost before the source had sent all of its guest, which runs on there")
        if frame.kind == link.CANCEL:
            self._cancelled = True
            raise CannotDo("the source has taken its guest back, which runs on there")
        if frame.kind == link.DATA:
            if self._sink < 0:
                self._sink = self._begin()
            self._pass(self._sink, frame.data)
        elif frame.kind == link.SWITCH:
            self._switched = True
        elif frame.kind == link.END and self._waiting.begun:
            if self._pipeline and not self._qemu_gave_up():
                self._pipeline.finish()
            self._whole = True
        else:
            raise Damaged(f"the source said '{chr(frame.kind)}' in the midst of its data")

    def _hear_qemu(self) -> None:
        """Its return path: SHUT is for us, and where it may come to postcopy all the rest for the source."""
        try:
            more = self._ours.recv(1 << 16)
        except ConnectionError:
            more = b""
        if self._crossed:
            # Not all of it is messages (the bitmaps of a recovery), and none is for us; SHUT is the last one.
            self._shut = not more
            return self._link.send_bytes(link.BACK, memoryview(more)) if more else None
        if not more:
            raise self._refusal(CannotDo("QEMU has ended its channel"))
        self._said += more
        while len(self._said) >= 4 and len(self._said) >= (size := 4 + int.from_bytes(self._said[2:4], "big")):
            message, self._said = self._said[:size], self._said[size:]
            self._shut = int.from_bytes(message[:2], "big") == constants.MIG_RP_MSG_SHUT
            if self._shut and any(message[4:]):
                raise self._refusal(CannotDo("QEMU has refused it"))
            if self._hello.postcopy and not self._shut:
                self._link.send_bytes(link.BACK, memoryview(message))
        return None

    def _begin(self) -> int:
        """QEMU loads from now on; where its bytes go."""
        hold_signals()
        on = ("postcopy-ram",) if self._hello.postcopy else ()
        self._waiting.hold_and_load(self._theirs, on, self._facts)
        release_signals()
        if self._waiting.had_no_rounds:
            self._report.note(NO_ROUNDS)
        self._theirs.close()
        back = filters.inverse(self._hello.through, self._plan.back)
        if back is None:
            return self._ours.fileno()
        self._pipeline = ShellPipeline(back, "sink", self._ours.fileno())
        return self._pipeline.fd

    def _pass(self, sink: int, data: memoryview) -> None:
        try:
            write_all(sink, data)
        except ConnectionError as error:
            if self._pipeline and not self._qemu_gave_up():
                self._pipeline.finish()
            raise self._refusal(error) from error
        self._bytes += len(data)

    def _qemu_gave_up(self) -> bool:
        """Its reason comes before that of the filters, which end over it."""
        try:
            return query_once(self._path).migration == "failed"
        except GuestGone:
            return True
        except VmstateError:
            return False

    def _let_run_in_postcopy(self) -> None:
        """The source has crossed over: from now on the guest is here, and asks for its pages."""
        try:
            self._near = monitor = self._near or Monitor(self._path).__enter__()
        except GuestGone:
            raise
        except CannotDo:
            # Somebody else has it; the next look will do.
            return
        guest_state = query(monitor)
        if guest_state.migration == "postcopy-active" and guest_state.run == "paused":
            self._crossed = True
            no_more_signals()
            decision.arrive(monitor, self._facts, control.rhythm_of(monitor) if self._may_announce else None)
            monitor.leave()

    def _finish_postcopy(self) -> str:
        """All pages are here, and the source knows."""
        self._waiting.loaded()
        state = query_once(self._path).run
        with contextlib.suppress(OSError):
            self._link.send(link.RUNNING, state=state)
        with contextlib.suppress(VmstateError):
            with_retry(self._path, self._waiting.afterwards)
        return state

    def _commit(self) -> str:
        """Loaded: tell it, wait for the word, let it run."""
        # The guest stands still: the monitor is kept for what comes, if not for long.
        monitor = self._near or Monitor(self._path).__enter__()
        try:
            self._waiting.loaded_in(monitor)
            self._rhythm = control.rhythm_of(monitor) if self._may_announce else None
            self._loaded = True
            self._link.tell(link.LOADED, bytes=self._bytes)
            if self._link.comes(SOON):
                return self._await_go(monitor)
        finally:
            monitor.leave()
        if not self._link.comes(LONG):
            raise CannotDo(f"the source has said nothing for {LONG:.0f} s")
        return with_retry(self._path, self._await_go)

    def _await_go(self, monitor: Monitor) -> str:
        if not self._granted:
            frame = self._link.receive()
            if frame is not None and frame.kind == link.CANCEL:
                self._cancelled = True
                raise CannotDo("the source has taken its guest back, which runs on there")
            if frame is None or frame.kind != link.GO:
                raise CannotDo("the link is lost")
            Go.of(frame)
            self._granted = True
            no_more_signals()
        state = decision.arrive(monitor, self._facts, self._rhythm)
        step_back()
        with contextlib.suppress(OSError):
            self._link.send(link.RUNNING, state=state)
        with contextlib.suppress(VmstateError):
            self._waiting.afterwards(monitor)
        return state

    def _put_back(self, error: BaseException) -> BaseException:
        no_more_signals()
        if self._near:
            self._near.leave()
        if self._pipeline:
            self._pipeline.end()
        self._ours.close()
        self._theirs.close()
        if self._crossed or (self._switched and self._in_postcopy()):
            text = f"the guest at {self._path} runs here, and lacks pages that are at its source: {error}"
            return InDoubt(text, "at its source: vm-status tells how to go on")
        if self._waiting.begun and not self._cancelled and (self._loaded or not self._waiting.abort_load()):
            return self._in_doubt(error)
        if self._process:
            self._process.end()
            return error
        if self._waiting.begun:
            self._waiting.discard()
        if isinstance(error, VmstateError):
            error.hints = (*error.hints, self._waiting.outcome_text())
        return error

    def _in_postcopy(self) -> bool:
        try:
            return query_once(self._path).migration.startswith("postcopy")
        except VmstateError:
            return False

    def _in_doubt(self, error: BaseException) -> BaseException:
        """It is loaded, and its source has been told so."""
        path = self._path
        if isinstance(error, GuestGone):
            return GuestGone(f"{error}, when it had been loaded")
        why = "a signal came" if isinstance(error, Stopped) else str(error)
        settle = f"vm-migrate --recover {path} {markers.URI}"
        if self._granted:
            text = f"the guest at {path} was let go by its source, but does not run: {why}"
            return InDoubt(text, f"a disk image can be locked by the source: once that has ended, {settle}")
        text = f"the guest at {path} is loaded and held, and it is not known whether its source has let it go: {why}"
        return InDoubt(text, settle)

    def _refusal(self, error: Exception) -> VmstateError:
        return refusal_of(self._waiting, self._process, error, self._whole)

    def _set_clock(self, state: str) -> None:
        """As with the announcement: what fails is a warning."""
        if state != "running" or not self._hello.clock:
            return
        from ..qemu import guest_agent

        try:
            with Monitor(self._path) as monitor:
                path = guest_agent.path_of(monitor)
            if path is None:
                raise CannotDo("it has no port for a guest agent")
            guest_agent.set_time(path)
        except VmstateError as error:
            self._report.warning(f"the clock of the guest was not set: {error}")
            self._report.hint("its clock stood still with it: set it inside, or let NTP do that")

    def _announce(self, state: str) -> None:
        """An announcement that fails is a warning: the guest runs."""
        if state != "running" or not self._may_announce:
            return
        from ..announce.announcer import AnnouncePlan, Announcer
        from ..announce.messages import Narrator
        from ..announce.rounds import schedule

        def fail(error: VmstateError) -> None:
            self._report.warning(f"the guest runs, but was not announced in the network: {error}")

        cards = [nic for nic in nics_of(self._waiting, self._report) if nic.iface]
        if not cards:
            return
        teller = Narrator(self._report, self._report.note, fail=fail)
        try:
            for happening in Announcer(AnnouncePlan(schedule(), guest=self._path)).run(cards):
                teller.tell(happening)
            teller.end()
        except VmstateError as error:
            fail(error)
        except OSError as error:
            fail(CannotDo(error.strerror or str(error)))
