"""vm-dump --snapshot: the state of one instant, while the guest goes on."""

import json
import os
import re
import signal
import subprocess
import warnings
from pathlib import Path

import pytest
from conftest import Guests, run, shell
from vm import MAC, Guest, until
from vmstate.qemu import hugepages

from guest.judge import as_it_was, went_on
from guest.test_failure import RATE, dumper, end, start


def active(guest: Guest) -> bool:
    return guest.cmd("query-migrate").get("status") == "active"


def test_the_guest_goes_on_and_its_state_is_of_one_instant(guests: Guests, work: Path) -> None:
    source = guests.running()
    before = source.wait_advance()
    done = shell("vm-dump --json --snapshot a.qmp > s", work)
    assert done.status == 0, done.err
    said = json.loads(done.err.splitlines()[-1])
    assert (said["type"], said["state"], said["saved"]) == ("result", "running", "running")
    # How long it takes is for the bench; here that it is a pause of QEMU's own, and was seen.
    assert 0 < said["downtime_ms"] < 2000
    as_it_was(source)
    after = source.count() or 0
    target = guests.waiting()
    assert shell("vm-restore b.qmp < s", work).status == 0
    first = target.counts()[0] if target.counts() else target.wait_advance()
    assert before <= first <= after + 2
    target.wait_sum()
    assert len({*source.sums(), *target.sums()}) == 1


def test_many_in_a_row_each_of_its_own_instant(guests: Guests, work: Path) -> None:
    source = guests.running()
    script = "; ".join(f"vm-dump -q --snapshot a.qmp | vm-compress > {n}.vmz" for n in range(3))
    assert shell(f"set -e; {script}", work).status == 0
    as_it_was(source)
    seen = []
    for number in range(3):
        name = f"t{number}"
        with guests.waiting(name) as target:
            assert shell(f"vm-restore {name}.qmp < {number}.vmz", work).status == 0
            until(target.counts, 20, "it counts")
            assert target.running()
            seen.append(target.counts()[0])
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]


def test_its_state_is_restored_lazily_too(guests: Guests, work: Path) -> None:
    source = guests.running()
    assert shell("vm-dump -q --snapshot a.qmp | vm-compress > s.vmz", work).status == 0
    stood = source.count() or 0
    target = guests.waiting()
    assert shell("vm-restore --lazy b.qmp < s.vmz", work).status == 0
    assert target.running()
    assert (target.counts() or [stood])[0] <= stood + 2
    target.wait_sum()


def test_a_guest_that_stands_stays_so(guests: Guests, work: Path) -> None:
    source = guests.running()
    stood = source.count() or 0
    source.cmd("stop")
    done = shell("vm-dump -v --snapshot a.qmp > s", work)
    assert done.status == 0, done.err
    assert "the guest stands paused" in done.err
    assert source.status() in ("paused", "postmigrate")
    assert source.standing()
    assert shell("vm-cont a.qmp", work).status == 0
    went_on(stood, source)


def test_a_slow_sink_does_not_hold_a_guest_that_writes(guests: Guests, work: Path) -> None:
    """What it dirties meanwhile is not sent again: the size of one pass."""
    source = guests.running(append="dirty=16")
    done = shell("vm-dump -q --snapshot --speed 40m a.qmp > s; vm-verify -v s", work)
    assert done.status == 0, done.err
    assert source.running()
    found = json.loads(run("vm-inspect", "--json", work / "s").text)
    assert found["how"] == "background snapshot"
    assert all(block["resent"] == 0 for block in found["blocks"])


def test_the_sink_goes_away_and_the_guest_that_writes_goes_on(guests: Guests, work: Path) -> None:
    """QEMU 7.2 cannot end a snapshot early: the guest would wait for ever at its next write to a page not yet sent."""
    source = guests.running(append="dirty=16")
    done = shell("vm-dump --snapshot --speed 40m a.qmp | head -c 9000000 > s", work)
    assert done.status == 1
    assert "the reader of standard output went away; the guest runs on" in done.err
    assert source.running()
    now = source.count() or 0
    source.wait_count(now + 20)
    as_it_was(source)


def test_a_sink_that_fails_or_goes_away(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-dump --snapshot --to 'cat > s; exit 3' a.qmp", work)
    assert (done.status, done.err) == (
        1,
        "vm-dump: error: the sink 'cat > s; exit 3' ended with status 3; the guest runs on\n",
    )
    as_it_was(source)
    done = shell("vm-dump --snapshot a.qmp | head -c 9000000 > s", work)
    assert done.status == 1
    as_it_was(source)
    assert shell("vm-dump --snapshot -o s.state a.qmp; vm-verify s.state", work).status == 0
    as_it_was(source)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle(guests: Guests, work: Path, number: int) -> None:
    """The guest runs on, and nothing is left switched on in its QEMU: the guard sees to that."""
    source = guests.running()
    process = start(work, "vm-dump -q --snapshot --speed 20m a.qmp > s")
    try:
        until(lambda: active(source), 20, "the snapshot is on its way")
        os.kill(dumper(process.pid), number)
        process.wait(60)
    finally:
        end(process)
    until(lambda: not active(source), 20, "QEMU has given up")
    until(
        lambda: not [c for c in source.cmd("query-migrate-capabilities") if c["state"]], 20, "capabilities are put back"
    )
    assert source.running()
    assert shell("vm-dump -q --after running a.qmp > s2; vm-verify s2", work).status == 0
    assert source.running()


def test_killed_together_with_its_guard(guests: Guests, work: Path) -> None:
    """Nobody is left who takes what QEMU sends: 7.2 leaves the guest waiting, until it is let go."""
    source = guests.running(append="dirty=16")
    process = start(work, f"vm-dump -q --snapshot --speed {RATE} a.qmp > s")
    try:
        until(lambda: active(source), 20, "the snapshot is on its way")
        shell(f"pkill -9 -f '[-]-speed {RATE}'", work)
        process.wait(60)
    finally:
        end(process)
    silent = "hint: its sink is slow; or, where no vm-dump is at work any more: vm-cont --force a.qmp"
    if not source.running():
        status = shell("vm-status a.qmp", work)
        lost = "stands still: its pages are protected still, for a snapshot that was lost\nnext: vm-cont a.qmp"
        assert lost in status.text or silent in status.err, status
    done = shell(f"vm-cont {'--force' if silent in shell('vm-status a.qmp', work).err else ''} a.qmp", work)
    assert (done.status, done.err) == (0, "")
    assert source.running()
    source.cmd("migrate-set-parameters", **{"max-bandwidth": 128 << 20})
    for options in ("--snapshot", "--after running"):
        done = shell(f"vm-dump -q {options} a.qmp > s", work)
        assert done.status == 0 or "its QEMU is left with a snapshot that was lost" in done.err
    as_it_was(source)


def test_it_is_not_cancelled(guests: Guests, work: Path) -> None:
    """QEMU 7.2 would leave the guest's pages protected."""
    source = guests.running()
    process = start(work, "vm-dump -q --snapshot --speed 20m a.qmp > s")
    try:
        until(lambda: active(source), 20, "the snapshot is on its way")
        done = shell("vm-cancel a.qmp", work)
        assert done.status == 1
        assert "is not cancelled" in done.err
        assert "end the vm-dump that makes it" in done.err
        assert process.wait(60) == 0
    finally:
        end(process)
    assert shell("vm-verify s", work).status == 0
    as_it_was(source)


def test_its_connection_does_not_break(guests: Guests, work: Path) -> None:
    its_connection_does_not_break(guests, work, 3)


def its_connection_does_not_break(guests: Guests, work: Path, times: int) -> None:
    """Bytes go back and forth to the echo in the guest while it is saved again and again, into 0.vmz and so on."""
    net = ["-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:0-:7", "-device", f"virtio-net-pci,netdev=n,mac={MAC},romfile="]
    with guests.start("a", net=net, append="ip=10.0.2.15/24") as source:
        source.wait_ready(60)
        source.wait_count(2)
        text = source.cmd("human-monitor-command", **{"command-line": "info usernet"})
        port = next(line.split()[3] for line in text.splitlines() if "HOST_FORWARD" in line)
        over = work / "over"
        talk = (
            "import os, socket, sys\n"
            f"s = socket.create_connection(('127.0.0.1', {port}), 20); s.settimeout(20)\n"
            f"n = 0\nwhile not os.path.exists({str(over)!r}):\n"
            "    s.sendall(b'%08d' % n); assert s.recv(8, socket.MSG_WAITALL) == b'%08d' % n; n += 1\n"
            "print(n)\n"
        )
        with subprocess.Popen(["python3", "-c", talk], stdout=subprocess.PIPE, text=True) as talking:
            save = f"set -e; for i in {{1..{times}}}; do vm-dump -q --snapshot a.qmp | vm-compress > $i.vmz; done"
            done = shell(save, work, timeout=200)
            over.touch()
            assert done.status == 0, done.err
            said, _ = talking.communicate(timeout=60)
        assert talking.returncode == 0
        assert int(said) > 10


@pytest.mark.root
@pytest.mark.nobody
def test_a_host_that_forbids_it(guests: Guests, work: Path, forbidden: None) -> None:
    """Without the rights for userfaultfd: a reason, and nothing has begun; or a live dump."""
    os.chmod(work, 0o755)
    source = guests.running(user=65534)
    done = shell("vm-dump --snapshot a.qmp > s", work)
    assert done.status == 1
    assert "vm-dump: error: no snapshot of the guest at a.qmp: " in done.err
    assert "--snapshot-or-live" in done.err
    as_it_was(source)
    done = shell("vm-dump --snapshot-or-live a.qmp > s; vm-verify s", work)
    assert done.status == 0, done.err
    assert "vm-dump: warning: saved live instead: no snapshot of the guest" in done.err
    as_it_was(source)


@pytest.mark.parametrize("options", ["--stop", "--after paused", "--after quit", "--downtime 5"])
def test_what_does_not_go_with_it(options: str, work: Path) -> None:
    done = shell(f"vm-dump --snapshot {options} a.qmp > s", work)
    assert done.status == 2
    assert "--snapshot does not go with" in done.err


def huge(guest: Guest) -> int:
    """The memory in huge pages, in KiB; that of zeros counts for nothing."""
    found = [
        line.split()[1]
        for line in Path(f"/proc/{guest.pid}/smaps_rollup").read_text().splitlines()
        if "AnonHuge" in line
    ]
    return int(found[0])


@pytest.mark.root
def test_the_huge_pages_are_whole_again(guests: Guests, work: Path) -> None:
    """A snapshot splits them, and takes no more memory for that they are made whole."""
    source = guests.running()
    # It reads all RAM: what was never used is the huge page of zeros then, which must not become memory.
    assert shell("vm-dump -q --after running a.qmp > s", work).status == 0
    before = huge(source)
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 7) or before < 30 << 10:
        warnings.warn("not available in this kernel: PAGEMAP_SCAN, or huge pages", stacklevel=1)
        return
    found = sum(end - begin for begin, end in hugepages.find(source.pid)) >> 10
    assert 0.9 * before <= found <= 1.1 * before
    resident = Path(f"/proc/{source.pid}/statm")
    had = int(resident.read_text().split()[1])
    assert shell("vm-dump -q --snapshot a.qmp > s", work).status == 0
    assert huge(source) >= 0.9 * before
    # QEMU takes some for itself meanwhile; the pages of zeros would be four times as much.
    assert int(resident.read_text().split()[1]) <= 1.2 * had
    as_it_was(source)
