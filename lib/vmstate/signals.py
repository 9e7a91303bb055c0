"""Signals that wait: what is begun is known before it can be undone, and what is undone is not interrupted.

A deadline of our own interrupts the main thread in the same way, whatever it waits for.
"""

import contextlib
import os
import signal

from .errors import Stopped

PUT_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One that does nothing to whoever does not listen to it
INTERRUPT = signal.SIGURG


class _Held:
    """Whether signals have to wait, and what the one that does is to raise; what an interruption is to raise."""

    held = False
    waiting: BaseException | None = None
    reason: Exception | None = None


def hold_signals() -> None:
    """From here to `release_signals` a signal waits: what is begun must be known before it can be put back."""
    _Held.held = True


def release_signals() -> None:
    """Raises Stopped where a signal has been waiting, or the reason of an interruption."""
    _Held.held = False
    if _Held.waiting is not None:
        _raise(_Held.waiting)


def stop_on_signal(number: int, _frame: object) -> None:
    _raise(Stopped(number))


def hear_interruptions() -> None:
    """To be called in the main thread before `interrupt`; in another one there is nothing to hear."""
    with contextlib.suppress(ValueError):
        signal.signal(INTERRUPT, _on_interrupt)


def interrupt(reason: Exception) -> None:
    """From another thread: the main thread raises `reason`, unless it is too late to put anything back."""
    import threading

    _Held.reason = reason
    main = threading.main_thread().ident
    assert main
    signal.pthread_kill(main, INTERRUPT)


def _on_interrupt(_number: int, _frame: object) -> None:
    if _Held.reason:
        _raise(_Held.reason)


def _raise(error: BaseException) -> None:
    if _Held.held:
        _Held.waiting = _Held.waiting or error
        return
    # A second signal must not interrupt the putting back.
    no_more_signals()
    raise error


def no_more_signals() -> None:
    """From here on a signal comes too late, or would keep something from being put back."""
    for number in (*PUT_BACK, INTERRUPT):
        signal.signal(number, signal.SIG_IGN)


def step_back() -> None:
    """A guest runs again: it needs the processor more than what is left to do here."""
    with contextlib.suppress(OSError):
        os.nice(10)
