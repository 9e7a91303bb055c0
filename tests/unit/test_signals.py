"""A deadline interrupts the main thread as a signal does: at once, later, or not at all."""

import os
import threading
import time

import pytest
from vmstate.errors import CannotDo
from vmstate.signals import hear_interruptions, hold_signals, interrupt, no_more_signals, release_signals


def soon() -> None:
    threading.Timer(0.2, interrupt, (CannotDo("too late"),)).start()


def test_whatever_it_waits_for() -> None:
    """A pipe that nobody reads, which is full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    hear_interruptions()
    soon()
    with pytest.raises(CannotDo, match="too late"):
        os.write(writing, bytes(4096))
    os.close(reading)
    os.close(writing)


def test_it_waits_until_it_may_come() -> None:
    hear_interruptions()
    hold_signals()
    interrupt(CannotDo("too late"))
    time.sleep(0.1)
    with pytest.raises(CannotDo, match="too late"):
        release_signals()


def test_it_comes_too_late() -> None:
    hear_interruptions()
    no_more_signals()
    interrupt(CannotDo("too late"))
    time.sleep(0.1)


def test_in_another_thread_there_is_nothing_to_hear() -> None:
    thread = threading.Thread(target=hear_interruptions)
    thread.start()
    thread.join()
