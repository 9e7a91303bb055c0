"""What becomes of a guest whose pages are brought, and of one that another server takes up, against a scripted QEMU."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vmstate.errors import CannotDo, Damaged, GuestGone, InDoubt, Misfit
from vmstate.qemu import markers
from vmstate.report import Report
from vmstate.restore import lazy_resume
from vmstate.restore.lazy_plan import LazyPlan
from vmstate.restore.lazy_resume import Resume
from vmstate.restore.lazy_state import LazyState, lazy_state
from vmstate.restore.page_server_thread import Recovered
from vmstate.restore.postcopy import Opening, ReturnPath
from vmstate.restore.served_guest import ServedGuest
from vmstate.rollback import Rollback
from vmstate.stream import constants
from vmstate.stream.validate import validate

from unit.restore.target import Target
from unit.streams import Pieces, state

NAME = "microvm-10.0"
HAS_ALL = constants.SHUT.pack(constants.MIG_RP_MSG_SHUT, 4, 0)


@pytest.fixture
def qemu() -> Target:
    return Target(validate(Pieces(state(NAME))))


@pytest.fixture
def known(tmp_path: Path) -> Iterator[LazyState]:
    (tmp_path / "s").write_bytes(state(NAME))
    with (tmp_path / "s").open("rb", buffering=0) as file:
        yield lazy_state(file.fileno())


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours, and QEMU's."""
    pair = socket.socketpair()
    # What is sent has room there, though nobody reads it.
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    yield pair
    for end in pair:
        end.close()


Ends = tuple[socket.socket, socket.socket]
Serve = Callable[..., ServedGuest]


@pytest.fixture
def serve(qemu: Target, path: str, known: LazyState, ends: Ends) -> Serve:
    """A guest that runs, and is served."""

    def serving(**plan: Any) -> ServedGuest:
        qemu.run, qemu.migration = "running", "postcopy-active"
        qemu.objects[markers.LAZY] = json.dumps({"state": known.identity})
        guest = ServedGuest(path, known, LazyPlan(path, **plan), ends[0])
        guest.serve(known.opening.part())
        return guest

    return serving


def test_it_has_everything(qemu: Target, serve: Serve, ends: Ends) -> None:
    guest = serve()
    guest.runs()
    ends[1].sendall(HAS_ALL)
    qemu.migration = "completed"
    guest.wait()
    assert markers.LAZY not in qemu.objects
    assert ends[0].fileno() < 0


def test_its_disks_could_not_be_had(qemu: Target, serve: Serve, ends: Ends, path: str) -> None:
    """It gets its memory all the same."""
    guest = serve()
    guest.stands()
    ends[1].sendall(HAS_ALL)
    qemu.run, qemu.migration = "paused", "completed"
    with pytest.raises(InDoubt, match="stands paused: QEMU could not take its disks") as caught:
        guest.wait()
    assert f"vm-cont {path}" in caught.value.hints[0]
    assert markers.LAZY not in qemu.objects


@pytest.mark.parametrize("stands", [True, False])
def test_the_rest_cannot_be_read(
    stands: bool, qemu: Target, serve: Serve, known: LazyState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped; also where it stood, it is said so."""

    def unreadable(_place: int, _count: int) -> memoryview:
        raise Damaged("a hole")

    monkeypatch.setattr(known.file, "read", unreadable)
    guest = serve()
    if stands:
        qemu.run = "paused"
        guest.stands()
    else:
        guest.runs()
    with pytest.raises(Damaged, match="a hole; the guest at .* was stopped") as caught:
        guest.wait()
    assert caught.value.hints[0].startswith("with a good copy of this state: vm-restore --resume")
    assert qemu.run == "paused"
    assert (markers.HALTED in qemu.objects) == (not stands)


def test_it_is_gone(qemu: Target, serve: Serve, ends: Ends) -> None:
    """Its channel is, and QEMU still says that it lacks pages."""
    guest = serve(on_demand=True)
    guest.runs()
    ends[1].close()
    qemu.migration = "postcopy-paused"
    with pytest.raises(InDoubt, match="runs .postcopy-paused., and lacks pages") as caught:
        guest.wait()
    assert "vm-restore --resume --on-demand" in caught.value.hints[0]


@pytest.mark.parametrize("on_demand", [True, False])
def test_its_qemu_has_ended(on_demand: bool, serve: Serve, ends: Ends) -> None:
    """On demand it is served as long as it lives, and no longer."""
    guest = serve(on_demand=on_demand)
    guest.runs()
    guest.path = "/nowhere"
    ends[1].close()
    if on_demand:
        guest.wait()
    else:
        with pytest.raises(GuestGone, match="ended while its memory was being read"):
            guest.wait()


def test_a_channel_that_is_closed_has_no_server(serve: Serve, ends: Ends) -> None:
    guest = serve(on_demand=True)
    guest.close()
    assert guest.error is not None
    assert ends[0].fileno() < 0


# Taken up


@pytest.fixture
def resume(path: str, known: LazyState, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Resume]:
    def recovered(_monitor: object, opening: Opening) -> Recovered:
        return Recovered(ends[0], dict.fromkeys(opening.blocks, b""), ReturnPath(), [])

    def made(**plan: Any) -> Resume:
        report = Report("vm-restore", quiet=True)
        return Resume(path, known, LazyPlan(path, resume=True, **plan), report, Rollback("look"))

    monkeypatch.setattr(lazy_resume, "recover", recovered)
    return made


@pytest.mark.parametrize("halted", [True, False])
def test_it_goes_on(halted: bool, qemu: Target, known: LazyState, ends: Ends, resume: Callable[..., Resume]) -> None:
    """Also one that was stopped because its pages could not be read."""
    qemu.lost(known.identity, halted=halted)
    guest, run = resume().take_up()
    assert run == "running"
    assert markers.HALTED not in qemu.objects
    ends[1].sendall(HAS_ALL)
    qemu.migration = "completed"
    guest.wait()
    assert markers.LAZY not in qemu.objects


@pytest.mark.parametrize(
    ("migration", "identity", "error", "words"),
    [
        ("none", "", CannotDo, "is not being restored lazily"),
        ("postcopy-active", "", CannotDo, "has a server that brings its pages"),
        ("postcopy-paused", "another", Misfit, "is not the state that the guest at .* runs on"),
    ],
)
def test_what_cannot_be_taken_up(
    migration: str,
    identity: str,
    error: type[CannotDo | Misfit],
    words: str,
    qemu: Target,
    known: LazyState,
    resume: Callable[..., Resume],
) -> None:
    qemu.lost(identity or known.identity)
    qemu.migration = migration
    with pytest.raises(error, match=words):
        resume().take_up()


def test_one_that_is_not_marked(qemu: Target, known: LazyState, resume: Callable[..., Resume]) -> None:
    """Only by somebody who is sure of it."""
    qemu.lost(known.identity)
    del qemu.objects[markers.LAZY]
    with pytest.raises(CannotDo, match="is not being restored lazily"):
        resume().take_up()
    guest, _ = resume(sure=True).take_up()
    guest.close()
