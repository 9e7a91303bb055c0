"""A running guest's state to a sink, such that the guest runs on by itself until the sink is proven.

Here the part that talks to QEMU and the part that reads the stream meet.
"""

import contextlib
import errno
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import CannotDo, GuestGone, InDoubt, Refused, Stopped, VmstateError
from ..io.descriptors import channel, file_of
from ..io.output import Output
from ..io.pipeline import ShellPipeline
from ..progress import Progress
from ..qemu import control, outgoing, settings, state
from ..qemu.channel import QemuChannel
from ..qemu.limits import Limits
from ..qemu.migration_progress import sample, words_of
from ..qemu.monitor import Busy
from ..report import Report, size_words
from ..rollback import Rollback
from ..signals import hold_signals, no_more_signals, release_signals
from ..stream.description import claimed_runstate
from ..stream.records import Devices
from ..stream.validate import State
from .pacing import Pace
from .relay import Outgoing
from .watchdog import Drain, Guard

if TYPE_CHECKING:
    from ..checkpoint.create import Checkpoint, Wish


class DumpPlan(NamedTuple):
    """What to do: `rate` in bytes a second (None: as it is), `downtime` in ms, `to` a shell pipeline, `out` a file.

    disks: they are to belong to it, as of the same instant, in which the guest stands.  live_anyway: do not pause the
    guest first where a live migration may lose pages.  limits: then it is cancelled; without any, a guest that writes
    as fast as it is sent is paused for the rest.
    """

    path: str
    stop: bool = False
    after: str = "paused"
    rate: int | None = None
    downtime: int | None = None
    to: str | None = None
    out: str | None = None
    disks: "Wish | None" = None
    live_anyway: bool = False
    limits: Limits = Limits()


class Dump:
    """One dump, from its plan to its outcome."""

    CAPABILITIES = settings.ON

    def __init__(self, plan: DumpPlan, report: Report, mode: str) -> None:
        self._plan = plan
        self._report = report
        self._mode = mode
        # The disks belong to a state that is whole, and stay so.
        self._kept = False
        # QEMU has our word that all is well.
        self._told = False
        # Until the guest's state is on its way, so that `run` knows all that there is to undo.
        hold_signals()
        self._sink: Output | ShellPipeline = ShellPipeline(plan.to, "sink") if plan.to else Output(plan.out)
        self._migration = outgoing.OutgoingMigration(
            plan.path,
            rate=plan.rate,
            downtime=plan.downtime,
            on=self.CAPABILITIES,
            live_anyway=plan.live_anyway,
            ends=plan.after == "quit",
        )
        self._started = time.monotonic()
        try:
            self._ours, self._theirs = channel()
            self._disks = self._find_disks()
            self._guard = self._make_guard()
            self._migration.watchdog = self._guard.pid
            live = settings.ON == self.CAPABILITIES
            ended = self._run_on if live and plan.after == "running" else None
            channel_of_qemu = QemuChannel(plan.path, self._ours, self._may_ask)
            self._outgoing = Outgoing(channel_of_qemu, self._sink.fd, closing=not live, ended=ended)
        except BaseException:
            self._let_go_of_the_sink()
            raise
        # As the guest was found after it was taken back.
        self._after: state.GuestState | None = None
        self._rollback = Rollback(f"vm-status {plan.path}")
        self._rollback.add("the watchdog", self._leave_guard)
        self._rollback.add("the disks", self._undo_disks)
        self._rollback.add("the guest", self._take_back)
        self._rollback.add("the sink", self._let_go_of_the_sink)
        self._rollback.add("the channel", self._close_channel)

    def run(self) -> dict[str, Any]:
        """Send, prove, give away; the outcome as values.  Whatever goes wrong, the guest is put back first."""
        try:
            with self._pace(live=not self._plan.stop):
                state = self._send()
                self._migration.require_resumable(state.runstate, state.asleep)
                self._prove()
            self._write_down(state)
            # From here on there is nothing to put back: a signal comes too late.
            no_more_signals()
            if not self._told:
                self._tell()
        except BaseException as error:
            raise self._failed(error) from error
        self._report.settle()
        return self._finish(state)

    def _finish(self, state: State) -> dict[str, Any]:
        """QEMU completes, and the guest becomes what was wished."""
        path = self._plan.path
        try:
            downtime = self._migration.completed().downtime
        except VmstateError as error:
            self._guard.leave()
            raise InDoubt(
                f"the state is whole, but its guest did not complete: {error}", f"vm-status {path}"
            ) from error
        self._leave_guard()
        found = self._migration.saved.found
        stands = "running" if self._migration.ran_on else control.finish(path, self._plan.after, found)
        if stands == "paused" and self._plan.after == "running":
            self._report.warning(f"the guest at {path} was '{found}', and is not let run")
        return self._outcome(state, downtime, stands)

    def _run_on(self, devices: Devices) -> bool:
        """All of it has come: the guest need not wait until that is proven, for it runs on also where it is not."""
        if not self._migration.saved.ran or claimed_runstate(devices.data) != "running":
            # One that was paused stays so where it is not.
            return False
        # One that cannot run now, over a busy monitor or the lock of a disk image, is let run in the end.
        with contextlib.suppress(Busy, Refused):
            self._migration.run_on(self._tell)
        return self._told

    def _pace(self, live: bool) -> Pace:
        return Pace(self._plan.path, self._plan.limits, live, self._migration, self._report)

    def _may_ask(self) -> bool:
        """Whether the status of QEMU's migration is that of ours by now."""
        return True

    def _tell(self) -> None:
        self._outgoing.answer(0)
        self._told = True

    def _find_disks(self) -> "Checkpoint | None":
        if not self._plan.disks:
            return None
        from ..checkpoint.create import Checkpoint

        return Checkpoint(self._plan.path, self._plan.disks)

    @property
    def _undo(self) -> Callable[[], None] | None:
        """What the guard does about the disks, when we are gone."""
        return partial(self._disks.undo, sure=True) if self._disks else None

    @property
    def _drain(self) -> Drain | None:
        """What takes the rest of QEMU's bytes, where it must not be left with them."""
        return None

    def _make_guard(self) -> Guard:
        group, held = (self._sink.group, self._sink.fd) if isinstance(self._sink, ShellPipeline) else (None, None)
        owner = self._migration.saved.owner
        runs_on = self._plan.after == "running"
        return Guard(
            self._plan.path, owner, group=group, held=held, snapshot=self._drain, undo=self._undo, runs_on=runs_on
        )

    def _send(self) -> State:
        take = self._disks.take if self._disks else None
        if self._disks:
            state.with_retry(self._plan.path, self._migration.claim)
            # From here on there is something to undo.
            self._guard.watch()
            self._disks.prepare()
        self._migration.start(self._theirs.fileno(), stopped=self._plan.stop, take=take)
        self._theirs.close()
        release_signals()
        self._warn_of_waking()
        if self._migration.paused_first:
            self._report.warning(paused_first_words(self._migration.paused_first, self._plan.path, PAUSED_STATE))
        with Progress(self._report, self._mode, lambda: sample(self._plan.path)):
            return self._outgoing.run()

    def _warn_of_waking(self) -> None:
        if qemu := self._migration.wakes:
            self._report.warning(wakes_words(qemu, self._plan.path))

    def _prove(self) -> None:
        if isinstance(self._sink, Output):
            self._sink.settle()
        else:
            self._guard.let_go()
            self._sink.finish()

    def _write_down(self, state: State) -> None:
        """What belongs together, once all of it is there."""
        if self._disks:
            ran = self._migration.saved.ran
            out = self._plan.out if self._plan.out != "-" else None
            goes_on = self.CAPABILITIES == settings.SNAPSHOT or self._told
            self._disks.settle(state, ran, out or (None if self._plan.to else file_of(1)), goes_on)
            self._kept = True
            self._guard.keep()

    def _failed(self, error: BaseException) -> BaseException:
        """Undo all; the error to raise, with what has become of the guest."""
        trouble = self._rollback.undo()
        if trouble and self._disks and isinstance(error, VmstateError):
            written = [f"what the guest has written last is in {name}" for name in self._disks.overlays()]
            error.hints = (*error.hints, *written)
        # A guest that has ended cannot be put back, and need not be.
        if not all(isinstance(found.error, GuestGone) for found in trouble):
            return self._rollback.in_doubt(error)
        if isinstance(error, Stopped) or not isinstance(error, Exception):
            return error
        return self._explain(error, self._after)

    def _close_channel(self) -> None:
        self._ours.close()
        self._theirs.close()

    def _take_back(self) -> None:
        self._after = self._migration.take_back() if self._migration.begun else None

    def _undo_disks(self) -> None:
        if self._disks and not self._kept:
            self._disks.undo()

    def _leave_guard(self) -> None:
        """Where we did not get the guest to run on, or the settings back, the guard goes on trying."""
        trouble = self._rollback.trouble or not self._migration.saved.restored
        self._guard.leave() if trouble else self._guard.done()

    def _let_go_of_the_sink(self) -> None:
        if isinstance(self._sink, Output):
            self._sink.abandon()
        else:
            self._sink.end()

    def _explain(self, error: Exception, guest_state: state.GuestState | None) -> Exception:
        text = str(error)
        if isinstance(error, OSError):
            gone = isinstance(error, BrokenPipeError | ConnectionError)
            who = f"the sink '{self._plan.to}'" if self._plan.to else "the reader of standard output"
            text = f"{who} went away" if gone else f"cannot write the state: {error.strerror}"
            if error.errno == errno.ENOSPC:
                text += f" (after {size_words(self._outgoing.sent)})"
        elif not isinstance(error, VmstateError):
            return error
        if guest_state is None:
            return error if isinstance(error, VmstateError) else CannotDo(text)
        if guest_state.migration == "cancelled":
            text = "the migration was cancelled"
        elif text.startswith("QEMU gave up") and guest_state.reason not in text:
            text += f": {guest_state.reason}"
        stands = "" if self._migration.off else f"; the guest {words_of(guest_state.run)}"
        return CannotDo(text + stands, *(error.hints if isinstance(error, VmstateError) else ()))

    def _outcome(self, saved: State, downtime: float | None, state: str) -> dict[str, Any]:
        return {
            "guest": self._plan.path,
            "state": state,
            "saved": saved.runstate,
            "machine": saved.machine,
            "bytes": self._outgoing.sent,
            "devices": len(saved.parts),
            "seconds": round(time.monotonic() - self._started, 3),
            "downtime_ms": downtime,
        }


# What a state of a guest that was paused first is like.
PAUSED_STATE = "the state says paused: vm-restore --run has it run"


def paused_first_words(qemu: str, path: str, then: str) -> str:
    """Why the guest at `path` was paused before its state was sent live, and what follows."""
    why = f"{qemu} without KVM loses pages that a running guest writes meanwhile"
    return f"the guest at {path} was paused first, since {why} ({then}; --live-anyway sends it all the same)"


def wakes_words(qemu: str, path: str) -> str:
    """What happens to the guest at `path`, which sleeps."""
    return f"the guest at {path} sleeps (S3), and {qemu} wakes it when it goes on"
