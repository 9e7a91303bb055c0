"""Verbs on a guest, in every state in which a scripted QEMU says that it is."""

import contextlib
import json

import pytest
from vmstate.errors import CannotDo, InDoubt
from vmstate.qemu import control, markers
from vmstate.qemu.markers import DECIDED, GRANTED, HALTED, HEARD, KEPT, LAZY, MOVED, TAKEN

from unit.qemu.fake_qemu import FakeQemu

MOVE = "0123456789abcdef"


def mark(qemu: FakeQemu, name: str, **values: object) -> None:
    qemu.objects[name] = json.dumps(values)


def moved(qemu: FakeQemu, *, decided: str | None = None) -> None:
    qemu.run, qemu.migration = "postmigrate", "completed"
    mark(qemu, MOVED, move=MOVE, uri="link:x", ran=True)
    if decided:
        mark(qemu, DECIDED, move=MOVE, what=decided)


def test_one_that_waits_is_not_stopped(qemu: FakeQemu, path: str) -> None:
    qemu.run = "inmigrate"
    with pytest.raises(CannotDo, match="waits for a state: there is nothing to stop"):
        control.stop(path)
    assert "stop" not in qemu.heard


def test_stop_and_cont(qemu: FakeQemu, path: str) -> None:
    assert control.stop(path).run == "paused"
    assert control.cont(path).run == "running"


@pytest.mark.parametrize(
    ("run", "migration", "words"),
    [
        ("running", "none", "is not migrating"),
        ("postmigrate", "completed", "is not migrating"),
        ("inmigrate", "active", "is the one that takes a state"),
        ("running", "postcopy-active", "runs at its destination already"),
    ],
)
def test_what_cannot_be_cancelled(qemu: FakeQemu, path: str, run: str, migration: str, words: str) -> None:
    qemu.run, qemu.migration = run, migration
    with pytest.raises(CannotDo, match=words):
        control.cancel(path)
    assert "migrate_cancel" not in qemu.heard


def test_a_snapshot_is_not_cancelled(qemu: FakeQemu, path: str) -> None:
    qemu.migration = "active"
    qemu.capabilities["background-snapshot"] = True
    with pytest.raises(CannotDo, match="a snapshot of the guest .* is not cancelled"):
        control.cancel(path)
    assert "migrate_cancel" not in qemu.heard


@pytest.mark.parametrize("ends", ["cancelled", "completed"])
def test_a_migration_is_cancelled_or_was_faster(qemu: FakeQemu, path: str, ends: str) -> None:
    qemu.migration = "active"

    def cancelled() -> dict[str, object]:
        qemu.migration = ends
        return {}

    qemu.migrate_cancel = cancelled  # type: ignore[attr-defined]
    if ends == "cancelled":
        assert control.cancel(path).migration == "cancelled"
    else:
        with pytest.raises(CannotDo, match="had completed before"):
            control.cancel(path)


def test_one_that_waits_cannot_run(qemu: FakeQemu, path: str) -> None:
    qemu.run = "inmigrate"
    with pytest.raises(CannotDo, match="waits for a state: it cannot run yet"):
        control.cont(path, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_one_whose_migration_is_under_way_is_not_let_run(qemu: FakeQemu, path: str, force: bool) -> None:
    qemu.run, qemu.migration = "paused", "active"
    with pytest.raises(CannotDo, match="is migrating"):
        control.cont(path, force)
    assert "cont" not in qemu.heard


@pytest.mark.parametrize("halted", [False, True])
def test_one_whose_memory_is_being_brought(qemu: FakeQemu, path: str, halted: bool) -> None:
    """It may run, unless it waits for a file that can be read."""
    qemu.run, qemu.migration = "paused", "postcopy-active"
    mark(qemu, LAZY)
    if halted:
        mark(qemu, HALTED)
        with pytest.raises(CannotDo, match="is migrating"):
            control.cont(path)
    else:
        assert control.cont(path).run == "running"


@pytest.mark.parametrize("decided", [None, KEPT, GRANTED])
def test_one_that_was_moved_is_not_let_run(qemu: FakeQemu, path: str, decided: str | None) -> None:
    moved(qemu, decided=decided)
    with pytest.raises(InDoubt, match="was moved, and is where|is being moved, and has not arrived"):
        control.cont(path)
    assert "cont" not in qemu.heard
    assert MOVED in qemu.objects


def test_by_force_it_runs_and_nobody_can_grant_it_any_more(qemu: FakeQemu, path: str) -> None:
    moved(qemu)
    assert control.cont(path, force=True).run == "running"
    assert MOVED not in qemu.objects
    assert json.loads(qemu.objects[DECIDED]) == {"move": MOVE, "what": KEPT}
    # First it is decided, then it runs.
    assert qemu.heard.index("object-add") < qemu.heard.index("cont")
    # And the network is told.
    assert "announce-self" in qemu.heard


def test_one_that_was_heard_to_run_there_is_asked_for_by_nobody(qemu: FakeQemu, path: str) -> None:
    moved(qemu, decided=GRANTED)
    mark(qemu, HEARD, move=MOVE)
    control.cont(path, force=True)
    assert qemu.objects == {}


@pytest.mark.parametrize("step", range(2, 12))
def test_it_dies_when_a_moved_guest_is_let_run(qemu: FakeQemu, path: str, step: int) -> None:
    """Whatever was reached: where it runs here, it is decided that it stays."""
    moved(qemu)
    qemu.dies_in = step
    with contextlib.suppress(CannotDo, InDoubt):
        control.cont(path, force=True)
    found = json.loads(qemu.objects.get(DECIDED, "{}"))
    assert qemu.run != "running" or found == {"move": MOVE, "what": KEPT}


def test_one_that_is_held_for_its_source(qemu: FakeQemu, path: str) -> None:
    qemu.run, qemu.migration = "paused", "completed"
    mark(qemu, TAKEN, move=MOVE, host="a", path="/a.qmp")
    with pytest.raises(InDoubt, match="came by a move, and its source has not let it go"):
        control.cont(path)
    assert control.cont(path, force=True).run == "running"
    assert TAKEN not in qemu.objects
    assert markers.ARRIVED in qemu.objects


def test_what_is_left_over_is_put_back(qemu: FakeQemu, path: str) -> None:
    qemu.run = "paused"
    qemu.capabilities["return-path"] = True
    control.cont(path)
    assert not any(qemu.capabilities.values())


def test_a_qemu_that_answers_well_and_stays_paused(qemu: FakeQemu, path: str) -> None:
    qemu.run = "paused"
    qemu.cont = dict  # type: ignore[method-assign]
    with pytest.raises(CannotDo, match="QEMU refused 'cont': the guest stays 'paused'"):
        control.cont(path)


@pytest.mark.parametrize("after", ["paused", "running", "quit"])
def test_what_becomes_of_a_guest_in_the_end(qemu: FakeQemu, path: str, after: str) -> None:
    qemu.run, qemu.migration = "postmigrate", "completed"
    assert control.finish(path, after) == {"paused": "paused", "running": "running", "quit": "gone"}[after]
    assert ("cont" in qemu.heard, "quit" in qemu.heard) == (after == "running", after == "quit")


def test_a_guest_that_ends_over_its_quit_is_gone(qemu: FakeQemu, path: str) -> None:
    qemu.dies_in = 2
    assert control.finish(path, "quit") == "gone"


@pytest.mark.parametrize(("after", "command"), [("running", "cont"), ("quit", "quit")])
def test_an_end_that_is_refused_is_in_doubt(qemu: FakeQemu, path: str, after: str, command: str) -> None:
    qemu.run, qemu.migration = "postmigrate", "completed"
    qemu.refuses = {command: "no, thanks"}
    with pytest.raises(InDoubt, match="the state is whole, but .*no, thanks"):
        control.finish(path, after)
