"""A guest to another QEMU, over a channel that QEMU itself speaks on.

Where the channel has two directions the far end says how it fared, and a guest that did not arrive runs on here.
"""

import contextlib
import os
import time
from typing import Any, NamedTuple

from .. import stdio
from ..dump.live import Dump, DumpPlan, wakes_words
from ..dump.watchdog import Guard
from ..errors import CannotDo, GuestGone, InDoubt, Stopped, VmstateError, WrongUsage
from ..io.descriptors import kind
from ..progress import Progress, Sample
from ..qemu import claim, control, outgoing, sendable, state
from ..qemu.channel import ended
from ..qemu.limits import Limits
from ..qemu.migration_progress import sample_of, words_of
from ..qemu.run_states import RUNS
from ..qemu.state import GuestState
from ..report import Report
from ..rollback import Rollback
from ..signals import hold_signals, no_more_signals, release_signals
from .uri import Transport, transport_of

LOOK = 0.05
KINDS = "tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND, link:COMMAND or ssh://[USER@]HOST/GUEST"


class MigrationTarget(NamedTuple):
    """Where to: `uri` as QEMU knows it, `fd` to be handed to it, `command` for the shell, or `way` to a receiver."""

    uri: str
    fd: int | None = None
    command: str | None = None
    answers: bool = True
    transport: Transport | None = None


def target_of(uri: str) -> MigrationTarget:
    """WrongUsage for what is none of `KINDS`."""
    name, _, rest = uri.partition(":")
    if name == "tcp" and rest.rpartition(":")[2].isdigit() and rest.rpartition(":")[0]:
        return MigrationTarget(uri)
    if name == "unix" and rest:
        # QEMU may have another working directory.
        return MigrationTarget(f"unix:{os.path.abspath(rest)}")
    if name == "exec" and rest:
        return MigrationTarget(uri, command=rest)
    if name == "fd" and rest.isascii() and rest.isdecimal():
        return _descriptor(uri, int(rest))
    if transport := transport_of(uri):
        return MigrationTarget(uri, transport=transport)
    raise WrongUsage(f"'{uri}' is no place to move a guest to", f"expected {KINDS}")


def _descriptor(uri: str, fd: int) -> MigrationTarget:
    stdio.require(fd)
    try:
        return MigrationTarget(uri, fd, answers=kind(fd) == "socket")
    except OSError as error:
        hint = "open it in the shell, as in: vm-migrate a.qmp fd:3 3<>/dev/tcp/HOST/PORT"
        raise WrongUsage(f"{uri}: {os.strerror(error.errno or 0).lower()}", hint) from error


class MigratePlan(NamedTuple):
    """What to do: `rate` in bytes a second (None: as it is), `downtime` in ms, `after` 'paused' or 'quit'.

    on: further capabilities of QEMU.  timeout: in seconds, rounds: how often RAM is gone through; then it is cancelled.
    Over a link: `handover` seconds for the other side's word, a pipeline `through` which the data go, whether the other
    side is to `announce` the guest and set its `clock`; `log` is where the words of a detached move go.
    postcopy: when the limits are passed, let it cross over and fetch the rest of its pages then.
    live_anyway: do not pause the guest first where a live migration may lose pages.
    """

    path: str
    target: MigrationTarget
    after: str = "paused"
    rate: int | None = None
    downtime: int | None = None
    on: tuple[str, ...] = ()
    timeout: float | None = None
    rounds: int | None = None
    handover: float = 30.0
    through: str | None = None
    announce: bool = True
    log: str | None = None
    clock: bool = False
    postcopy: bool = False
    live_anyway: bool = False


class Move:
    """One move, from its plan to its outcome."""

    def __init__(self, plan: MigratePlan, report: Report, mode: str) -> None:
        self._plan = plan
        self._report = report
        self._mode = mode
        self._started = time.monotonic()
        self._guest_state: GuestState | None = None
        on = (("return-path",) if plan.target.answers else ()) + plan.on
        mark = {"uri": plan.target.uri}
        self._migration = outgoing.OutgoingMigration(
            plan.path, rate=plan.rate, downtime=plan.downtime, on=on, mark=mark
        )
        self._undo = Rollback(f"vm-status {plan.path}")
        # How the guest stands that was put back, as the end of a sentence.
        self._stands = ""

    def begin(self) -> None:
        """QEMU sends, and goes on by itself; what was set for it is put back in the end, whether we stay or not."""
        require_live(self._plan)
        hold_signals()
        self._guard = Guard(self._plan.path, self._migration.saved.owner)
        self._migration.watchdog = self._guard.pid
        self._undo.add("the watchdog", self._end_guard)
        self._undo.add("the guest", self._take_back)
        self._undo.add("the migration", self._cancel)
        try:
            self._migration.move(self._plan.target.uri, self._plan.target.fd)
        except BaseException as error:
            raise self._broken_off(error) from error
        if self._migration.wakes:
            self._report.warning(wakes_words(self._migration.wakes, self._plan.path))

    def detach(self) -> None:
        """QEMU goes on by itself, and the watchdog stays until it has ended."""
        self.begin()
        claim.leave_to_watchdog()

    def run(self) -> dict[str, Any]:
        """Until the guest has arrived; whatever goes wrong before, it runs on here."""
        self.begin()
        try:
            release_signals()
            with Progress(self._report, self._mode, self._sample):
                self._follow()
            self._arrived()
        except BaseException as error:
            raise self._broken_off(error) from error
        no_more_signals()
        self._report.settle()
        path = self._plan.path
        try:
            after = self._migration.completed()
        except VmstateError as error:
            raise InDoubt(f"the guest has arrived, but is not settled here: {error}", f"vm-status {path}") from error
        self._end_guard()
        return self._outcome(after, control.finish(path, self._plan.after))

    def _end_guard(self) -> None:
        """What we could not put back, the watchdog goes on trying."""
        self._guard.leave() if self._undo.trouble or not self._migration.saved.restored else self._guard.done()

    def _follow(self) -> None:
        """Look until it is over; CannotDo once it has taken too long."""
        while True:
            try:
                guest_state = self._guest_state = state.query_once(self._plan.path)
            except GuestGone:
                raise
            except VmstateError:
                # Another command has the monitor; QEMU does not need us.
                time.sleep(LOOK)
                continue
            if guest_state.at_rest:
                return
            if guest_state.run == "shutdown":
                raise self._migration.shut_down()
            if reason := too_long(self._plan, guest_state, self._started):
                raise CannotDo(reason, "a higher --downtime, --auto-converge or vm-speed may help")
            time.sleep(LOOK)

    def _arrived(self) -> None:
        guest_state = self._guest_state
        assert guest_state
        if guest_state.migration == "cancelled":
            raise CannotDo("the migration was cancelled")
        if not guest_state.given_away:
            reason = guest_state.reason or "the other QEMU did not take it, and says why on its standard error"
            raise CannotDo(f"the guest was not moved: {reason}")

    def _sample(self) -> Sample | None:
        return sample_of(self._guest_state) if self._guest_state and self._guest_state.moving else None

    def _broken_off(self, error: BaseException) -> BaseException:
        """Undo all; the error to raise, with what has become of the guest."""
        path, trouble = self._plan.path, self._undo.undo()
        for _, found in trouble:
            if isinstance(found, GuestGone):
                if self._guest_state and self._guest_state.run in RUNS:
                    # It was not in its last step: the other QEMU cannot have all of it.
                    return ended(path)
                return InDoubt(f"{found}, while its guest was moved", "look whether it arrived: vm-status there")
        if trouble and _is_moved(path):
            why = "a signal came" if isinstance(error, Stopped) else str(error)
            return InDoubt(f"{why}; but the guest had arrived before", f"vm-status {path}")
        if trouble:
            return self._undo.in_doubt(error)
        if not self._stands or not isinstance(error, VmstateError):
            return error
        return CannotDo(f"{error}{self._stands}", *error.hints)

    def _take_back(self) -> None:
        if self._migration.begun:
            self._stands = f"; the guest {words_of(self._migration.take_back().run)}"

    def _cancel(self) -> None:
        """Not in the last step: the other QEMU may let the guest run already, and its word be on the way."""
        path = self._plan.path
        if not self._migration.begun:
            return
        guest_state = state.with_retry(path, state.query)
        if guest_state.moving and guest_state.run != "finish-migrate":
            with contextlib.suppress(CannotDo):
                control.cancel(path)

    def _outcome(self, after: GuestState, state: str) -> dict[str, Any]:
        return {
            "guest": self._plan.path,
            "state": state,
            "uri": self._plan.target.uri,
            "bytes": after.ram.transferred if after.ram else None,
            "rounds": after.ram.round if after.ram else None,
            "seconds": round(time.monotonic() - self._started, 3),
            "downtime_ms": after.downtime,
        }


def too_long(plan: MigratePlan, guest_state: GuestState, started: float) -> str | None:
    """Which limit of the plan a move has passed that began at `started`; none in its last step."""
    return Limits(plan.timeout, plan.rounds).passed("the move", guest_state, started)


def require_live(plan: MigratePlan) -> None:
    """WrongUsage where the guest is to be paused first, and nobody of ours is at the other end to resume it."""
    if not plan.live_anyway:
        why = f"over {plan.target.uri} nobody could resume it, were it paused first"
        sendable.require_live(plan.path, why, "use link: or ssh://, over which it is paused first and resumed there")


def _is_moved(path: str) -> bool:
    try:
        return state.query_once(path).given_away
    except VmstateError:
        return False


def into_command(plan: MigratePlan, report: Report, mode: str) -> dict[str, Any]:
    """The move into a shell's command, whose exit status counts: a dump."""
    require_live(plan)
    limits = plan.rate, plan.downtime, plan.target.command
    dump = DumpPlan(plan.path, False, plan.after, *limits, live_anyway=plan.live_anyway)
    return {**Dump(dump, report, mode).run(), "uri": plan.target.uri}
