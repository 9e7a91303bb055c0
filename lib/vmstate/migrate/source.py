"""A guest to another QEMU over a link, in two phases: no crash of any process loses it or has it run twice.

Source: docs/link.md, which has the conversation and what each side does when it breaks off.
"""

import contextlib
import os
import secrets
import socket
import time
from typing import Any

from ..dump.live import paused_first_words
from ..dump.relay import Outgoing
from ..dump.watchdog import Guard
from ..errors import CannotDo, Damaged, GuestGone, InDoubt, Misfit, Stopped, VmstateError
from ..io.descriptors import channel
from ..progress import Progress
from ..qemu import control, markers, outgoing, settings
from ..qemu.migration_progress import sample, words_of
from ..qemu.monitor import Monitor
from ..qemu.state import query, query_once, with_retry
from ..report import Report
from ..signals import hold_signals, no_more_signals, release_signals, step_back
from . import decision, filters, link, preflight, recover, remote
from .direct import MigratePlan
from .filters import Filter
from .link import LinkFrame
from .messages import Accepted, Loaded, Running
from .pacing import FIRST_PAUSE, Watch
from .postcopy_link import PostcopyBridge, finish_postcopy
from .remote import Peer
from .uri import Transport

# A receiver that has heard 'go' needs no more than this, if it is there at all.
RUNS = 10.0
# As in `destination`: a receiver loads the last of it at once.
SOON = 1.0


class OutgoingHandover:
    """One move, from its plan to its outcome."""

    def __init__(self, plan: MigratePlan, transport: Transport, report: Report, mode: str) -> None:
        self._plan = plan
        self._transport = transport
        self._report = report
        self._mode = mode
        self._started = time.monotonic()
        self._move = secrets.token_hex(8)
        self._ours, self._theirs = channel(link.ROOM)
        self._filter: Filter | None = None
        self._outgoing: Outgoing | PostcopyBridge | None = None
        self._bridge: PostcopyBridge | None = None
        self._sent = False
        self._given = False
        self._near: Monitor | None = None
        self._peer: Peer | None = None
        self._reason: VmstateError | None = None
        downtime = FIRST_PAUSE if plan.downtime is None else plan.downtime
        mark = {"uri": plan.target.uri, "move": self._move, **({"log": os.path.abspath(plan.log)} if plan.log else {})}
        on = ("return-path", *plan.on, *(("postcopy-ram",) if plan.postcopy else ()))
        self._migration = outgoing.OutgoingMigration(
            plan.path, rate=plan.rate, downtime=downtime, on=on, mark=mark, live_anyway=plan.live_anyway
        )
        self._guard: Guard | None = None

    def check(self) -> dict[str, Any]:
        """Ask both sides, and send nothing."""
        facts = self._facts()
        peer = self._open()
        try:
            findings = Accepted.of(peer.ask("check", **self._hello(facts))).findings
        finally:
            peer.leave()
        return {"guest": self._plan.path, "uri": self._plan.target.uri, "findings": findings, "ram": facts.get("ram")}

    def begin(self) -> None:
        """Both sides agree, and QEMU sends; whatever goes wrong, the guest is put back first."""
        if self._plan.postcopy and not self._plan.live_anyway:
            why = "--postcopy cannot pause it first"
            outgoing.require_live(self._plan.path, why, "without --postcopy it is paused first and resumed there")
        self._guard = Guard(self._plan.path, self._migration.saved.owner, move=self._move)
        try:
            self._agree()
            self._start()
        except BaseException as error:
            raise self._put_back(error) from error

    def run(self) -> dict[str, Any]:
        """Until the guest runs there; whatever goes wrong before it is granted, it runs on here."""
        try:
            if over := self._send() == "over":
                state = self._after_postcopy()
            else:
                self._await_loaded()
                # The point of no return is near, and a signal would be neither here nor there.
                no_more_signals()
                assert self._outgoing
                self._outgoing.answer(0)
        except BaseException as error:
            self._leave_monitor()
            raise self._put_back(error) from error
        return self._outcome(state if over else self._decide())

    # before

    def _facts(self) -> dict[str, Any]:
        with Monitor(self._plan.path) as monitor:
            guest_state = outgoing.require_sendable(monitor, self._plan.path)
            return {**preflight.facts(monitor), "run": settings.ran(monitor, guest_state)}

    def _open(self) -> Peer:
        hold_signals()
        self._peer = Peer(self._transport)
        release_signals()
        return self._peer

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

    def _agree(self) -> None:
        facts = self._facts()
        for finding in Accepted.of(self._open().ask("move", **self._hello(facts))).findings:
            if finding.level == "error":
                raise Misfit(finding.text, finding.hint)
            self._report.warning(finding.text)

    # sending

    def _start(self) -> None:
        peer = self._peer
        assert peer
        self._peer_hears(peer)
        if self._plan.through:
            hold_signals()
            self._filter = Filter(self._plan.through, peer)
            release_signals()
            self._outgoing = Outgoing(self._ours, self._filter.fd, whole=True)
        else:
            self._outgoing = self._bridge = PostcopyBridge(self._plan.path, self._ours, peer)
        hold_signals()
        assert self._guard
        self._migration.start(self._theirs.fileno(), stopped=False)
        release_signals()
        self._theirs.close()
        if self._migration.paused_first:
            self._report.warning(paused_first_words(self._migration.paused_first, self._plan.path, "it runs there"))

    def _peer_hears(self, peer: Peer) -> None:
        """A refusal in the midst of the data ends the sending."""

        def hear(frame: LinkFrame | None) -> bool:
            if frame is None or frame.kind == link.REFUSE:
                self._interrupt(None)
            return False

        peer.heard = hear

    def _interrupt(self, reason: VmstateError | None) -> None:
        """From another thread: `_send` ends over it, in the midst of a read of QEMU's bytes."""
        self._reason = self._reason or reason
        if reason and self._peer:
            # What we write may be stuck in it.
            self._peer.cut()
        if not self._sent:
            with contextlib.suppress(OSError):
                self._ours.shutdown(socket.SHUT_RDWR)

    def _send(self) -> str:
        """Until everything is sent; 'over' where it is there as well, the guest having crossed over in postcopy."""
        assert self._outgoing and self._peer
        watch = Watch(self._plan, self._outgoing, self._migration.saved, self._interrupt)
        if self._plan.postcopy:
            watch.switch = self._switch
        with Progress(self._report, self._mode, lambda: sample(self._plan.path)), watch:
            if self._bridge:
                came = self._bridge.run()
                self._sent = True
                return came
            assert isinstance(self._outgoing, Outgoing) and self._filter
            try:
                self._outgoing.run()
            except BrokenPipeError as error:
                raise self._filter.trouble() from error
            self._filter.finish()
        self._sent = True
        self._peer.tell(link.END, bytes=self._outgoing.sent)
        return "sent"

    def _switch(self) -> None:
        """In another thread: have QEMU go over to postcopy, which it does unless it is done before."""
        assert self._peer and self._bridge
        self._peer.tell(link.SWITCH)
        with Monitor(self._plan.path) as monitor:
            # Before, since behind it nobody may take it back.
            if markers.decide(monitor, markers.GRANTED, self._move) == markers.GRANTED:
                monitor.ask("migrate-start-postcopy")

    def _after_postcopy(self) -> str:
        assert self._peer
        no_more_signals()
        return finish_postcopy(self._plan.path, self._peer)

    # the decision

    def _await_loaded(self) -> None:
        """The guest stands still: the monitor is kept for what comes behind it, if not for long."""
        assert self._peer
        with contextlib.suppress(VmstateError):
            self._near = Monitor(self._plan.path).__enter__()
        try:
            frame = self._peer.expect(link.LOADED, min(SOON, self._plan.handover))
        except remote.Silent:
            self._leave_monitor()
            frame = self._peer.expect(link.LOADED, self._plan.handover)
        Loaded.of(frame)

    def _leave_monitor(self) -> None:
        if self._near:
            self._near.leave()
        self._near = None

    def _decide(self) -> str:
        """The state is loaded there and given away here: grant it, or take it back; where it runs then."""
        path, peer = self._plan.path, self._peer
        assert peer
        try:
            granted = self._grant(self._near) if self._near else with_retry(path, self._grant)
        except VmstateError as error:
            self._leave_monitor()
            if not (isinstance(error, GuestGone) and self._given):
                text = f"the guest is loaded there, and has not been let go here: {error}"
                raise InDoubt(text, self._recover_words(), self._there_words()) from error
            # Its QEMU died when it had been seen to have given it away: the other one is the only one.
            self._report.warning(f"the QEMU of {path} has ended; its guest goes on there")
            granted = True
        if not granted:
            self._leave_monitor()
            self._leave(back=True)
            why = "the link was lost" if peer.lost else "the move was cancelled"
            raise CannotDo(f"{why} before the guest was let go; it {words_of(query_once(path).run)}")
        try:
            peer.tell(link.GO, move=self._move)
            step_back()
            # Leaving takes time, and others may want it now.
            self._leave_monitor()
            state = Running.of(peer.expect(link.RUNNING, RUNS)).state
        except Exception as error:  # noqa: BLE001 - whatever it is, the guest has been granted
            self._leave_monitor()
            state = self._settle(error)
        self._report.note("the other side lets it run")
        return state

    def _grant(self, monitor: Monitor) -> bool:
        """In one conversation, so that nobody can take the guest back meanwhile."""
        assert self._peer
        give_up = time.monotonic() + 60
        while (guest_state := query(monitor)).moving or guest_state.run == "finish-migrate":
            if time.monotonic() > give_up:
                raise CannotDo("QEMU does not complete")
            time.sleep(0.001)
        if not guest_state.given_away:
            self._migration.taken_back(monitor)
            return False
        if self._peer.lost and decision.take_back_given(monitor):
            self._migration.saved.put_back(monitor)
            return False
        self._given = True
        return markers.decide(monitor, markers.GRANTED, self._move) == markers.GRANTED

    def _settle(self, error: Exception) -> str:
        """The link was lost behind the grant: ask anew."""
        assert self._peer
        self._peer.cut()
        give_up = time.monotonic() + self._plan.handover
        while True:
            try:
                return recover.go(self._transport, self._move)
            except VmstateError as trouble:
                if time.monotonic() > give_up or isinstance(trouble, InDoubt):
                    text = f"the guest was given away, and whether it runs there is not known: {error}; {trouble}"
                    raise InDoubt(text, self._recover_words()) from trouble
            time.sleep(0.5)

    def _there_words(self) -> str:
        return "where this QEMU is gone, on the other side: vm-status there tells how to let the guest go on"

    def _recover_words(self) -> str:
        return markers.recover_command(self._plan.path, {markers.MOVED: {"uri": self._plan.target.uri}})

    # after

    def _put_back(self, error: BaseException) -> BaseException:
        """Undo all; the error to raise, with what has become of the guest."""
        no_more_signals()
        if self._plan.postcopy and (crossed := self._crossed(error)):
            return crossed
        for end in (self._ours, self._theirs):
            end.close()
        if self._filter:
            self._filter.end()
        guest_state, trouble = None, None
        try:
            guest_state = self._migration.take_back() if self._migration.begun else None
        except VmstateError as found:
            trouble = found
        self._end_guard(trouble)
        error = self._reason_for(error)
        self._leave(back=not trouble)
        if trouble:
            gone = isinstance(trouble, GuestGone)
            words = str(trouble) if gone else f"the guest could not be put back: {trouble}"
            return InDoubt(f"{error}; and {words}", self._there_words() if gone else f"vm-status {self._plan.path}")
        if isinstance(error, Stopped) or not isinstance(error, Exception):
            return error
        if not isinstance(error, VmstateError):
            return error
        if guest_state:
            error.args = (f"{error}; the guest {words_of(guest_state.run)}",)
        return error

    def _end_guard(self, trouble: VmstateError | None = None) -> None:
        if self._guard:
            self._guard.leave() if trouble or not self._migration.saved.restored else self._guard.done()
        self._guard = None

    def _crossed(self, error: BaseException) -> VmstateError | None:
        """From the switchover on the guest is there, and its pages here: nothing can be undone."""
        path = self._plan.path
        try:
            guest_state = query_once(path)
        except GuestGone as gone:
            return InDoubt(f"{gone}, when its guest may have crossed over", "without it the guest is lost: restore it")
        except VmstateError:
            return None
        if not guest_state.migration.startswith("postcopy"):
            return None
        self._ours.close()
        assert self._peer
        self._peer.cut()
        why = "a signal came" if isinstance(error, Stopped) else self._reason_for(error)
        text = f"the guest runs on the other side, and the link to its pages is lost: {why}"
        return InDoubt(text, self._recover_words())

    def _reason_for(self, error: BaseException) -> BaseException:
        """What came first: a limit of ours, the other side's refusal, the end of the link."""
        if not isinstance(error, OSError | CannotDo | Damaged) or self._peer is None:
            return error
        if self._reason:
            return self._reason
        if said := self._peer.refusal():
            return said
        lost = isinstance(error, OSError) or (self._peer.lost and self._migration.begun)
        return self._peer.gone() if lost else error

    def _leave(self, *, back: bool) -> None:
        """Say cancel, but only where the guest is known to be back: the other side may have the only whole one."""
        if not self._peer:
            return None
        if not back:
            return self._peer.cut()
        if self._sent or not self._migration.begun:
            with contextlib.suppress(VmstateError):
                self._peer.tell(link.CANCEL)
        # In the midst of a frame there is nothing to say; the end of the link says the same.
        self._peer.leave()
        said = self._peer.refusal()
        if self._migration.begun and said and not isinstance(said, InDoubt):
            # It holds no guest, so nobody will ask whether it may run.
            with contextlib.suppress(VmstateError):
                with_retry(self._plan.path, lambda monitor: markers.forget(monitor, self._move))
        return None

    def _outcome(self, state: str) -> dict[str, Any]:
        path, info, here = self._plan.path, {}, "gone"
        assert self._outgoing and self._peer
        seconds = round(time.monotonic() - self._started, 3)
        # The guest has arrived, whatever becomes of this.
        with contextlib.suppress(VmstateError):
            info = with_retry(path, self._after_all)
        self._end_guard()
        with contextlib.suppress(GuestGone):
            here = control.finish(path, self._plan.after)
        self._peer.leave()
        return {
            "guest": path,
            "state": here,
            "there": state,
            "uri": self._plan.target.uri,
            "bytes": self._outgoing.sent,
            "rounds": info.get("ram", {}).get("dirty-sync-count"),
            "seconds": seconds,
            "downtime_ms": info.get("downtime"),
        }

    def _after_all(self, monitor: Monitor) -> dict[str, Any]:
        decision.heard(monitor, self._move)
        self._migration.saved.put_back(monitor)
        return query(monitor).info
