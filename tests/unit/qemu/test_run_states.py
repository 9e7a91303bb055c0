"""Each of QEMU's run states: what the commands do with a guest in it; and markers that count in all of them."""

import json

import pytest
from vmstate.errors import CannotDo, InDoubt
from vmstate.qemu import control, markers, state, status
from vmstate.qemu.markers import DECIDED, GRANTED, KEPT, MOVED, TAKEN
from vmstate.qemu.monitor import Monitor
from vmstate.qemu.outgoing import OutgoingMigration
from vmstate.qemu.run_states import TABLE, row_of
from vmstate.qemu.sendable import require_sendable

from unit.qemu.fake_qemu import FakeQemu

MOVE = "0123456789abcdef"
# qapi/run-state.json
ALL = (
    "debug",
    "inmigrate",
    "internal-error",
    "io-error",
    "paused",
    "postmigrate",
    "prelaunch",
    "finish-migrate",
    "restore-vm",
    "running",
    "save-vm",
    "shutdown",
    "suspended",
    "watchdog",
    "guest-panicked",
    "colo",
)
# Those in which vm-cont sends `cont`, and whose state can be sent
SENT = ("debug", "io-error", "paused", "prelaunch", "running", "suspended", "watchdog", "guest-panicked")
RUN_ON = (*SENT, "postmigrate")


def mark(qemu: FakeQemu, name: str, **values: object) -> None:
    qemu.objects[name] = json.dumps(values)


def test_the_table_has_them_all() -> None:
    assert sorted(TABLE) == sorted(ALL)


@pytest.mark.parametrize("run", ALL)
def test_vm_cont(qemu: FakeQemu, path: str, run: str) -> None:
    qemu.run = run
    if run in RUN_ON:
        assert control.cont(path).run == "running"
    elif run in ("finish-migrate", "save-vm", "restore-vm"):
        # Not where a migration is under way; else it is for QEMU to say.
        qemu.migration = "active"
        with pytest.raises(CannotDo, match="is migrating"):
            control.cont(path)
    else:
        with pytest.raises(CannotDo, match="cannot run|waits for a state"):
            control.cont(path)
    assert ("cont" in qemu.heard) == (run in RUN_ON)


@pytest.mark.parametrize("run", ALL)
def test_what_vm_status_says_and_advises(qemu: FakeQemu, path: str, run: str) -> None:
    qemu.run = run
    found = status.of(path)
    assert row_of(run).words in found.words or run == "postmigrate"
    assert (f"vm-cont {path}" in found.next) == (run in ("paused", "prelaunch", "postmigrate", "io-error"))


def test_one_that_is_not_known_here(qemu: FakeQemu, path: str) -> None:
    qemu.run = "asleep-at-last"
    assert status.of(path).words == "is 'asleep-at-last'"
    assert control.cont(path).run == "running"


@pytest.mark.parametrize("run", ALL)
def test_whose_state_can_be_sent(qemu: FakeQemu, path: str, run: str) -> None:
    qemu.run = run
    with Monitor(path) as monitor:
        if run in SENT:
            assert require_sendable(monitor, path).run == run
        else:
            with pytest.raises(CannotDo, match=f"the guest at {path} .*|stands paused since"):
                require_sendable(monitor, path)


@pytest.mark.parametrize("found", ALL)
def test_after_running_lets_run_what_ran_or_was_paused(qemu: FakeQemu, path: str, found: str) -> None:
    qemu.run, qemu.migration = "postmigrate", "completed"
    resumes = found in ("running", "paused", "suspended", "io-error", "postmigrate")
    assert control.finish(path, "running", found) == ("running" if resumes else "paused")
    assert ("cont" in qemu.heard) == resumes


# What a reset, or whoever speaks to QEMU past us, can make of them.
@pytest.mark.parametrize("run", ["postmigrate", "prelaunch", "paused", "shutdown", "guest-panicked", "running"])
def test_a_granted_guest_runs_nowhere_but_there(qemu: FakeQemu, path: str, run: str) -> None:
    qemu.run, qemu.migration = run, "completed"
    mark(qemu, MOVED, move=MOVE, uri="link:x", ran=True)
    mark(qemu, DECIDED, move=MOVE, what=GRANTED)
    with pytest.raises((InDoubt, CannotDo)):
        control.cont(path)
    assert "cont" not in qemu.heard
    if run in ("postmigrate", "prelaunch"):
        assert f"vm-cont {path}" not in status.of(path).next


@pytest.mark.parametrize("run", ["paused", "prelaunch", "guest-panicked", "io-error"])
def test_a_held_guest_waits_for_its_source(qemu: FakeQemu, path: str, run: str) -> None:
    qemu.run, qemu.migration = run, "completed"
    mark(qemu, TAKEN, move=MOVE, host="h", path="a.qmp")
    with pytest.raises(InDoubt, match="its source has not let it go"):
        control.cont(path)
    found = status.of(path)
    assert f"vm-cont {path}" not in found.next
    assert ("was reset since" in found.words) == (run == "prelaunch")
    assert "cont" not in qemu.heard


@pytest.mark.parametrize("run", ["prelaunch", "postmigrate"])
def test_one_given_away_and_not_granted_is_not_let_run_either(qemu: FakeQemu, path: str, run: str) -> None:
    qemu.run, qemu.migration = run, "completed"
    mark(qemu, MOVED, move=MOVE, uri="link:x", ran=True)
    with pytest.raises(InDoubt, match="has not arrived"):
        control.cont(path)
    assert control.cont(path, force=True).run == "running"
    assert json.loads(qemu.objects[DECIDED])["what"] == KEPT


@pytest.mark.parametrize(("version", "ends", "says"), [((7, 2), False, None), ((9, 0), False, "sleeps")])
def test_a_sleeping_guest(qemu: FakeQemu, path: str, version: tuple[int, int], ends: bool, says: str | None) -> None:
    """From 9.0 on QEMU ends over its `cont` after a migration: it is refused before anything is changed."""
    qemu.run, qemu.version, qemu.kvm = "suspended", version, True
    before = qemu.settings()
    migration = OutgoingMigration(path, ends=ends)
    if says:
        with pytest.raises(CannotDo, match=says):
            migration.start(0, stopped=False)
        assert (qemu.settings(), migration.begun, "migrate" in qemu.heard) == (before, False, False)
    else:
        migration.start(0, stopped=False)
        assert migration.wakes == "QEMU 7.2"


def test_it_may_be_sent_where_it_need_not_go_on(qemu: FakeQemu, path: str) -> None:
    qemu.run, qemu.kvm = "suspended", True
    OutgoingMigration(path, ends=True).start(0, stopped=False)
    assert "migrate" in qemu.heard


def test_one_that_has_shut_down_meanwhile_stays_off(qemu: FakeQemu, path: str) -> None:
    qemu.kvm = True
    migration = OutgoingMigration(path)
    migration.start(0, stopped=False)
    with pytest.raises(CannotDo, match="has shut down while its state was being sent"):
        migration.require_resumable("shutdown", False)
    qemu.run, qemu.migration = "postmigrate", "failed"
    migration.take_back()
    assert markers.OFF in qemu.objects
    with pytest.raises(CannotDo, match="has shut down: it cannot run on"):
        control.cont(path)
    assert "cont" not in qemu.heard
    assert status.of(path).next == ()
    # A reset starts it anew.
    qemu.run = "prelaunch"
    assert control.cont(path).run == "running"
    assert markers.OFF not in qemu.objects


def test_what_was_found_off_once_is_not_off_for_ever(qemu: FakeQemu, path: str) -> None:
    """It was reset and let run in the monitor, past us, and is paused by its user now."""
    qemu.run, qemu.migration = "paused", "failed"
    mark(qemu, markers.OFF)
    assert f"vm-cont {path}" in status.of(path).next
    assert control.cont(path).run == "running"
    assert markers.OFF not in qemu.objects


def test_one_that_is_off_is_not_saved_either(qemu: FakeQemu, path: str) -> None:
    qemu.run, qemu.migration = "postmigrate", "failed"
    mark(qemu, markers.OFF)
    with Monitor(path) as monitor, pytest.raises(CannotDo, match="has shut down") as error:
        require_sendable(monitor, path)
    assert "vm-cont" not in str(error.value.hints)


@pytest.mark.parametrize("stopped", [False, True])
def test_only_one_that_we_have_paused_is_let_run_again(qemu: FakeQemu, path: str, stopped: bool) -> None:
    """QEMU itself has one run on that ran when it was to take its last step: this one did not."""
    qemu.kvm = True
    migration = OutgoingMigration(path)
    migration.start(0, stopped=stopped)
    qemu.run, qemu.migration = "postmigrate", "failed"
    assert migration.take_back().run == ("running" if stopped else "postmigrate")


@pytest.mark.parametrize("found", ["prelaunch", "paused"])
def test_a_reset_guest_was_given_away_only_by_its_marker(qemu: FakeQemu, path: str, found: str) -> None:
    """It was saved once, and reset since: what is refused now has sent nothing."""
    qemu.run, qemu.migration = found, "completed"
    qemu.refuses = {"migrate": "no, thanks"}
    migration = OutgoingMigration(path, mark={"move": MOVE, "uri": "link:x"})
    before = qemu.settings()
    with pytest.raises(CannotDo, match="no, thanks"):
        migration.start(0, stopped=False)
    qemu.refuses = {}
    with Monitor(path) as monitor:
        assert not markers.has_left(markers.read(monitor), state.query(monitor))
    assert migration.take_back().run == found
    assert (qemu.settings(), MOVED in qemu.objects) == (before, False)
    assert control.cont(path).run == "running"
