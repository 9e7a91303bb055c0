"""A scripted QEMU for the tests of what talks to one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from qmp_server import QmpServer

from unit.qemu.fake_qemu import FakeQemu


@pytest.fixture
def qemu() -> FakeQemu:
    return FakeQemu()


@pytest.fixture
def path(work: Path, qemu: FakeQemu) -> Iterator[str]:
    with QmpServer(work / "qmp", qemu) as server:
        yield server.path
