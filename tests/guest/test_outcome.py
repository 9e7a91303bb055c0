"""Where a guest runs is never decided by what is printed, or cannot be."""

from pathlib import Path

import pytest
from conftest import Guests, shell
from vm import Guest, until

NOWHERE = [">&-", "> /dev/full", "| true", "<&- >&- 2>&-", "2> /dev/full > /dev/full"]
MODES = ["", "--json", "-v"]


def runs(guest: Guest) -> bool:
    try:
        return guest.alive() and guest.status() == "running"
    except OSError:
        return False


def one_runs(source: Guest, there: Guest) -> None:
    """The one that it was sent to."""
    assert runs(there)
    assert not runs(source)


def pair(guests: Guests) -> tuple[Guest, Guest]:
    return guests.start("a", kind="metal"), guests.waiting("b", kind="metal")


@pytest.mark.parametrize("where", [">&-", "> /dev/full", "2> /dev/full", "<&- >&- 2>&-"])
def test_a_dump(guests: Guests, work: Path, where: str) -> None:
    source = guests.start("a", kind="metal")
    for mode in MODES:
        assert shell(f"vm-dump --stop {mode} -o s a.qmp {where}", work).status == 0
        assert source.standing()
        assert shell("vm-verify s", work).status == 0
        assert shell("vm-cont a.qmp", work).status == 0


@pytest.mark.parametrize("options", ["", "--snapshot", "--stop", "--after running"])
def test_a_dump_to_an_output_that_is_closed(guests: Guests, work: Path, options: str) -> None:
    """Before anything is touched."""
    source = guests.start("a", kind="metal")
    done = shell(f"vm-dump {options} a.qmp >&-", work)
    assert (done.status, "standard output is closed" in done.err) == (2, True)
    assert runs(source)
    assert source.cmd("query-migrate") == {}


@pytest.mark.parametrize("where", NOWHERE)
def test_a_move(guests: Guests, work: Path, where: str) -> None:
    source, there = pair(guests)
    mode = "--json" if "full" in where else "-v"
    assert shell(f"vm-migrate {mode} a.qmp 'link:vm-restore --receive b.qmp' {where}", work).status == 0
    one_runs(source, there)


@pytest.mark.parametrize("where", [">&-", "> /dev/full", "| true", ">&- 2>&-"])
@pytest.mark.parametrize("mode", MODES)
def test_a_restore(guests: Guests, work: Path, where: str, mode: str) -> None:
    source, there = pair(guests)
    assert shell("vm-dump -q -o s a.qmp", work).status == 0
    assert shell(f"vm-restore --run {mode} b.qmp < s {where}", work).status == 0
    one_runs(source, there)


@pytest.mark.parametrize("where", NOWHERE)
@pytest.mark.parametrize("mode", ["", "--json"])
def test_a_restore_as_the_sink_of_a_dump(guests: Guests, work: Path, where: str, mode: str) -> None:
    """A status that is not 0 would have the source run on as well."""
    source, there = pair(guests)
    where = where.replace("<&- ", "")
    done = shell(f"vm-dump -q --to 'vm-restore {mode} b.qmp {where}' a.qmp", work)
    assert done.status == 0, done.err
    one_runs(source, there)


def test_a_sink_without_an_input(guests: Guests, work: Path) -> None:
    source, there = pair(guests)
    assert shell("vm-dump -q --to 'vm-restore b.qmp <&-' a.qmp", work).status == 1
    assert runs(source)
    assert there.status() == "inmigrate"


@pytest.mark.parametrize("where", NOWHERE)
@pytest.mark.parametrize("mode", ["", "--json"])
def test_a_lazy_restore(guests: Guests, work: Path, where: str, mode: str) -> None:
    """Its guest is served to the end."""
    source, there = pair(guests)
    assert shell("vm-dump -q --to 'vm-compress -o s.vmz' a.qmp", work).status == 0
    where = where.replace("<&- ", "")
    assert shell(f"vm-restore --lazy --run {mode} b.qmp < s.vmz {where}", work).status == 0
    one_runs(source, there)
    until(lambda: there.cmd("query-migrate").get("status") == "completed", 10, "all of it is there")
