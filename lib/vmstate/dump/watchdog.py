"""A process that puts things back when its parent dies without a word (kill -9).

QEMU lets a guest run on by itself when our socket closes, but it cannot know that `--stop` stopped the guest only for
us, nor what we have changed in its settings; and a sink takes the end of its input for the end of the state.  So a
child, in a session of its own, holds the sink's input open and waits for the parent's end: then it ends the sink's
process group first, closes the input, waits for the end of QEMU's migration, puts the settings back, and lets the guest
run on.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ..errors import CannotDo, Refused
from ..io.pipeline import end_group

if TYPE_CHECKING:
    from ..qemu.monitor import Monitor
    from ..qemu.state import GuestState
    from ..rollback import Rollback

WATCH, LET_GO, KEEP, DONE = b"w", b"l", b"k", b"d"
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT)


# Seconds behind each try to have a guest run.
TRIES = (1, 5, 25, 0)
Drain = tuple[int, Callable[[], None]]


class _Duty(NamedTuple):
    """What the child keeps in mind, as `Guard` was given it."""

    path: str
    owner: str
    move: str | None
    group: int | None
    held: int | None
    snapshot: Drain | None
    undo: Callable[[], None] | None
    runs_on: bool


class Guard:
    """Start the child.  To be called before there are threads.

    path: the guest.  owner: of the settings that are to be put back (`settings.SavedSettings`).  move: the number of
    the move.
    group: the process group of the sink, or None.  held: the sink's input, to be kept open.
    snapshot: a descriptor, to be kept open, and what takes what QEMU still sends there before anything is put back.
    undo: what else is to be undone, in the end.  runs_on: the guest is to run on once its state has been taken, too.
    """

    def __init__(
        self,
        path: str,
        owner: str,
        *,
        move: str | None = None,
        group: int | None = None,
        held: int | None = None,
        snapshot: Drain | None = None,
        undo: Callable[[], None] | None = None,
        runs_on: bool = False,
    ) -> None:
        theirs, self._ours = os.pipe()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_guard(theirs, _Duty(path, owner, move, group, held, snapshot, undo, runs_on))
        os.close(theirs)

    def watch(self) -> None:
        """From now on there is a snapshot to be taken to its end, or disks to be undone."""
        try:
            os.write(self._ours, WATCH)
        except BrokenPipeError as error:
            raise CannotDo("the process that watches over the guest has ended") from error

    def let_go(self) -> None:
        """The sink has every byte: its input may end."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._ours, LET_GO)

    def keep(self) -> None:
        """What else was done belongs to something whole: it stays."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._ours, KEEP)

    def leave(self) -> None:
        """Something is left to put back that we could not."""
        from ..qemu import claim

        claim.leave_to_watchdog()
        os.close(self._ours)

    def done(self) -> None:
        """Nothing is left to put back."""
        with contextlib.suppress(OSError):
            os.write(self._ours, DONE)
        os.close(self._ours)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _be_the_guard(control: int, duty: _Duty) -> NoReturn:
    try:
        os.setsid()
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        kept = [control, duty.held, duty.snapshot and duty.snapshot[0]]
        _close_all_but({fd for fd in kept if fd is not None})
        _guard(control, duty)
        from ..qemu import claim

        claim.release(duty.path)
    finally:
        os._exit(0)


def _close_all_but(kept: set[int]) -> None:
    at = 0
    for fd in sorted(kept):
        os.closerange(at, fd)
        at = fd + 1
    os.closerange(at, os.sysconf("SC_OPEN_MAX"))


def _guard(control: int, duty: _Duty) -> None:
    begun, held = False, duty.held
    while word := os.read(control, 1):
        if word == DONE:
            return
        if word == WATCH:
            begun = True
        if word == KEEP:
            duty = duty._replace(undo=None)
        if word == LET_GO:
            _close(held)
            held = None
    if duty.group is not None:
        end_group(duty.group)
    _close(held)
    _rollback(duty, begun).undo()


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _rollback(duty: _Duty, begun: bool) -> "Rollback":
    from ..rollback import Rollback

    rollback = Rollback(f"vm-status {duty.path}")
    if duty.undo and begun:
        rollback.add("the disks", duty.undo)
    rollback.add("the guest", lambda: _put_guest_back(duty))
    if duty.snapshot and begun:
        rollback.add("the snapshot", duty.snapshot[1])
    return rollback


def _put_guest_back(duty: _Duty) -> None:
    """However long that takes: the wait ends with the QEMU."""
    from ..qemu import markers, settings, state

    # One that has crossed over is for `vm-migrate --recover`, which puts back the settings as well.
    over = ("postcopy-paused",)
    ends, off = "to end its migration", []

    def at_rest(found: "GuestState") -> bool:
        if found.run == "shutdown" and found.moving:
            off.append(found)
        return found.at_rest or found.migration in over

    state.wait_for(duty.path, at_rest, state.FOR_EVER, ends, slowest=0.2)
    if off:
        # QEMU forgets behind its migration that it may not run on.
        with contextlib.suppress(Refused):
            state.with_retry(duty.path, lambda monitor: markers.put(monitor, markers.OFF), state.FOR_EVER)
    _resume(duty)
    state.with_retry(duty.path, lambda monitor: settings.clear_leftovers(monitor, duty.owner), state.FOR_EVER)


def _resume(duty: _Duty) -> None:
    """Have the guest run where our parent has paused it; a disk image that is locked may be free a moment later."""
    from ..qemu import state

    for pause in TRIES:
        with contextlib.suppress(Refused):
            state.with_retry(duty.path, lambda monitor: _settle(monitor, duty), state.FOR_EVER)
            break
        time.sleep(pause)


def _settle(monitor: "Monitor", duty: _Duty) -> None:
    from ..qemu import control, markers, settings, state
    from ..qemu.run_states import row_of

    guest_state, left = state.query(monitor), settings.left_behind(monitor)
    if not left or left.owner != duty.owner or not guest_state.at_rest:
        # All is as it was, or another command has the guest now.
        return
    found = markers.names(monitor)
    if guest_state.given_away and not (duty.runs_on and row_of(left.found or "running").resumes):
        return
    if markers.OFF in found:
        return
    if markers.MOVED in found:
        markers.keep(monitor, duty.move)
    if (left.stopped and guest_state.run in ("paused", "postmigrate")) or guest_state.given_away:
        control.cont_announced(monitor)
