"""The one decision of a move, in every state of a scripted QEMU, and with it dying at every step."""

import json
from collections.abc import Callable

import pytest
from vmstate.errors import CannotDo, InDoubt, VmstateError
from vmstate.migrate import decision, recover
from vmstate.qemu.markers import ARRIVED, DECIDED, GRANTED, KEPT, MOVED, TAKEN, decide
from vmstate.qemu.monitor import Monitor

from unit.qemu.fake_qemu import FakeQemu

MOVE, OTHER = "0123456789abcdef", "fedcba9876543210"


def stands(qemu: FakeQemu, run: str, migration: str, *marks: str, decided: str | None = None) -> None:
    qemu.run, qemu.migration = run, migration
    for name in marks:
        qemu.objects[name] = json.dumps({"move": MOVE, "ran": True, "run": True})
    if decided:
        qemu.objects[DECIDED] = json.dumps({"move": MOVE, "what": decided})


ROWS = [
    ("running", "none", (), None, "here"),
    ("running", "active", (MOVED,), None, "undecided"),
    ("finish-migrate", "device", (MOVED,), None, "undecided"),
    ("postmigrate", "completed", (MOVED,), None, "given"),
    ("postmigrate", "completed", (MOVED,), KEPT, "given"),
    ("postmigrate", "completed", (MOVED,), GRANTED, "granted"),
    ("postmigrate", "failed", (MOVED,), None, "here"),
    ("running", "cancelled", (), KEPT, "here"),
    ("inmigrate", "none", (), None, "waiting"),
    ("inmigrate", "active", (TAKEN,), None, "loading"),
    ("paused", "completed", (TAKEN,), None, "loaded"),
    ("running", "completed", (ARRIVED,), None, "running"),
    ("paused", "completed", (ARRIVED,), None, "running"),
    ("running", "postcopy-active", (MOVED,), GRANTED, "postcopy"),
    ("running", "postcopy-paused", (ARRIVED,), None, "postcopy"),
]


@pytest.mark.parametrize(("run", "migration", "marks", "decided", "state"), ROWS)
def test_where_a_guest_stands(
    qemu: FakeQemu, path: str, run: str, migration: str, marks: tuple[str, ...], decided: str | None, state: str
) -> None:
    stands(qemu, run, migration, *marks, decided=decided)
    found = decision.migration_state(path)
    assert found["state"] == state
    assert found["run"] == run
    assert found["move"] == (MOVE if marks or decided else None)


def test_one_that_is_gone(path: str, qemu: FakeQemu) -> None:
    assert decision.migration_state(path + "-none") == {"state": "gone"}


@pytest.mark.parametrize(("run", "migration", "marks", "decided", "state"), ROWS)
def test_only_what_was_given_away_is_granted(
    qemu: FakeQemu, path: str, run: str, migration: str, marks: tuple[str, ...], decided: str | None, state: str
) -> None:
    stands(qemu, run, migration, *marks, decided=decided)
    before = dict(qemu.objects)
    with Monitor(path) as monitor:
        said = decision.grant(monitor, MOVE)
    if state == "given" and decided is None:
        assert said == "granted"
        assert json.loads(qemu.objects[DECIDED]) == {"move": MOVE, "what": GRANTED}
    else:
        assert qemu.objects == before
        # One that was kept stays, whoever asks later.
        kept = "here" if decided == KEPT and state == "given" else state
        assert said == (kept if marks or decided else "unknown")
    assert "cont" not in qemu.heard


def test_another_guest_at_the_same_path_is_not_granted(qemu: FakeQemu, path: str) -> None:
    stands(qemu, "postmigrate", "completed", MOVED)
    with Monitor(path) as monitor:
        assert decision.grant(monitor, OTHER) == "unknown"
    assert DECIDED not in qemu.objects


@pytest.mark.parametrize(("run", "migration", "marks", "decided", "state"), ROWS)
def test_what_is_granted_or_not_decided_is_not_taken_back(
    qemu: FakeQemu, path: str, run: str, migration: str, marks: tuple[str, ...], decided: str | None, state: str
) -> None:
    stands(qemu, run, migration, *marks, decided=decided)
    with Monitor(path) as monitor:
        taken = decision.take_back_given(monitor)
    assert taken is (state not in ("granted", "undecided", "postcopy"))
    assert ("cont" in qemu.heard) is (state == "given")
    if state == "given":
        assert json.loads(qemu.objects[DECIDED]) == {"move": MOVE, "what": KEPT}
        assert MOVED not in qemu.objects


@pytest.mark.parametrize(("first", "second"), [(GRANTED, KEPT), (KEPT, GRANTED)])
def test_it_is_decided_once(qemu: FakeQemu, path: str, first: str, second: str) -> None:
    with Monitor(path) as monitor:
        assert decide(monitor, first, MOVE) == first
        assert decide(monitor, second, MOVE) == first


Step = Callable[[Monitor], object]
BOTH: list[tuple[Step, Step]] = [
    (lambda monitor: decision.grant(monitor, MOVE), decision.take_back_given),
    (decision.take_back_given, lambda monitor: decision.grant(monitor, MOVE)),
]


@pytest.mark.parametrize("step", range(2, 14))
@pytest.mark.parametrize(("first", "second"), BOTH)
def test_one_dies_at_each_step_and_the_other_comes(
    qemu: FakeQemu, path: str, first: Step, second: Step, step: int
) -> None:
    """Granted and let run here are never both true."""
    stands(qemu, "postmigrate", "completed", MOVED)
    qemu.dies_in = step
    for act in (first, second):
        try:
            with Monitor(path) as monitor:
                act(monitor)
        except VmstateError:
            pass
        qemu.dies_in = 0
    decided = json.loads(qemu.objects.get(DECIDED, "{}")).get("what")
    # One that runs without a mark was kept: whoever asks for it is told nothing.
    assert (qemu.run, decided) in (
        ("running", KEPT),
        ("running", None),
        ("postmigrate", GRANTED),
        ("postmigrate", KEPT),
    )
    assert not (qemu.run == "running" and MOVED in qemu.objects and decided is None)


@pytest.mark.parametrize("step", range(2, 12))
def test_it_dies_when_it_lets_an_arrived_guest_run(qemu: FakeQemu, path: str, step: int) -> None:
    """Whoever comes later finds it loaded or arrived, and can bring it to its end."""
    stands(qemu, "paused", "completed", TAKEN)
    facts = json.loads(qemu.objects[TAKEN])
    qemu.dies_in = step
    try:
        with Monitor(path) as monitor:
            decision.arrive(monitor, facts)
    except VmstateError:
        pass
    qemu.dies_in = 0
    assert decision.migration_state(path)["state"] in ("loaded", "running")
    with Monitor(path) as monitor:
        assert decision.arrive(monitor, facts) == "running"
    assert (TAKEN in qemu.objects, ARRIVED in qemu.objects, qemu.run) == (False, True, "running")


def test_one_that_was_paused_at_its_source_arrives_paused(qemu: FakeQemu, path: str) -> None:
    stands(qemu, "paused", "completed", TAKEN)
    with Monitor(path) as monitor:
        assert decision.arrive(monitor, {"move": MOVE, "run": False}) == "paused"
    assert "cont" not in qemu.heard


@pytest.mark.parametrize(("run", "migration", "marks", "decided", "state"), ROWS)
def test_a_recovery_without_a_way_to_the_other_side(
    qemu: FakeQemu, path: str, run: str, migration: str, marks: tuple[str, ...], decided: str | None, state: str
) -> None:
    """What cannot be told alone is in doubt, and nothing runs over it."""
    stands(qemu, run, migration, *marks, decided=decided)
    ends: dict[str, type[Exception] | None] = {
        "loading": CannotDo,
        "undecided": CannotDo,
        "granted": InDoubt,
        "loaded": InDoubt,
        "postcopy": InDoubt,
    }
    if expected := ends.get(state):
        with pytest.raises(expected):
            recover.recover(path, None)
        assert "cont" not in qemu.heard
    else:
        assert recover.recover(path, None)["where"] == ("not here" if state == "waiting" else "here")
        assert ("cont" in qemu.heard) is (state == "given")


@pytest.mark.parametrize("sure", [False, True])
def test_a_held_guest_that_was_reset_is_of_no_use(qemu: FakeQemu, path: str, sure: bool) -> None:
    stands(qemu, "prelaunch", "completed", TAKEN)
    assert decision.migration_state(path)["state"] == "reset"
    with pytest.raises(InDoubt, match="was reset while it was held") as error:
        recover.recover(path, None, sure=sure)
    assert "end this QEMU" in error.value.hints[0]
    assert "cont" not in qemu.heard
