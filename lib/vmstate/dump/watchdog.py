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
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from ..io.pipeline import end_group

if TYPE_CHECKING:
    from ..qemu.monitor import Monitor
    from ..qemu.state import GuestState

WATCH, LET_GO, KEEP, DONE = b"w", b"l", b"k", b"d"
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT)


Drain = tuple[int, Callable[[], None]]


@dataclass
class _Duty:
    """What the child keeps in mind, as `Guard` was given it."""

    path: str
    owner: str
    move: str | None = None
    group: int | None = None
    held: int | None = None
    snapshot: Drain | None = None
    undo: Callable[[], None] | None = None


class Guard:
    """Start the child.  To be called before there are threads.

    path: the guest.  owner: of the settings that are to be put back (`settings.SavedSettings`).  move: the number of
    the move.
    group: the process group of the sink, or None.  held: the sink's input, to be kept open.
    snapshot: a descriptor, to be kept open, and what takes what QEMU still sends there before anything is put back.
    undo: what else is to be undone, in the end.
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
    ) -> None:
        theirs, self._ours = os.pipe()
        sys.stderr.flush()
        self._child = os.fork()
        if self._child == 0:
            _be_the_guard(theirs, _Duty(path, owner, move, group, held, snapshot, undo))
        os.close(theirs)

    def watch(self) -> None:
        """From now on there is something to put back: the guest stands still only because of us."""
        os.write(self._ours, WATCH)

    def let_go(self) -> None:
        """The sink has every byte: its input may end."""
        os.write(self._ours, LET_GO)

    def keep(self) -> None:
        """What else was done belongs to something whole: it stays."""
        os.write(self._ours, KEEP)

    def leave(self) -> None:
        """Something is left to put back that we could not."""
        os.close(self._ours)

    def done(self) -> None:
        """Nothing is left to put back."""
        with contextlib.suppress(OSError):
            os.write(self._ours, DONE)
        os.close(self._ours)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._child, 0)


def _be_the_guard(control: int, duty: _Duty) -> NoReturn:
    try:
        os.setsid()
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        kept = [control, duty.held, duty.snapshot and duty.snapshot[0]]
        _close_all_but({fd for fd in kept if fd is not None})
        _guard(control, duty)
    finally:
        os._exit(0)


def _close_all_but(kept: set[int]) -> None:
    at = 0
    for fd in sorted(kept):
        os.closerange(at, fd)
        at = fd + 1
    os.closerange(at, 4096)


def _guard(control: int, duty: _Duty) -> None:
    stopped = False
    while word := os.read(control, 1):
        if word == DONE:
            return
        if word == WATCH:
            stopped = True
        if word == KEEP:
            duty.undo = None
        if word == LET_GO:
            _close_held(duty)
    if duty.group is not None:
        end_group(duty.group)
    _close_held(duty)
    _put_back(duty, stopped)


def _close_held(duty: _Duty) -> None:
    if duty.held is not None:
        os.close(duty.held)
    duty.held = None


def _put_back(duty: _Duty, stopped: bool) -> None:
    from ..qemu import state

    with contextlib.suppress(Exception):
        if duty.snapshot and stopped:
            duty.snapshot[1]()
    with contextlib.suppress(Exception):
        # However long that takes: the wait ends with the QEMU.
        state.wait_for(duty.path, _is_over, state.FOR_EVER, "to end its migration", slowest=0.5)
        state.with_retry(duty.path, lambda monitor: _settle(monitor, duty, stopped), state.FOR_EVER)
    with contextlib.suppress(Exception):
        if duty.undo and stopped:
            duty.undo()


def _is_over(guest_state: "GuestState") -> bool:
    return not guest_state.moving and guest_state.run != "finish-migrate"


def _settle(monitor: "Monitor", duty: _Duty, stopped: bool) -> None:
    from ..qemu import control, markers, settings, state

    guest_state, left = state.query(monitor), settings.left_behind(monitor)
    ours = left is not None and left.owner == duty.owner
    if not _is_over(guest_state) or (left and not ours):
        # Another command has the guest now.
        return
    if not guest_state.given_away:
        if ours and markers.MOVED in markers.names(monitor):
            markers.keep(monitor, duty.move)
        # In a snapshot the guest goes on by itself, unless it was stopped for its disks.
        if stopped and guest_state.run in ("paused", "postmigrate"):
            control.cont_announced(monitor)
    settings.clear_leftovers(monitor, duty.owner)
