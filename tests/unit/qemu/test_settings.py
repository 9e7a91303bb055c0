"""Migration settings are put back whatever dies, by whom they belong to, and by nobody else."""

from typing import Any

import pytest
from vmstate.errors import GuestGone, Refused
from vmstate.qemu import markers
from vmstate.qemu.monitor import Monitor
from vmstate.qemu.settings import SavedSettings, clear_leftovers, left_behind, prepare, ran
from vmstate.qemu.state import loses_pages, query

from unit.qemu.fake_qemu import FakeQemu

ON = ("return-path",)
WANTED: dict[str, Any] = {"max-bandwidth": 0, "downtime-limit": 20}


def begin(path: str, *, stopped: bool = False) -> SavedSettings:
    """What a command does before its migration."""
    saved = SavedSettings()
    with Monitor(path) as monitor:
        saved.ran = ran(monitor, query(monitor))
        prepare(monitor, ON, dict(WANTED), saved)
        if stopped:
            saved.pause(monitor)
    return saved


def test_all_is_as_before(qemu: FakeQemu, path: str) -> None:
    qemu.capabilities["xbzrle"] = True
    before = qemu.settings()
    saved = begin(path)
    assert [name for name, state in qemu.capabilities.items() if state] == ["return-path"]
    assert (qemu.parameters["max-bandwidth"], qemu.parameters["downtime-limit"]) == (0, 20)
    with Monitor(path) as monitor:
        saved.put_back(monitor)
    assert qemu.settings() == before
    assert (qemu.objects, saved.restored) == ({}, True)


def test_nothing_to_change_leaves_nothing(qemu: FakeQemu, path: str) -> None:
    saved = SavedSettings()
    with Monitor(path) as monitor:
        prepare(monitor, (), {"max-bandwidth": 128 << 20, "unknown-to-it": 1}, saved)
    assert (qemu.objects, saved.restored) == ({}, True)


@pytest.mark.parametrize("step", range(1, 25))
def test_it_dies_at_each_command(qemu: FakeQemu, path: str, step: int) -> None:
    """The command, and perhaps its watchdog: whoever comes next has what there was before, at each step."""
    qemu.capabilities["auto-converge"] = True
    before = qemu.settings()
    saved = SavedSettings()
    qemu.heard.clear()
    try:
        with Monitor(path) as monitor:
            qemu.dies_in = step
            prepare(monitor, ON, dict(WANTED), saved)
            saved.pause(monitor)
    except GuestGone:
        pass
    died = qemu.dies_in <= 0
    qemu.dies_in = 0
    second = begin(path)
    with Monitor(path) as monitor:
        second.put_back(monitor)
    assert qemu.settings() == before
    assert qemu.objects == {}
    assert second.ran
    assert died or step > 15


@pytest.mark.parametrize("step", range(1, 12))
def test_it_dies_when_it_puts_back(qemu: FakeQemu, path: str, step: int) -> None:
    before = qemu.settings()
    saved = begin(path)
    try:
        with Monitor(path) as monitor:
            qemu.dies_in = step
            saved.put_back(monitor)
    except GuestGone:
        pass
    qemu.dies_in = 0
    with Monitor(path) as monitor:
        clear_leftovers(monitor, saved.owner)
    assert qemu.settings() == before
    assert qemu.objects == {}


def test_a_chain_of_commands_that_die(qemu: FakeQemu, path: str) -> None:
    """Each replaces what the one before has left, and nothing is lost."""
    before = qemu.settings()
    for _ in range(5):
        begin(path)
        assert len(qemu.objects) == 1
    with Monitor(path) as monitor:
        clear_leftovers(monitor)
    assert (qemu.settings(), qemu.objects) == (before, {})


def test_what_another_has_taken_over_is_its_own(qemu: FakeQemu, path: str) -> None:
    """The first was killed, the second is at work: neither the first's watchdog nor a late end of it interferes."""
    before = qemu.settings()
    first = begin(path)
    second = begin(path)
    at_work = qemu.settings()
    with Monitor(path) as monitor:
        clear_leftovers(monitor, first.owner)
        first.put_back(monitor)
    assert qemu.settings() == at_work
    with Monitor(path) as monitor:
        assert left_behind(monitor).owner == second.owner  # type: ignore[union-attr]
        second.put_back(monitor)
    assert qemu.settings() == before


def test_nothing_is_put_back_while_a_migration_runs(qemu: FakeQemu, path: str) -> None:
    begin(path)
    qemu.migration = "active"
    at_work = qemu.settings()
    with Monitor(path) as monitor:
        clear_leftovers(monitor)
    assert qemu.settings() == at_work
    assert qemu.objects


def test_what_vm_speed_has_set_stays(qemu: FakeQemu, path: str) -> None:
    saved = begin(path)
    qemu.parameters["max-bandwidth"] = 7 << 20
    with Monitor(path) as monitor:
        saved.put_back(monitor)
    assert (qemu.parameters["max-bandwidth"], qemu.parameters["downtime-limit"]) == (7 << 20, 300)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("faster", [None, 9 << 20])
def test_a_rate_that_was_lifted_comes_back(qemu: FakeQemu, path: str, killed: bool, faster: int | None) -> None:
    """As a snapshot that is drained does it; then the watchdog does so once more."""
    qemu.parameters["max-bandwidth"] = 5 << 20
    saved = SavedSettings()
    with Monitor(path) as monitor:
        prepare(monitor, ("background-snapshot",), {}, saved)
        if faster:
            qemu.parameters["max-bandwidth"] = faster
        saved.lift_rate(monitor)
    assert qemu.parameters["max-bandwidth"] == 0
    qemu.capabilities["background-snapshot"] = False
    with Monitor(path) as monitor:
        if killed:
            left = left_behind(monitor)
            assert left
            left.lift_rate(monitor)
            clear_leftovers(monitor, saved.owner)
        else:
            saved.put_back(monitor)
    assert qemu.parameters["max-bandwidth"] == (faster or 5 << 20)
    assert qemu.objects == {}


def test_what_is_refused_is_kept(qemu: FakeQemu, path: str) -> None:
    before = qemu.settings()
    saved = begin(path)
    qemu.refuses["migrate-set-capabilities"] = "not now"
    with Monitor(path) as monitor, pytest.raises(Refused):
        saved.put_back(monitor)
    assert not saved.restored
    # The rest was not kept from being restored.
    assert qemu.parameters == before[1]
    del qemu.refuses["migrate-set-capabilities"]
    with Monitor(path) as monitor:
        clear_leftovers(monitor, saved.owner)
    assert (qemu.settings(), qemu.objects) == (before, {})


def test_who_has_paused_it(qemu: FakeQemu, path: str) -> None:
    saved = begin(path, stopped=True)
    with Monitor(path) as monitor:
        assert ran(monitor, query(monitor))
        monitor.ask("cont")
        saved.resumed(monitor)
        # From now on it is the user's.
        monitor.ask("stop")
        assert not ran(monitor, query(monitor))
        saved.put_back(monitor)
    qemu.run = "paused"
    with Monitor(path) as monitor:
        assert not ran(monitor, query(monitor))


def test_left_on_without_a_word(qemu: FakeQemu, path: str) -> None:
    """Only what commands of ours switch on; a marker that somebody has made of nothing does no harm."""
    qemu.capabilities |= {"return-path": True, "xbzrle": True}
    qemu.objects[markers.SETTINGS[0]] = '{"owner": "x"}'
    with Monitor(path) as monitor:
        clear_leftovers(monitor)
    assert [name for name, state in qemu.capabilities.items() if state] == ["xbzrle"]


@pytest.mark.parametrize(
    ("version", "kvm", "loses"),
    [
        ((7, 2), False, True),
        ((8, 2), False, True),
        ((9, 0), False, False),
        ((10, 0), False, False),
        ((7, 2), True, False),
    ],
)
def test_which_qemu_loses_pages(qemu: FakeQemu, path: str, version: tuple[int, int], kvm: bool, loses: bool) -> None:
    qemu.version, qemu.kvm = version, kvm
    with Monitor(path) as monitor:
        assert loses_pages(monitor) == loses


def test_the_two_names_are_enough(qemu: FakeQemu, path: str) -> None:
    """Killed between the new one and the removal of the old: the newer counts, and both go."""
    first = begin(path)
    old = dict(qemu.objects)
    second = begin(path)
    qemu.objects |= old
    assert set(qemu.objects) == set(markers.SETTINGS)
    with Monitor(path) as monitor:
        assert left_behind(monitor).owner == second.owner != first.owner  # type: ignore[union-attr]
        third = SavedSettings()
        prepare(monitor, ON, dict(WANTED), third)
        assert left_behind(monitor).owner == third.owner  # type: ignore[union-attr]
        third.put_back(monitor)
    assert qemu.objects == {}
