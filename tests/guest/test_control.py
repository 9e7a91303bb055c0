"""vm-cancel and vm-speed beside a dump that runs, on a guest with one monitor for all of them."""

import subprocess
from pathlib import Path

import pytest
from conftest import Guests, shell
from vm import Guest, until

from guest.judge import as_it_was, still_waits

MIB = 1 << 20


def sent(guest: Guest) -> int:
    return int(guest.cmd("query-migrate").get("ram", {}).get("transferred", 0))


def dumping(work: Path, guest: Guest, *options: str) -> "subprocess.Popen[bytes]":
    """A dump that is under way."""
    dump = subprocess.Popen(["vm-dump", *options, "a.qmp"], cwd=work, stderr=subprocess.PIPE)
    until(lambda: sent(guest) > MIB, 20, "under way")
    return dump


@pytest.mark.parametrize("options", [(), ("--stop",)])
def test_a_dump_is_cancelled(guests: Guests, work: Path, options: tuple[str, ...]) -> None:
    source = guests.running()
    dump = dumping(work, source, "--speed", "20m", "-o", "s", *options)
    try:
        done = shell("vm-cancel -v a.qmp", work)
        assert done.status == 0, done.err
        assert done.err.startswith("vm-cancel: note: the guest is '")
        _, err = dump.communicate(timeout=30)
    finally:
        dump.kill()
        dump.wait(10)
    assert (dump.returncode, err) == (1, b"vm-dump: error: the migration was cancelled; the guest runs on\n")
    as_it_was(source)
    assert not Path(work, "s").exists()
    done = shell("vm-cancel a.qmp", work)
    assert done.status == 1
    assert "a.qmp is not migrating (cancelled)" in done.err


def test_cancelled_while_the_sink_holds_the_last_bytes(guests: Guests, work: Path) -> None:
    """QEMU has sent everything and waits, the guest stopped, for the word that it was taken."""
    source = guests.running()
    dump = subprocess.Popen(["vm-dump", "--to", "cat > s; sleep 60", "a.qmp"], cwd=work, stderr=subprocess.PIPE)
    try:
        source.wait_status("finish-migrate")
        done = shell("vm-cancel a.qmp", work)
        assert (done.status, done.err) == (0, "")
        # Nobody had to tell it: QEMU let the guest run on.
        assert source.running()
    finally:
        dump.kill()
        dump.wait(10)
    source.wait_advance()


def test_the_rate_of_a_dump_that_runs(guests: Guests, work: Path) -> None:
    source = guests.running()
    dump = dumping(work, source, "--speed", "1m", "-q", "--after", "running", "-o", "s")
    try:
        # At a mebibyte a second it would take minutes.
        assert shell("vm-speed a.qmp 0", work).status == 0
        assert dump.wait(40) == 0
    finally:
        dump.kill()
        dump.wait(10)
    # What was set meanwhile is not undone by the dump.
    assert source.cmd("query-migrate-parameters")["max-bandwidth"] == 0


@pytest.mark.parametrize(("rate", "wanted"), [("50m", 50 * MIB), ("1.5G", 1536 * MIB), ("700000", 700000), ("0", 0)])
def test_rates(guests: Guests, work: Path, rate: str, wanted: int) -> None:
    guest = guests.start("a", kind="metal")
    done = shell(f"VM_GUEST=a.qmp vm-speed {rate}", work)
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert guest.cmd("query-migrate-parameters")["max-bandwidth"] == wanted


@pytest.mark.parametrize("rate", ["fast", "-1", "10x", "1e9", ""])
def test_what_is_no_rate(work: Path, rate: str) -> None:
    done = shell(f"vm-speed a.qmp -- '{rate}'" if rate.startswith("-") else f"vm-speed a.qmp '{rate}'", work)
    assert done.status == 2, done.err


def test_a_guest_that_waits_is_not_cancelled(guests: Guests, work: Path) -> None:
    guest = guests.waiting("b", kind="metal")
    done = shell("vm-cancel b.qmp", work)
    assert done.status == 1
    assert "is the one that takes a state" in done.err
    still_waits(guest)
