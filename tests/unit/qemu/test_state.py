"""How long a guest is waited for, and what is asked again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qmp_server import SILENCE, QmpServer
from vmstate.errors import CannotDo, GuestGone, Refused
from vmstate.qemu import monitor as monitors
from vmstate.qemu import state
from vmstate.qemu.monitor import Busy, Monitor
from vmstate.qemu.state import GuestState, look_until, loses_pages, query, wait_for, with_retry

from unit.qemu.fake_qemu import FakeQemu


def over(found: GuestState) -> bool:
    return found.migration == "completed"


def later(qemu: FakeQemu, looks: int) -> None:
    """The migration of the guest is over at the look behind so many."""
    qemu.migration = "active"
    ask = qemu.query_migrate

    def told() -> dict[str, Any]:
        if qemu.heard.count("query-migrate") > looks:
            qemu.migration = "completed"
        return ask()

    qemu.query_migrate = told  # type: ignore[method-assign]


@pytest.mark.parametrize("looks", [0, 1, 4])
def test_it_is_looked_for_until_it_is_so(qemu: FakeQemu, path: str, looks: int) -> None:
    later(qemu, looks)
    assert wait_for(path, over, 20, "to complete").migration == "completed"
    assert qemu.heard.count("query-migrate") == looks + 1


@pytest.mark.parametrize("looks", [0, 1, 4])
def test_within_one_conversation(qemu: FakeQemu, path: str, looks: int) -> None:
    later(qemu, looks)
    with Monitor(path) as monitor:
        assert over(look_until(monitor, over, 20))
        assert not over(look_until(monitor, lambda _: False, 0)) or qemu.migration == "completed"
    assert qemu.heard.count("qmp_capabilities") == 1


def test_what_never_comes_is_said_with_what_there_is(qemu: FakeQemu, path: str) -> None:
    qemu.run, qemu.migration = "paused", "active"
    with pytest.raises(CannotDo, match="waited 0 s for .* to complete: its state is 'paused', migration 'active'"):
        wait_for(path, over, 0.2, "to complete")


def test_a_guest_that_is_gone_is_not_waited_for(work: Path) -> None:
    with pytest.raises(GuestGone, match="no guest at"):
        wait_for(str(work / "none"), over, 60, "to complete")
    with pytest.raises(GuestGone, match="no guest at"):
        with_retry(str(work / "none"), query)


class Turns:
    """A `Monitor` whose first conversations end with these errors."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.tried = 0

    def __call__(self, path: str, patience: float = 1) -> Monitor:
        self.tried += 1
        if self.errors:
            raise self.errors.pop(0)
        return Monitor(path, patience)


WAYS: list[Callable[[str], object]] = [
    lambda path: wait_for(path, lambda _: True, 20, "to be there"),
    lambda path: with_retry(path, query, 20),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_monitor_that_is_busy_is_asked_again(
    qemu: FakeQemu, path: str, way: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(Busy("held"), Busy("held"))
    monkeypatch.setattr(state, "Monitor", turns)
    way(path)
    assert turns.tried == 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [CannotDo("not allowed"), GuestGone("gone"), Refused("x", "no")])
def test_what_does_not_pass_is_not_tried_again(
    path: str, way: Callable[[str], object], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(error, Busy("not reached"))
    monkeypatch.setattr(state, "Monitor", turns)
    with pytest.raises(type(error)) as found:
        way(path)
    assert found.value is error
    assert turns.tried == 1


@pytest.mark.parametrize(
    "way", [lambda path: wait_for(path, over, 0.1, "x"), lambda path: with_retry(path, query, 0.1)]
)
def test_one_that_stays_busy_is_said_so(
    path: str, way: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "Monitor", Turns(*(Busy(f"held {turn}") for turn in range(100))))
    with pytest.raises(Busy, match="held"):
        way(path)


def test_a_qemu_that_does_not_answer_is_busy(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "ANSWER", 0.2)

    def answer(command: dict[str, Any]) -> tuple[Any, ...]:
        done = {"return": {}, "id": command["id"]}
        return (done,) if command["execute"] == "qmp_capabilities" else (SILENCE,)

    with QmpServer(work / "qmp", answer) as server, Monitor(server.path) as monitor, pytest.raises(Busy):
        query(monitor)


@pytest.mark.parametrize(
    ("version", "kvm", "lost"),
    [
        ((7, 2), False, True),
        ((8, 2), False, True),
        ((9, 0), False, False),
        ((10, 0), False, False),
        ((7, 2), True, False),
    ],
)
def test_whether_a_live_migration_may_lose_pages(
    qemu: FakeQemu, path: str, version: tuple[int, int], kvm: bool, lost: bool
) -> None:
    qemu.version, qemu.kvm = version, kvm
    with Monitor(path) as monitor:
        assert loses_pages(monitor) is lost


@pytest.mark.parametrize(
    ("run", "migration", "moving", "given"),
    [
        ("running", "none", False, False),
        ("running", "active", True, False),
        ("running", "postcopy-paused", True, False),
        ("finish-migrate", "device", True, False),
        ("postmigrate", "completed", False, True),
        ("postmigrate", "failed", False, False),
        ("postmigrate", "cancelled", False, False),
        ("paused", "completed", False, False),
    ],
)
def test_where_a_guest_is(run: str, migration: str, moving: bool, given: bool) -> None:
    found = GuestState(run, migration)
    assert (found.moving, found.given_away) == (moving, given)
