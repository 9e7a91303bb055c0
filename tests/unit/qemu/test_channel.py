"""A channel on which nothing comes, and a scripted QEMU that is asked why."""

import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qmp_server import SILENCE, QmpServer, Said, empty
from vmstate.errors import CannotDo, GuestGone
from vmstate.qemu.channel import QemuChannel

from unit.qemu.fake_qemu import FakeQemu


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


Ends = tuple[socket.socket, socket.socket]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_it_gives_up_and_leaves_its_channel_open(qemu: FakeQemu, path: str, ends: Ends, status: str) -> None:
    qemu.migration = status
    started = time.monotonic()
    assert QemuChannel(path, ends[0]).wait() == set()
    assert time.monotonic() - started < 1.5


def test_one_that_is_at_work_is_waited_for(qemu: FakeQemu, path: str, ends: Ends) -> None:
    qemu.migration = "active"
    threading.Timer(1.5, ends[1].send, (b"x",)).start()
    assert QemuChannel(path, ends[0]).wait() == {ends[0].fileno()}
    assert "query-migrate" in qemu.heard


def test_what_was_sent_before_it_gave_up_is_taken(qemu: FakeQemu, path: str, ends: Ends) -> None:
    qemu.migration = "failed"
    channel = QemuChannel(path, ends[0])
    assert channel.wait() == set()
    ends[1].send(b"x")
    assert channel.wait() == {ends[0].fileno()}


def test_other_descriptors(path: str, ends: Ends) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        assert QemuChannel(path, ends[0]).wait(ours.fileno()) == {ours.fileno()}


def test_it_is_not_asked_where_it_must_not_be(qemu: FakeQemu, path: str, ends: Ends) -> None:
    qemu.migration = "failed"
    channel = QemuChannel(path, ends[0])
    channel.stop_asking()
    threading.Timer(1.2, ends[1].close).start()
    assert channel.wait() == {ends[0].fileno()}
    assert qemu.heard == []


def test_a_monitor_that_says_nothing_holds_up_no_byte(work: Path, ends: Ends) -> None:
    """In its last step QEMU answers nothing until its bytes have been taken."""

    def answer(command: dict[str, Any]) -> Iterable[Said]:
        return (SILENCE,) if command["execute"].startswith("query") else empty(command)

    with QmpServer(work / "qmp", answer) as server:
        channel = QemuChannel(server.path, ends[0])
        for _ in range(2):
            threading.Timer(1.0, ends[1].send, (b"x",)).start()
            started = time.monotonic()
            assert channel.wait() == {ends[0].fileno()}
            assert time.monotonic() - started < 1.3
            assert ends[0].recv(1) == b"x"
        assert len([command for command in server.heard if command["execute"] == "qmp_capabilities"]) == 1


def test_its_own_words(work: Path, ends: Ends) -> None:
    def answer(command: dict[str, Any]) -> Iterable[Said]:
        said = {"query-migrate": {"status": "failed", "error-desc": "no TPM"}, "query-status": {"status": "running"}}
        return ({"return": said.get(command["execute"], {}), "id": command["id"]},)

    with QmpServer(work / "qmp", answer) as server:
        channel = QemuChannel(server.path, ends[0])
        assert channel.wait() == set()
        assert str(channel.gave_up(7)) == "QEMU gave up after 7 bytes: no TPM"


@pytest.mark.parametrize("status", ["failed", "cancelled", "active"])
def test_without_words(qemu: FakeQemu, path: str, ends: Ends, status: str) -> None:
    qemu.migration = status
    error = QemuChannel(path, ends[0]).gave_up(0)
    assert (str(error), type(error)) == ("QEMU gave up at once", CannotDo)
    assert bool(error.hints) == (status == "failed")


def test_it_has_ended(ends: Ends) -> None:
    error = QemuChannel("nobody.qmp", ends[0]).gave_up(7)
    assert isinstance(error, GuestGone)
    assert "the QEMU of the guest at nobody.qmp has ended: the guest has shut down" in str(error)
