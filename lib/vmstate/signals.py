"""Signals that wait: what is begun is known before it can be undone, and what is undone is not interrupted."""

import contextlib
import os
import signal

from .errors import Stopped

PUT_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Held:
    """Whether signals have to wait, and the one that does."""

    held = False
    waiting: int | None = None


def hold_signals() -> None:
    """From here to `release_signals` a signal waits: what is begun must be known before it can be put back."""
    _Held.held = True


def release_signals() -> None:
    """Raises Stopped where a signal has been waiting."""
    _Held.held = False
    if _Held.waiting is not None:
        stop_on_signal(_Held.waiting, None)


def stop_on_signal(number: int, _frame: object) -> None:
    if _Held.held:
        _Held.waiting = number
        return
    # A second signal must not interrupt the putting back.
    no_more_signals()
    raise Stopped(number)


def no_more_signals() -> None:
    """From here on a signal comes too late, or would keep something from being put back."""
    for number in PUT_BACK:
        signal.signal(number, signal.SIG_IGN)


def step_back() -> None:
    """A guest runs again: it needs the processor more than what is left to do here."""
    with contextlib.suppress(OSError):
        os.nice(10)
