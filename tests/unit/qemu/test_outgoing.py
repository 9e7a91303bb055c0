"""The order in which a guest is paused, sent and resumed, by what a scripted QEMU has heard."""

import socket
from collections.abc import Iterator

import pytest
from vmstate.errors import CannotDo, GuestGone, InDoubt, Refused, WrongUsage
from vmstate.qemu import markers, userfault
from vmstate.qemu.monitor import Monitor
from vmstate.qemu.outgoing import OutgoingMigration
from vmstate.qemu.sendable import require_live
from vmstate.qemu.settings import left_behind

from unit.qemu.fake_qemu import FakeQemu


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    # Its process is ours here, which has no userfaultfd of a snapshot.
    monkeypatch.setattr(userfault, "descriptors", lambda _: [])
    fake = FakeQemu()
    fake.version = (7, 2)
    return fake


@pytest.fixture
def fd() -> Iterator[int]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield theirs.fileno()


def order(qemu: FakeQemu, *names: str) -> list[str]:
    return [name for name in qemu.heard if name in names]


@pytest.mark.parametrize("live_anyway", [False, True])
def test_paused_first(qemu: FakeQemu, path: str, fd: int, live_anyway: bool) -> None:
    """Who comes later knows by then that it was not the user."""
    migration = OutgoingMigration(path, live_anyway=live_anyway)
    migration.start(fd, stopped=False)
    assert migration.paused_first == (None if live_anyway else "QEMU 7.2")
    paused = [] if live_anyway else ["stop"]
    assert order(qemu, "stop", "getfd", "migrate") == [*paused, "getfd", "migrate"]
    if not live_anyway:
        assert qemu.heard.index("object-add") < qemu.heard.index("stop")
    with Monitor(path) as monitor:
        left = left_behind(monitor)
        assert left and left.stopped is not live_anyway


@pytest.mark.parametrize(("version", "kvm"), [((10, 0), False), ((7, 2), True)])
def test_where_nothing_is_lost_it_runs(qemu: FakeQemu, path: str, fd: int, version: tuple[int, int], kvm: bool) -> None:
    qemu.version, qemu.kvm = version, kvm
    migration = OutgoingMigration(path)
    migration.start(fd, stopped=False)
    assert (migration.paused_first, qemu.run) == (None, "running")


def test_one_that_is_paused_is_left_so(qemu: FakeQemu, path: str, fd: int) -> None:
    qemu.run = "paused"
    migration = OutgoingMigration(path)
    migration.start(fd, stopped=True)
    assert migration.paused_first is None
    assert order(qemu, "stop") == []
    qemu.migration = "failed"
    assert migration.take_back().run == "paused"
    assert order(qemu, "cont") == []


@pytest.mark.parametrize("after", ["failed", "cancelled"])
def test_it_runs_on_when_it_is_taken_back(qemu: FakeQemu, path: str, fd: int, after: str) -> None:
    before = qemu.settings()
    migration = OutgoingMigration(path)
    migration.start(fd, stopped=False)
    qemu.migration = after
    assert migration.take_back().run == "running"
    assert (qemu.settings(), qemu.objects) == (before, {})


def test_qemu_refuses_to_migrate(qemu: FakeQemu, path: str, fd: int) -> None:
    qemu.refuses["migrate"] = "State blocked by non-migratable device 'x'"
    migration = OutgoingMigration(path)
    with pytest.raises(CannotDo, match="cannot be saved: State blocked"):
        migration.start(fd, stopped=True)
    assert migration.begun
    assert migration.take_back().run == "running"
    assert qemu.objects == {}


def test_a_guest_that_does_not_run_on_is_left_to_its_watchdog(qemu: FakeQemu, path: str, fd: int) -> None:
    """The settings, and that it was paused by us, stay in QEMU for it."""
    migration = OutgoingMigration(path)
    migration.start(fd, stopped=True)
    qemu.migration = "failed"
    qemu.refuses["cont"] = 'Failed to get "write" lock'
    with pytest.raises(Refused, match="write"):
        migration.take_back()
    assert not migration.saved.restored
    with Monitor(path) as monitor:
        left = left_behind(monitor)
        assert left and left.stopped


def test_another_migration_has_begun(qemu: FakeQemu, path: str, fd: int) -> None:
    migration = OutgoingMigration(path)
    migration.start(fd, stopped=False)
    qemu.run, qemu.migration = "postmigrate", "completed"
    with pytest.raises(InDoubt, match="has begun meanwhile"):
        migration.take_back()


def test_a_taken_back_move_is_decided(qemu: FakeQemu, path: str, fd: int) -> None:
    migration = OutgoingMigration(path, mark={"uri": "link:x", "move": "0123456789abcdef"})
    migration.start(fd, stopped=False)
    assert markers.MOVED in qemu.objects
    qemu.migration = "failed"
    migration.take_back()
    assert list(qemu.objects) == [markers.DECIDED]
    with Monitor(path) as monitor:
        markers.forget(monitor, "another")
        assert markers.decision(markers.read(monitor)) == markers.KEPT
        markers.forget(monitor, "0123456789abcdef")
    assert qemu.objects == {}


def test_the_decision_of_a_granted_move_is_not_forgotten(qemu: FakeQemu, path: str) -> None:
    with Monitor(path) as monitor:
        markers.decide(monitor, markers.GRANTED, "0123456789abcdef")
        markers.forget(monitor, "0123456789abcdef")
        assert markers.decision(markers.read(monitor)) == markers.GRANTED


@pytest.mark.parametrize("step", range(3, 30))
def test_qemu_dies_at_each_step(qemu: FakeQemu, path: str, fd: int, step: int) -> None:
    qemu.dies_in = step
    migration = OutgoingMigration(path)
    try:
        migration.start(fd, stopped=True)
    except GuestGone:
        return
    assert "migrate" in qemu.heard


def test_where_it_cannot_be_paused(qemu: FakeQemu, path: str) -> None:
    with pytest.raises(WrongUsage, match="QEMU 7.2 without KVM loses pages"):
        require_live(path, "nobody could resume it", "use link:")
    qemu.run = "paused"
    require_live(path, "", "")
    qemu.run, qemu.version = "running", (9, 0)
    require_live(path, "", "")


def ended(path: str, qemu: FakeQemu, fd: int, *, ran: bool = True) -> OutgoingMigration:
    """A migration that has sent all, and has been let run on in the conversation in which it was given away."""
    qemu.run = "running" if ran else "paused"
    migration = OutgoingMigration(path, live_anyway=True)
    migration.start(fd, stopped=False)
    qemu.run, qemu.migration = "postmigrate", "active"

    def give_away() -> None:
        qemu.migration = "completed"

    migration.run_on(give_away)
    return migration


def test_one_that_runs_on_is_let_go(qemu: FakeQemu, path: str, fd: int) -> None:
    before = qemu.settings()
    migration = ended(path, qemu, fd)
    assert qemu.run == "running"
    with Monitor(path) as monitor:
        left = left_behind(monitor)
        assert left and not left.stopped
    assert migration.completed().migration == "completed"
    assert (qemu.settings(), qemu.objects) == (before, {})


@pytest.mark.parametrize("after", ["completed", "take_back"])
def test_one_that_was_moved_meanwhile_stays_there(qemu: FakeQemu, path: str, fd: int, after: str) -> None:
    """Between its running on and the end of the dump another command may have sent it away."""
    migration = ended(path, qemu, fd)
    qemu.run, qemu.migration = "postmigrate", "completed"
    with Monitor(path) as monitor:
        markers.put(monitor, markers.MOVED, uri="link:x", move="0123456789abcdef", ran=True)
        markers.decide(monitor, markers.GRANTED, "0123456789abcdef")
    qemu.heard.clear()
    getattr(migration, after)()
    assert "cont" not in qemu.heard
    assert qemu.run == "postmigrate"
    with Monitor(path) as monitor:
        assert markers.decision(markers.read(monitor)) == markers.GRANTED


@pytest.mark.parametrize("after", ["completed", "take_back"])
def test_one_that_its_user_has_paused_meanwhile_stays_so(qemu: FakeQemu, path: str, fd: int, after: str) -> None:
    migration = ended(path, qemu, fd)
    qemu.run = "paused"
    getattr(migration, after)()
    assert qemu.run == "paused"


def test_one_that_is_cancelled_at_the_last_moment(qemu: FakeQemu, path: str, fd: int) -> None:
    """It is taken back in the same conversation: there is no second one to be had."""
    before = qemu.settings()
    migration = OutgoingMigration(path, live_anyway=True)
    migration.start(fd, stopped=False)
    qemu.run, qemu.migration = "postmigrate", "active"

    def give_away() -> None:
        # QEMU has it run on itself.
        qemu.run, qemu.migration = "running", "cancelled"

    with pytest.raises(CannotDo, match="QEMU ended the migration as 'cancelled'"):
        migration.run_on(give_away)
    assert qemu.run == "running"
    assert (qemu.settings(), qemu.objects) == (before, {})
