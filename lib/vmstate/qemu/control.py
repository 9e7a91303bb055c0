"""Verbs on a guest: stop, run, announce, cancel, end.  Each is a short conversation with its monitor."""

import contextlib

from ..errors import CannotDo, GuestGone, InDoubt, Refused, VmstateError
from . import answers, claim, markers, userfault
from .monitor import Monitor, StandsStill
from .run_states import RUNS, row_of
from .settings import ANNOUNCE, SNAPSHOT, clear_leftovers, left_behind
from .state import GuestState, lost_its_snapshot, query, wait_for, with_retry


def stop(path: str) -> GuestState:
    with Monitor(path) as monitor:
        guest_state = query(monitor)
        if guest_state.run == "inmigrate":
            raise CannotDo(f"the guest at {path} waits for a state: there is nothing to stop")
        monitor.ask("stop")
        return query(monitor)


def cancel(path: str) -> GuestState:
    """End the migration of a guest that still has its state; CannotDo where there is none, or it is too late."""
    with Monitor(path) as monitor:
        guest_state = query(monitor)
        if guest_state.run == "inmigrate":
            hint = "end the command that restores it; a QEMU that has begun to load cannot load again"
            raise CannotDo(f"the guest at {path} is the one that takes a state", hint)
        if not guest_state.moving:
            raise CannotDo(f"the guest at {path} is not migrating ({guest_state.migration})", f"vm-status {path}")
        on = answers.capabilities(monitor)
        if any(on.get(name) for name in SNAPSHOT):
            hint = "end the vm-dump that makes it, which lets QEMU come to its end"
            raise CannotDo(f"a snapshot of the guest at {path} is not cancelled: it may not survive that", hint)
        if guest_state.migration.startswith("postcopy"):
            text = f"the guest at {path} runs at its destination already ({guest_state.migration})"
            raise CannotDo(text, "from the switchover of postcopy on there is no way back")
        monitor.ask("migrate_cancel")
    guest_state = wait_for(path, lambda s: s.at_rest, 60, "to be cancelled")
    if guest_state.migration == "completed":
        raise CannotDo(f"the migration of the guest at {path} had completed before", f"vm-status {path}")
    return guest_state


def limit(path: str, rate: int) -> GuestState:
    """From now on a migration of the guest sends at most `rate` bytes a second; 0: as fast as it goes."""
    with Monitor(path) as monitor:
        monitor.ask("migrate-set-parameters", max_bandwidth=rate)
        return query(monitor)


def cont(path: str, force: bool = False) -> GuestState:
    """Let a guest run; CannotDo where it waits for a state, or QEMU refuses (a disk image locked by another).

    InDoubt where it was moved to another QEMU, unless `force`.  One whose snapshot has lost all who had to do with it
    (QEMU 7.2 leaves its pages protected) goes on; with `force` also where QEMU itself has come to wait for it.
    """
    try:
        with Monitor(path) as monitor:
            return _cont(monitor, path, force)
    except StandsStill as error:
        if not (force and error.protected):
            raise
        userfault.unprotect(error.pid)
        with contextlib.suppress(Refused):
            with_retry(path, clear_leftovers)
    return with_retry(path, lambda monitor: _cont(monitor, path, force))


def _cont(monitor: Monitor, path: str, force: bool) -> GuestState:
    guest_state, at_work = query(monitor), claim.another(monitor)
    # Of one that is at work QEMU lifts the protection in a moment.
    if not at_work and lost_its_snapshot(guest_state, monitor.pid()):
        userfault.unprotect(monitor.pid())
        clear_leftovers(monitor)
        return query(monitor)
    if guest_state.run == "inmigrate":
        raise CannotDo(f"the guest at {path} waits for a state: it cannot run yet", f"vm-restore {path} < STATE")
    found = markers.read(monitor)
    # One whose memory is being brought is where it belongs; not so one that waits for a file that can be read.
    if guest_state.moving and (markers.LAZY not in found or markers.HALTED in found):
        raise CannotDo(f"the guest at {path} is migrating ({guest_state.migration})", f"vm-status {path}")
    if not (row := row_of(guest_state.run)).cont:
        raise CannotDo(f"the guest at {path} {row.words}: it cannot run on", row.hint.format(path=path))
    if markers.OFF in found and guest_state.run == "postmigrate":
        raise CannotDo(f"the guest at {path} has shut down: it cannot run on", row_of("shutdown").hint)
    if not force:
        if at_work and not at_work.serves and guest_state.run != "running":
            raise at_work.refusal(path)
        markers.refuse(found, guest_state, path)
    markers.hold(monitor)
    after = cont_announced(monitor)
    markers.stay(monitor)
    if not after.moving and not at_work:
        with contextlib.suppress(Refused):
            clear_leftovers(monitor)
    return after


def cont_announced(monitor: Monitor) -> GuestState:
    before = query(monitor)
    after = run_on(monitor)
    # It was loaded and held, or comes back: the network may know it elsewhere.
    if before.migration == "completed" and before.run in ("paused", "postmigrate"):
        announce(monitor)
    return after


def announce(monitor: Monitor, rhythm: dict[str, int] | None = None) -> None:
    """Have the guest's cards speak up, in the rhythm of its parameters."""
    monitor.ask("announce-self", **(rhythm or rhythm_of(monitor)))


def rhythm_of(monitor: Monitor) -> dict[str, int]:
    """The rhythm of its parameters; for a guest that is being restored, as they were before."""
    had = answers.parameters(monitor)
    if left := left_behind(monitor):
        had = {**had, **left.parameters}
    values = {name: had.get(f"announce-{name}", ANNOUNCE[name]) for name in ANNOUNCE}
    # Who has set no rounds does not want QEMU's announcement; ours was asked for.
    return {**values, "rounds": values["rounds"] or ANNOUNCE["rounds"]}


def run_on(monitor: Monitor, rhythm: dict[str, int] | None = None) -> GuestState:
    """Let it run; Refused where QEMU does not.  rhythm: announce it just before, as QEMU does itself."""
    if rhythm:
        # Once it runs, it and the monitor want the same lock.
        with contextlib.suppress(CannotDo):
            announce(monitor, rhythm)
    monitor.ask("cont")
    guest_state = query(monitor)
    # Where an image cannot be taken, some versions answer well and stay paused.
    if guest_state.run not in RUNS:
        raise Refused("cont", f"the guest stays '{guest_state.run}'")
    return guest_state


def finish(path: str, after: str, found: str = "running") -> str:
    """What becomes of a guest whose state has been sent: 'paused', 'running' or 'quit'.  Gives the state reached.

    found: its run state before.  One that neither ran nor was paused by somebody is not let run.
    """
    if after == "running" and row_of(found).resumes:
        try:
            return cont(path).run
        except VmstateError as error:
            text = f"the state is whole, but the guest at {path} does not run on: {error}"
            raise InDoubt(text, f"vm-cont {path}") from error
    if after == "quit":
        try:
            with contextlib.suppress(GuestGone):
                with_retry(path, lambda monitor: monitor.ask("quit"))
        except VmstateError as error:
            text = f"the state is whole, but the guest at {path} was not ended: {error}"
            raise InDoubt(text, f"vm-status {path}") from error
        return "gone"
    return "paused"
