"""Moves without a QEMU: what they change in this process is put back, and each has a scripted QEMU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qmp_server import QmpServer
from vmstate.migrate import destination_commit, preflight, remote, source_commit
from vmstate.qemu import userfault

from unit.migrate.both_sides import LoadingQemu, OtherSide, Script, SendingQemu


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a move needs of its host is not looked for."""
    monkeypatch.setattr(userfault, "descriptors", lambda _: [])
    monkeypatch.setattr(preflight, "facts", lambda _: {})
    for module in (source_commit, destination_commit):
        monkeypatch.setattr(module, "step_back", lambda: None)


@pytest.fixture
def sending(work: Path, moves: None) -> Iterator[SendingQemu]:
    qemu = SendingQemu()
    with QmpServer(work / "a", qemu) as qemu.server:
        yield qemu


@pytest.fixture
def loading(work: Path, moves: None) -> Iterator[LoadingQemu]:
    qemu = LoadingQemu()
    with QmpServer(work / "b", qemu) as qemu.server:
        yield qemu


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has these scripts be the other side, one for each time that it is called; the last one for all later ones."""

    def be(*scripts: Script) -> None:
        left = list(scripts)
        monkeypatch.setattr(remote, "_start", lambda _: OtherSide(left.pop(0) if len(left) > 1 else left[0]))

    return be
