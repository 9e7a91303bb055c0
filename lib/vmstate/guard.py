"""A process that puts things back when its parent dies without a word (kill -9).

QEMU lets a guest run on by itself when our socket closes, but it cannot know that `--stop` stopped the guest only for
us; and a sink takes the end of its input for the end of the state.  So a child, in a session of its own, holds the
sink's input open and waits for the parent's end: then it ends the sink's process group first, closes the input, and
lets the guest run on.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from .stage import end_group

WATCH, LET_GO, KEEP, DONE = b"w", b"l", b"k", b"d"
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT)


Drain = tuple[int, Callable[[], None]]


class Guard:
    """Start the child.  To be called before there are threads.

    path: the guest.  group: the process group of the sink, or None.  held: the sink's input, to be kept open.
    snapshot: a descriptor, to be kept open, and what takes what QEMU still sends there before anything is put back.
    undo: what else is to be undone, in the end.
    """

    def __init__(
        self,
        path: str,
        group: int | None = None,
        held: int | None = None,
        *,
        snapshot: Drain | None = None,
        undo: Callable[[], None] | None = None,
    ) -> None:
        theirs, self._ours = os.pipe()
        sys.stderr.flush()
        self._child = os.fork()
        if self._child == 0:
            _be_the_guard(theirs, _Duty(path, group, held, snapshot, undo))
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


@dataclass
class _Duty:
    """What the child keeps in mind, as `Guard` was given it."""

    path: str
    group: int | None
    held: int | None
    snapshot: Drain | None
    undo: Callable[[], None] | None


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
    if stopped:
        _put_back(duty)


def _close_held(duty: _Duty) -> None:
    if duty.held is not None:
        os.close(duty.held)
    duty.held = None


def _put_back(duty: _Duty) -> None:
    if duty.snapshot:
        _tidy(duty.path, duty.snapshot[1])
    # In a snapshot the guest goes on by itself, unless it was stopped for its disks.
    _run_on(duty.path)
    if duty.undo:
        with contextlib.suppress(Exception):
            duty.undo()


def _tidy(path: str, drain: Callable[[], None]) -> None:
    from . import guest

    with contextlib.suppress(Exception):
        drain()
    with contextlib.suppress(Exception):
        guest.wait_for(path, lambda s: not s.moving, 60, "to end its snapshot")
        guest.patiently(path, guest.tidy)


def _run_on(path: str) -> None:
    from . import guest

    with contextlib.suppress(Exception):
        standing = guest.wait_for(path, lambda s: not s.moving and s.run != "finish-migrate", 60, "to run on")
        if not standing.given_away:
            guest.patiently(path, guest.cont_in)
            guest.patiently(path, guest.tidy)
