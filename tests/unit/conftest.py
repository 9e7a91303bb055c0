"""A scripted QEMU for the tests of what talks to one."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from qmp_server import QmpServer
from vmstate.signals import INTERRUPT, PUT_BACK, _Held

from unit.qemu.fake_qemu import FakeQemu


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A job that undoes what it did has signals be ignored from then on, or held."""
    had = {number: signal.getsignal(number) for number in (*PUT_BACK, INTERRUPT)}
    yield
    _Held.held, _Held.waiting, _Held.reason = False, None, None
    for number, handler in had.items():
        signal.signal(number, handler)


@pytest.fixture
def qemu() -> FakeQemu:
    return FakeQemu()


@pytest.fixture
def path(work: Path, qemu: FakeQemu) -> Iterator[str]:
    with QmpServer(work / "qmp", qemu) as server:
        yield server.path
