"""A guest that runs before its memory is read (`vm-restore --lazy`): from its plan to the moment in which it runs.

Here the part that talks to QEMU and the part that reads states meet.
"""

import contextlib
import time
from typing import NamedTuple

from ..deadline import Deadline
from ..errors import CannotDo, Damaged, GuestGone, InDoubt, Refused, VmstateError
from ..io.descriptors import channel
from ..qemu import answers, claim, markers
from ..qemu.incoming import NO_ROUNDS, Waiting, refusal, require_waiting
from ..qemu.launch import Process, check_arguments
from ..qemu.monitor import Monitor
from ..qemu.outgoing import NAME
from ..qemu.run_states import RUNS
from ..qemu.settings import prepare
from ..qemu.state import GuestState, odd_pages, query, query_once, with_retry
from ..report import Report
from ..rollback import Rollback
from ..signals import hold_signals, release_signals
from ..stream.identity import identity
from .compatibility import Against
from .lazy_plan import LazyPlan
from .lazy_resume import Resume
from .lazy_state import lazy_state
from .outcome import Outcome, left_over, nics_of
from .page_server import Lost
from .postcopy import NotLazy
from .served_guest import ServedGuest

# What may lie between us and QEMU: a request waits behind it.
ROOM = 128 << 10
STARTS = 60.0
SETTINGS = "the settings of QEMU"
EAGER = "restore all of it before it runs: vm-restore without --lazy, or --lazy-or-eager"


class Started(NamedTuple):
    """outcome: what `Restore.run` gives.  guest: its pages are being brought.  seconds: until it ran."""

    outcome: Outcome
    guest: ServedGuest
    seconds: float


class Lazy:
    """One lazy restore: `start` returns when the guest runs, its `guest.wait` when QEMU has everything.

    Signals wait in between.
    """

    def __init__(self, plan: LazyPlan, report: Report, fd: int) -> None:
        self._plan = plan
        self._report = report
        self._state = lazy_state(fd)
        if plan.disks:
            plan.disks.validate(self._state.state)
        if plan.used:
            plan.used.require_new(identity(self._state.state))
        self._rollback = Rollback(left_over(plan.path))

    def start(self) -> Started:
        """The guest runs (or stands, where it is to).  On failure a QEMU that we started is ended."""
        begun = time.monotonic()
        try:
            process = self._launch() if self._plan.command else None
            path = process.path if process else self._plan.path or ""
            if self._plan.resume:
                guest, state = Resume(path, self._state, self._plan, self._report, self._rollback).take_up()
            else:
                guest, state = self._begin(path, process)
        except BaseException as error:
            raise self._undone(error) from error
        seconds = time.monotonic() - begun
        nics = [] if self._plan.resume or state not in RUNS else nics_of(Waiting(path), self._report)
        if process and process.added:
            self._report.hint(f"the guest's monitor is {path}")
        saved = self._state.state
        return Started(Outcome(path, state, saved.runstate, saved.machine, saved.size, nics), guest, seconds)

    def _launch(self) -> Process:
        command, disks = self._plan.command, self._plan.disks
        check_arguments(command[1:])
        hold_signals()
        if disks:
            self._rollback.add("the disks", disks.undo)
            command = disks.prepare(command)
        process = Process(command)
        self._rollback.add("the QEMU that was started", process.end)
        release_signals()
        process.wait_until_it_answers()
        return process

    def _begin(self, path: str, process: Process | None) -> tuple[ServedGuest, str]:
        """The guest, and its run state."""
        run = self._state.state.runstate in RUNS if self._plan.run is None else self._plan.run
        self._require_fit(path)
        ours, theirs = channel(ROOM)
        guest = ServedGuest(path, self._state, self._plan, ours)
        self._rollback.add("the channel", guest.close)
        with theirs, Monitor(path) as monitor:
            claim.take(monitor, path, serves=True)
            require_waiting(monitor, path)
            hold_signals()
            self._rollback.add(SETTINGS, lambda: _settings_back(guest))
            self._set_up(monitor, guest, run)
            if self._plan.used:
                self._plan.used.note(identity(self._state.state))
            monitor.send_fd(NAME, theirs.fileno())
            Waiting.incoming(monitor)
            # From here on QEMU needs them, and is not to be had back.
            self._rollback.keep(SETTINGS)
            theirs.close()
            guest.serve(self._state.opening.stream())
            return guest, _until_it_runs(monitor, guest, process, run)

    def _require_fit(self, path: str) -> None:
        """Misfit where the guest is another one; NotLazy where it cannot run on pages that come later."""
        Against(path).whole(self._state.state)
        with Monitor(path) as monitor:
            if odd := odd_pages(monitor):
                raise NotLazy(f"the guest at {path} has pages that are not of 4 KiB: {', '.join(odd)}", EAGER)
            with contextlib.suppress(Refused):
                if shared := answers.shared_backends(monitor):
                    raise NotLazy(f"the guest at {path} has RAM that others share ({', '.join(shared)})", EAGER)

    def _set_up(self, monitor: Monitor, guest: ServedGuest, run: bool) -> None:
        markers.clear(monitor)
        silent = answers.parameters(monitor).get("announce-rounds") == 0
        if silent:
            self._report.note(NO_ROUNDS)
        try:
            prepare(monitor, ("postcopy-ram",), {"announce-rounds": 1} if silent else {}, guest.saved)
        except Refused as error:
            hint = "userfaultfd is for root, or after: sysctl vm.unprivileged_userfaultfd=1"
            raise NotLazy(f"this QEMU cannot load lazily here: {error.text}", hint, EAGER) from error
        markers.put(monitor, markers.LAZY, state=self._state.identity, on_demand=self._plan.on_demand)
        # Whether a guest runs that is loaded in this way is not in its state, but set here.
        monitor.ask("cont" if run else "stop")

    def _undone(self, error: BaseException) -> BaseException:
        """All of it, over an error: the one to raise."""
        # It may go on as an eager restore, which a signal ends.
        found = self._rollback.run(error, goes_on=isinstance(error, NotLazy))
        path = None if self._plan.resume else self._plan.path
        if path and isinstance(found, VmstateError) and not isinstance(error, InDoubt):
            found.hints = (*found.hints, Waiting(path).outcome_text())
        return found


def _settings_back(guest: ServedGuest) -> None:
    def put_back(monitor: Monitor) -> None:
        markers.remove(monitor, markers.LAZY)
        guest.saved.put_back(monitor)

    with contextlib.suppress(GuestGone):
        with_retry(guest.path, put_back)


def _until_it_runs(monitor: Monitor, guest: ServedGuest, process: Process | None, run: bool) -> str:
    """Its run state, once it runs, or stands as it is to; or stands because QEMU could not take its disks."""
    try:
        state = _loaded(monitor, guest)
    except VmstateError as error:
        # A QEMU that waits for a page does not answer; once the channel has ended, it ends over that.
        if isinstance(guest.error, Damaged):
            raise guest.error from error
        if isinstance(error, GuestGone | Lost):
            raise _refusal(error, guest.path, process) from error
        raise
    if run and state == "paused":
        guest.stands()
    else:
        guest.runs()
    return state


def _loaded(monitor: Monitor, guest: ServedGuest) -> str:
    for _ in Deadline(STARTS).tries(0.001):
        guest_state = query(monitor)
        if guest_state.migration == "failed":
            raise refusal(guest_state.reason, True)
        if guest_state.run in RUNS or (guest_state.run == "paused" and _crossed(guest_state)):
            return guest_state.run
        if guest.error:
            raise guest.error
    raise CannotDo(f"QEMU has not loaded the devices within {STARTS:.0f} s")


def _crossed(guest_state: GuestState) -> bool:
    return guest_state.migration in ("postcopy-active", "postcopy-paused", "completed")


def _refusal(error: VmstateError, path: str, process: Process | None) -> VmstateError:
    if process and not process.alive():
        return refusal(process.words(), True)
    with contextlib.suppress(VmstateError):
        guest_state = query_once(path)
        if guest_state.reason:
            return refusal(guest_state.reason, True)
    return refusal("", True) if isinstance(error, GuestGone) else error


def outcome_of(path: str, report: Report) -> Outcome:
    """What another process has restored."""
    state = query_once(path).run
    return Outcome(path, state, "", "", 0, nics_of(Waiting(path), report) if state in RUNS else [])
