"""A guest on its way in over a link, from 'accept' to 'running'.

Source: docs/link.md, which has the conversation and what is done when it breaks off.
"""

from enum import Enum
from typing import Any

from ..errors import CannotDo, GuestGone, InDoubt, Stopped, VmstateError
from ..qemu import markers
from ..qemu.incoming import Waiting
from ..qemu.launch import Process
from ..qemu.monitor import Monitor
from ..qemu.state import query_once
from ..report import Report
from ..restore.outcome import nics_of
from ..rollback import Rollback
from . import link
from .destination_commit import commit, finish_postcopy
from .destination_load import Inlet, Loading, begin, first_frame
from .finding import Finding
from .link import Link
from .messages import Hello, told
from .near import NearMonitor
from .postcopy_link import recover
from .reception import HELD, Phase, ReceivePlan, Reception


class Left(Enum):
    """What a conversation that has broken off has left of the guest here."""

    UNKNOWN = "it could not be seen to"
    NOTHING = "its source has it, or had"
    HELD = "it is loaded and held"
    PAGES = "it runs here, and lacks pages"


class IncomingMigration:
    """One guest.  hello: what its source has said; process: the QEMU, where we have started it."""

    def __init__(
        self, plan: ReceivePlan, path: str, report: Report, link: Link, hello: Hello, process: Process | None
    ) -> None:
        near, undo = NearMonitor(path), Rollback(f"vm-status {path}")
        self._of = Reception(plan, path, report, link, hello, process, Waiting(path), near, undo)
        self._left = Left.UNKNOWN
        undo.add("the guest", self._end_guest)
        undo.add("the talk with QEMU", near.leave)

    def run(self, findings: list[Finding]) -> dict[str, Any]:
        """The outcome as values.  findings: what speaks against the move, for the source to tell."""
        of = self._of
        try:
            of.link.tell(link.ACCEPT, guest=of.path, findings=told(findings))
            first = first_frame(of)
            loading = begin(of)
            loading.run(first)
            state = finish_postcopy(of) if of.phases.now is Phase.CROSSED else commit(of, loading.bytes)
        except BaseException as error:
            raise self._broken_off(error) from error
        of.report.settle()
        self._announce(state)
        self._set_clock(state)
        if of.process and of.process.added:
            of.report.hint(f"the guest's monitor is {of.path}")
        return {"guest": of.path, "state": state, "bytes": loading.bytes}

    def resume(self, accept: dict[str, str]) -> dict[str, Any]:
        """Of a guest that has crossed over, when the link was lost: the rest of its pages.  accept: what to answer."""
        of = self._of
        qemu = recover(of.path, of.hello.move)
        of.undo.add("the channel to QEMU", qemu.close)
        of.phases.go(Phase.CROSSED)
        try:
            of.link.tell(link.ACCEPT, **accept)
            Loading(of, qemu, Inlet(qemu, None)).run()
            return {"guest": of.path, "state": finish_postcopy(of)}
        except BaseException as error:
            raise self._broken_off(error) from error

    # when it breaks off

    def _broken_off(self, error: BaseException) -> BaseException:
        """Undo what can be; the error to raise, with what has become of the guest."""
        trouble = self._of.undo.undo()
        found = self._in_words(error)
        return self._of.undo.in_doubt(found) if trouble else found

    def _end_guest(self) -> None:
        """A QEMU is good for one try, and ended then; but not with what may be the only whole guest."""
        of, now = self._of, self._of.phases.now
        if now is Phase.CROSSED or (of.hello.postcopy and self._in_postcopy()):
            self._left = Left.PAGES
            return
        if of.waiting.begun and now is not Phase.TAKEN_BACK and (now in HELD or not of.waiting.abort_load()):
            self._left = Left.HELD
            return
        self._left = Left.NOTHING
        if of.process:
            of.process.end()
        elif of.waiting.begun:
            of.waiting.discard()

    def _in_postcopy(self) -> bool:
        try:
            return query_once(self._of.path).migration.startswith("postcopy")
        except VmstateError:
            return False

    def _in_words(self, error: BaseException) -> BaseException:
        path = self._of.path
        if self._left is Left.PAGES:
            text = f"the guest at {path} runs here, and lacks pages that are at its source: {error}"
            return InDoubt(text, "at its source: vm-status tells how to go on")
        if self._left is Left.HELD:
            return self._in_doubt(error)
        if isinstance(error, VmstateError) and not self._of.process:
            error.hints = (*error.hints, self._of.waiting.outcome_text())
        return error

    def _in_doubt(self, error: BaseException) -> BaseException:
        """It is loaded, and its source has been told so."""
        path = self._of.path
        if isinstance(error, GuestGone):
            return GuestGone(f"{error}, when it had been loaded")
        why = "a signal came" if isinstance(error, Stopped) else str(error)
        settle = f"vm-migrate --recover {path} {markers.URI}"
        if self._of.phases.now in (Phase.GRANTED, Phase.ARRIVED):
            text = f"the guest at {path} was let go by its source, but does not run: {why}"
            return InDoubt(text, f"a disk image can be locked by the source: once that has ended, {settle}")
        text = f"the guest at {path} is loaded and held, and it is not known whether its source has let it go: {why}"
        return InDoubt(text, settle)

    # once it runs

    def _set_clock(self, state: str) -> None:
        """As with the announcement: what fails is a warning."""
        if state != "running" or not self._of.hello.clock:
            return
        from ..qemu import guest_agent

        try:
            with Monitor(self._of.path) as monitor:
                path = guest_agent.path_of(monitor)
            if path is None:
                raise CannotDo("it has no port for a guest agent")
            guest_agent.set_time(path)
        except VmstateError as error:
            self._of.report.warning(f"the clock of the guest was not set: {error}")
            self._of.report.hint("its clock stood still with it: set it inside, or let NTP do that")

    def _announce(self, state: str) -> None:
        """An announcement that fails is a warning: the guest runs."""
        if state != "running" or not self._of.may_announce:
            return
        from ..announce.announcer import AnnouncePlan, Announcer
        from ..announce.messages import Narrator
        from ..announce.rounds import schedule

        def fail(error: VmstateError) -> None:
            self._of.report.warning(f"the guest runs, but was not announced in the network: {error}")

        cards = [nic for nic in nics_of(self._of.waiting, self._of.report) if nic.iface]
        if not cards:
            return
        teller = Narrator(self._of.report, self._of.report.note, fail=fail)
        try:
            for happening in Announcer(AnnouncePlan(schedule(), guest=self._of.path)).run(cards):
                teller.tell(happening)
            teller.end()
        except VmstateError as error:
            fail(error)
        except OSError as error:
            fail(CannotDo(error.strerror or str(error)))
