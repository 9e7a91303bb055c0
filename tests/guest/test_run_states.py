"""Guests in the run states that are neither running nor paused: what is refused, and what a reset does not change."""

import subprocess
from pathlib import Path

import pytest
from conftest import Guests, shell
from vm import Guest, until

from guest.test_link import RECEIVER, gated, given_away, move

# QEMU keeps a guest that would reset itself, or power itself off, as one that has shut down.
OFF = ["-no-reboot", "-no-shutdown"]
SLEEPS = ["-global", "ICH9-LPC.disable_s3=0"]


def refused(work: Path, name: str) -> None:
    """vm-cont does not let it run, and vm-status does not advise it."""
    done = shell(f"vm-cont {name}.qmp", work)
    assert done.status == 5, done.err
    assert f"next: vm-cont {name}.qmp\n" not in shell(f"vm-status {name}.qmp", work).text


def test_a_reset_gives_no_leave_to_run(guests: Guests, work: Path) -> None:
    source, there = given_away(guests, work)
    for guest in (source, there):
        guest.cmd("system_reset")
    assert (source.status(), there.status()) == ("prelaunch", "prelaunch")
    refused(work, "a")
    refused(work, "b")
    assert "was reset since" in shell("vm-status b.qmp", work).text
    # What its source would let go is not there any more, and nobody says otherwise.
    done = shell(f"vm-migrate --recover a.qmp 'link:{RECEIVER}'", work)
    assert done.status == 5
    assert "may run where it was sent to (reset)" in done.err
    assert (source.status(), there.status()) == ("prelaunch", "prelaunch")


def test_a_reset_of_one_that_has_arrived_elsewhere(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.waiting()
    assert move(work, f"link:{RECEIVER}").status == 0
    source.cmd("system_reset")
    refused(work, "a")
    # Nor is it moved once more.
    assert shell("vm-dump -o s a.qmp", work).status == 5
    assert there.running()


def test_a_reset_of_a_copy_that_its_source_has_taken_back(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.waiting()
    assert move(work, gated("L", "before", "cut")).status == 1
    there.cmd("system_reset")
    refused(work, "b")
    assert source.running()


def test_one_that_has_shut_down(guests: Guests, work: Path) -> None:
    source = guests.start("a", kind="metal", mem=32, extra=OFF)
    source.cmd("system_reset")
    assert source.wait_status("shutdown")
    for line in ("vm-dump --after running -o s a.qmp", "vm-cont a.qmp", "vm-migrate a.qmp exec:cat"):
        done = shell(line, work)
        assert done.status == 1, line
        assert "has shut down" in done.err
    assert source.status() == "shutdown"
    status = shell("vm-status a.qmp", work).text
    assert "has shut down" in status
    assert "next:" not in status


@pytest.mark.parametrize("after", ["running", "paused"])
def test_one_that_shuts_down_while_it_is_saved(guests: Guests, work: Path, after: str) -> None:
    """QEMU goes on with the migration, and has forgotten behind it that the guest may not run on."""
    source = guests.start("a", kind="metal", mem=32, extra=OFF)
    line = ["vm-dump", "--after", after, "--speed", "2m", "-o", "s", "a.qmp"]
    dump = subprocess.Popen(line, cwd=work, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: source.cmd("query-migrate").get("status") == "active", 20, "begun")
        source.cmd("system_reset")
        assert source.wait_status("shutdown")
        assert shell("vm-speed a.qmp 0", work).status == 0
        _, err = dump.communicate(timeout=30)
    finally:
        dump.kill()
        dump.wait(10)
    assert dump.returncode == 1
    assert "has shut down while its state was being sent" in err
    assert source.status() in ("postmigrate", "shutdown")
    assert not (work / "s").exists()
    done = shell("vm-cont a.qmp", work)
    assert (done.status, "has shut down: it cannot run on" in done.err) == (1, True)
    assert "vm-cont" not in shell("vm-status a.qmp", work).text
    source.cmd("set-action", reboot="reset")
    source.cmd("system_reset")
    assert shell("vm-cont a.qmp", work).status == 0
    assert source.status() == "running"


def test_one_that_never_ran_is_not_started(guests: Guests, work: Path) -> None:
    source = guests.start("a", kind="metal", mem=32, extra=["-S"])
    done = shell("vm-dump --after running -o s a.qmp", work)
    assert done.status == 0, done.err
    assert "was 'prelaunch', and is not let run" in done.err
    assert source.status() == "postmigrate"
    assert shell("vm-cont a.qmp", work).status == 0


def asleep(guests: Guests, name: str = "a") -> Guest:
    guest = guests.start(name, extra=SLEEPS, append="sleep=3")
    guest.wait_status("suspended")
    return guest


def test_one_that_sleeps(guests: Guests, work: Path) -> None:
    """From 9.0 on QEMU would end over its `cont`; before it wakes it, which is said."""
    source = asleep(guests)
    old = source.cmd("query-version")["qemu"]["major"] < 9
    there = guests.waiting(extra=SLEEPS)
    for line in ("vm-dump --after running -o s a.qmp", f"vm-migrate a.qmp 'link:{RECEIVER}'"):
        if old and "vm-migrate" in line:
            continue
        done = shell(line, work)
        assert done.status == (0 if old else 1), done.err
        assert ("wakes it when it goes on" if old else "could not let it go on after this") in done.err
    assert source.alive()
    assert source.status() == ("running" if old else "suspended")
    assert there.status() == "inmigrate"


def test_one_that_sleeps_is_saved_by_a_snapshot(guests: Guests, work: Path) -> None:
    source = asleep(guests)
    done = shell("vm-dump --snapshot -o s a.qmp", work)
    assert done.status == 0, done.err
    assert shell("vm-verify s", work).status == 0
    assert source.status() == "suspended" or "wakes it" in done.err


def test_one_that_shuts_down_and_whose_dump_is_killed(guests: Guests, work: Path) -> None:
    """Nobody lets it run again: not the watchdog, and not whoever is told what to do by vm-status."""
    source = guests.start("a", kind="metal", mem=32, extra=OFF)
    dump = subprocess.Popen(["vm-dump", "--speed", "2m", "--to", "cat > s; sleep 60", "a.qmp"], cwd=work)
    try:
        until(lambda: source.cmd("query-migrate").get("status") == "active", 20, "begun")
        source.cmd("system_reset")
        assert source.wait_status("shutdown")
    finally:
        dump.kill()
        dump.wait(10)
    until(lambda: "hands of" not in shell("vm-status a.qmp", work).text, 20, "the watchdog has ended")
    assert source.status() in ("shutdown", "postmigrate")
    assert shell("vm-cont a.qmp", work).status == 1
    assert "vm-cont" not in shell("vm-status a.qmp", work).text
