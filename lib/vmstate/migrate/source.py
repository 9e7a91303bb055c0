"""A guest to another QEMU over a link, in two phases: no crash of any process loses it or has it run twice.

Source: docs/link.md, which has the conversation and what each side does when it breaks off.
"""

import contextlib
import os
import socket
import time
from typing import Any

from ..dump.watchdog import Guard
from ..errors import CannotDo, Damaged, GuestGone, InDoubt, Misfit, Stopped, VmstateError
from ..qemu import control, outgoing, sendable, settings
from ..qemu.channel import ended
from ..qemu.migration_progress import words_of
from ..qemu.monitor import Monitor
from ..qemu.state import GuestState, query, query_once, with_retry
from ..report import Report
from ..rollback import Rollback
from ..signals import hold_signals, no_more_signals, release_signals
from . import decision, filters, preflight, proof
from .direct import MigratePlan
from .handover import GUEST, LINK, THERE, WATCHDOG, Handover, Phase
from .messages import Accepted
from .near import NearMonitor
from .pacing import FIRST_PAUSE
from .postcopy_link import finish_postcopy
from .remote import Peer
from .source_commit import await_loaded, decide, leave
from .source_send import Sending
from .uri import Transport


class OutgoingHandover:
    """One move, from its plan to its outcome: `begin`, then `run`; or `check` alone."""

    def __init__(self, plan: MigratePlan, transport: Transport, report: Report, mode: str) -> None:
        self._plan = plan
        self._transport = transport
        self._report = report
        self._mode = mode
        self._started = time.monotonic()
        self._move, self._secret = os.urandom(8).hex(), proof.draw()
        self._undo = Rollback(f"vm-status {plan.path}")
        # How the guest stands that was put back, as the end of a sentence.
        self._stands = ""

    def check(self) -> dict[str, Any]:
        """Ask both sides, and send nothing."""
        facts = self._facts()
        hold_signals()
        peer = Peer(self._transport)
        release_signals()
        try:
            findings = Accepted.of(peer.ask("check", **self._hello(facts))).findings
        finally:
            peer.leave()
        return {"guest": self._plan.path, "uri": self._plan.target.uri, "findings": findings, "ram": facts.get("ram")}

    def begin(self) -> None:
        """Both sides agree, and QEMU sends; whatever goes wrong, the guest is put back first."""
        if self._plan.postcopy and not self._plan.live_anyway:
            why = "--postcopy cannot pause it first"
            sendable.require_live(self._plan.path, why, "without --postcopy it is paused first and resumed there")
        migration = self._new_migration()
        self._guard = Guard(self._plan.path, migration.saved.owner, move=self._move)
        migration.watchdog = self._guard.pid
        self._undo.add(WATCHDOG, lambda: self._end_guard(migration))
        try:
            facts = self._facts()
            self._of = self._open(migration)
        except BaseException as error:
            raise self._undo.run(error) from error
        try:
            self._agree(facts)
            self._sending = self._new_sending()
            self._sending.start()
        except BaseException as error:
            raise self._broken_off(error) from error

    def run(self) -> dict[str, Any]:
        """Until the guest runs there; whatever goes wrong before it is granted, it runs on here."""
        of = self._of
        try:
            self._sending.carry(self._mode)
            if crossed := of.phases.now is Phase.CROSSED:
                no_more_signals()
                state = finish_postcopy(self._plan.path, of.peer)
            else:
                await_loaded(of)
                # The point of no return is near, and a signal would be neither here nor there.
                no_more_signals()
                self._sending.way.answer(0)
                of.phases.go(Phase.LOADED)
        except BaseException as error:
            raise self._broken_off(error) from error
        state = state if crossed else decide(of)
        self._report.settle()
        return self._outcome(state)

    # before

    def _new_migration(self) -> outgoing.OutgoingMigration:
        plan = self._plan
        downtime = FIRST_PAUSE if plan.downtime is None else plan.downtime
        mark = {"uri": plan.target.uri, "move": self._move, "secret": self._secret}
        mark |= {"log": os.path.abspath(plan.log)} if plan.log else {}
        on = ("return-path", *plan.on, *(("postcopy-ram",) if plan.postcopy else ()))
        return outgoing.OutgoingMigration(
            plan.path, rate=plan.rate, downtime=downtime, on=on, mark=mark, live_anyway=plan.live_anyway
        )

    def _facts(self) -> dict[str, Any]:
        with Monitor(self._plan.path) as monitor:
            guest_state = sendable.require_sendable(monitor, self._plan.path)
            return {**preflight.facts(monitor), "run": settings.ran(monitor, guest_state)}

    def _open(self, migration: outgoing.OutgoingMigration) -> Handover:
        hold_signals()
        peer = Peer(self._transport)
        near = NearMonitor(self._plan.path)
        which = self._move, self._secret
        of = Handover(self._plan, self._transport, self._report, *which, peer, migration, near, self._undo)
        self._undo.add(LINK, lambda: leave(of))
        release_signals()
        return of

    def _hello(self, facts: dict[str, Any]) -> dict[str, Any]:
        return {
            "move": self._move,
            "facts": facts,
            "run": facts["run"],
            "through": filters.names(self._plan.through),
            "announce": self._plan.announce,
            "clock": self._plan.clock,
            "postcopy": self._plan.postcopy,
            "from": {"host": socket.gethostname(), "path": os.path.realpath(self._plan.path)},
        }

    def _agree(self, facts: dict[str, Any]) -> None:
        accepted = self._of.peer.ask("move", secret=self._secret, **self._hello(facts))
        for finding in Accepted.of(accepted).findings:
            if finding.level == "error":
                raise Misfit(finding.text, finding.hint)
            self._report.warning(finding.text)

    def _new_sending(self) -> Sending:
        # Below what lets go of QEMU, since that is what has it run on.
        self._undo.add(GUEST, self._take_back)
        return Sending(self._of)

    # when it breaks off

    def _take_back(self) -> None:
        if not self._of.migration.begun:
            return
        try:
            guest_state = self._of.migration.take_back()
        except GuestGone as gone:
            raise GuestGone(str(gone), THERE) from gone
        self._stands = f"; the guest {words_of(guest_state.run)}"

    def _broken_off(self, error: BaseException) -> BaseException:
        """Undo all; the error to raise, with what has become of the guest."""
        no_more_signals()
        if crossed := self._crossed(error):
            return crossed
        # While the link is there, it can be asked why.
        self._undo.undo(until=LINK)
        error = self._reason_for(error)
        if self._undo.undo():
            return self._gone() or self._undo.in_doubt(error)
        if isinstance(error, VmstateError):
            error.args = (f"{error}{self._stands}",)
        return error

    def _end_guard(self, migration: outgoing.OutgoingMigration) -> None:
        """What we could not put back, the watchdog goes on trying."""
        self._guard.leave() if self._undo.trouble or not migration.saved.restored else self._guard.done()

    def _crossed(self, error: BaseException) -> VmstateError | None:
        """From the switchover on the guest is there, and its pages here: nothing can be undone."""
        path, of = self._plan.path, self._of
        if not self._plan.postcopy or of.phases.now is Phase.ASKING:
            return None
        try:
            guest_state = query_once(path)
        except GuestGone as gone:
            return InDoubt(f"{gone}, when its guest may have crossed over", "without it the guest is lost: restore it")
        except VmstateError:
            return None
        if not guest_state.migration.startswith("postcopy"):
            return None
        self._sending.let_go()
        of.peer.cut()
        why = "a signal came" if isinstance(error, Stopped) else self._reason_for(error)
        text = f"the guest runs on the other side, and the link to its pages is lost: {why}"
        return InDoubt(text, of.recover_words())

    def _gone(self) -> GuestGone | None:
        """The error where QEMU has ended with a guest that the other side does not have; None where it may have it."""
        of = self._of
        said = of.peer.refusal()
        if not of.gone or (of.migration.begun and (said is None or isinstance(said, InDoubt))):
            return None
        return ended(self._plan.path)

    def _reason_for(self, error: BaseException) -> BaseException:
        """What came first: a limit of ours, the other side's refusal, the end of the link."""
        of = self._of
        if not isinstance(error, OSError | CannotDo | Damaged):
            return error
        if of.reasons:
            return of.reasons[0]
        if said := of.peer.refusal():
            return said
        lost = isinstance(error, OSError) or (of.peer.lost and of.migration.begun)
        return of.peer.gone() if lost else error

    # after

    def _outcome(self, state: str) -> dict[str, Any]:
        path, of, after, here = self._plan.path, self._of, None, "gone"
        seconds = round(time.monotonic() - self._started, 3)
        # The guest has arrived, whatever becomes of this.
        with contextlib.suppress(VmstateError):
            after = with_retry(path, self._after_all)
        self._end_guard(of.migration)
        with contextlib.suppress(GuestGone):
            here = control.finish(path, self._plan.after)
        of.peer.leave()
        return {
            "guest": path,
            "state": here,
            "there": state,
            "uri": self._plan.target.uri,
            "bytes": self._sending.way.sent,
            "rounds": after.ram.round if after and after.ram else None,
            "seconds": seconds,
            "downtime_ms": after.downtime if after else None,
        }

    def _after_all(self, monitor: Monitor) -> GuestState:
        decision.heard(monitor, self._move)
        self._of.migration.saved.put_back(monitor)
        return query(monitor)
