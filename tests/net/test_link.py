"""From host A to host B by `vm-migrate ssh://`, with real network cards and disks: nothing is lost, whatever dies."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from conftest import Done, Guests, run
from guest.judge import as_it_was, went_on
from guest.test_agent import WITH_AGENT, answering
from guest.test_link import FEW_ROUNDS, runs
from vm import disk_counts, fsck, until
from vmstate.migrate.uri import has_aes

from net.hosts import GUEST, Client, Hosts, source_on_a, waiting_on_b

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.timeout(240)]
LINK_FAULT = Path(__file__).resolve().parents[1] / "guest/link_fault.py"
MAC = "52:54:00:00:00:01"


def move(two: Hosts, sshd: Path, *options: str, before: str = "") -> Done:
    words = shlex.join(["vm-migrate", *FEW_ROUNDS, *options, "a.qmp", f"ssh://hostb{two.folder}/b.qmp"])
    return two.sh("A", f"VM_SSH='{before}ssh -F {sshd}' {words}")


def link_fault(kind: str, when: str, deed: str, whom: str = "-") -> str:
    return shlex.join([sys.executable, str(LINK_FAULT), "once", kind, "1", when, deed, whom, "--"]) + " "


def test_the_connection_lives(guests: Guests, two: Hosts, sshd: Path) -> None:
    source, there = source_on_a(guests, two), waiting_on_b(guests, two)
    client = Client(two)
    ping = two.background("S", "exec ping -i 0.2 192.0.2.5 > ping.out 2>&1")
    done = move(two, sshd)
    assert (done.status, done.out, done.err) == (0, b"", "")
    went_on(source.count() or 0, there)
    assert source.status() == "postmigrate"
    client.lives()
    ping.send_signal(signal.SIGINT)
    ping.wait(10)
    lost = re.search(r"(\d+) packets transmitted, (\d+) received", Path(two.folder, "ping.out").read_text())
    assert lost, Path(two.folder, "ping.out").read_text()
    assert int(lost[1]) - int(lost[2]) <= 10
    # The receiver has announced it.
    assert "dev tap0" in two.sh("B", f"bridge fdb show br br0 | grep {MAC}").text
    assert "dev vB" in two.sh("S", f"bridge fdb show br br0 | grep {MAC}").text


def test_by_the_quick_cipher(guests: Guests, two: Hosts, sshd: Path) -> None:
    source, there = source_on_a(guests, two), waiting_on_b(guests, two)
    words = shlex.join(["vm-migrate", *FEW_ROUNDS, "a.qmp", f"ssh://hostb{two.folder}/b.qmp"])
    done = two.sh("A", f"VM_SSH='ssh -v -F {sshd}' {words}")
    assert done.status == 0, done.err
    used = re.search(r"kex: client->server cipher: (\S+)", done.err)
    assert used and used[1].startswith("aes128-gcm" if has_aes() else "chacha20"), done.err
    went_on(source.count() or 0, there)


def test_an_announcement_that_fails_is_a_warning(guests: Guests, two: Hosts, sshd: Path) -> None:
    source, there = source_on_a(guests, two), waiting_on_b(guests, two)
    # Its bridge goes away behind QEMU's back.
    two.sh("B", "ip link set tap0 nomaster; ip link set tap0 down")
    done = move(two, sshd)
    assert done.status == 0, done.err
    assert "the guest runs, but was not announced in the network" in done.err
    went_on(source.count() or 0, there)


def test_it_is_announced_as_by_vm_announce(guests: Guests, two: Hosts, sshd: Path, work: Path) -> None:
    """With what its agent knows, and the frames are seen to leave; -v of the receiver says so."""
    agent = {"agent": True, "append": f"ip={GUEST}/24"}
    source = guests.running("a", qemu=two.qemu("A"), net=two.tap(), **agent)
    there = guests.waiting("b", qemu=two.qemu("B"), net=two.tap(), **agent)
    capture = two.background("B", "exec tcpdump -U -i eth0 -w announced.pcap arp 2> tcpdump.err")
    words = work / "tcpdump.err"
    until(lambda: words.exists() and "listening" in words.read_text(), 20, "tcpdump listens")
    command = f"ssh -F {sshd} hostb vm-restore -v --receive {two.folder}/b.qmp"
    done = two.sh("A", shlex.join(["vm-migrate", *FEW_ROUNDS, "a.qmp", f"link:{command}"]))
    assert done.status == 0, done.err
    went_on(source.count() or 0, there)
    assert f"{MAC} is announced on br0, the bridge of tap0" in done.err
    assert re.search(rf"{MAC}: \d+ frames have left br0", done.err), done.err
    capture.send_signal(signal.SIGINT)
    capture.wait(10)
    seen = two.sh("B", f"tcpdump -n -e -r announced.pcap 2> /dev/null | grep '{MAC} > ff:ff' | grep -c '{GUEST}'")
    assert int(seen.text) >= 5, done.err


def test_unless_told_not_to(guests: Guests, two: Hosts, sshd: Path) -> None:
    source, there = source_on_a(guests, two), waiting_on_b(guests, two)
    two.sh("B", "ip link set tap0 nomaster; ip link set tap0 down")
    done = move(two, sshd, "--no-announce")
    assert (done.status, done.err) == (0, "")
    went_on(source.count() or 0, there)


def test_a_host_that_may_only_receive(guests: Guests, two: Hosts, sshd: Path, work: Path) -> None:
    """One key, one socket: whatever the other side asks for."""
    allowed = (work / "allowed").read_text()
    (work / "allowed").write_text(f'restrict,command="vm-restore --receive {work}/b.qmp" {allowed}')
    source, there = source_on_a(guests, two), waiting_on_b(guests, two)
    done = two.sh("A", f"ssh -F {sshd} hostb 'touch {work}/pwned' < /dev/null")
    assert done.status != 0
    assert not (work / "pwned").exists()
    done = two.sh("A", f"VM_SSH='ssh -F {sshd}' vm-migrate --downtime 300 a.qmp ssh://hostb/whatever")
    assert (done.status, done.err) == (0, "")
    went_on(source.count() or 0, there)
    done = two.sh("A", f"VM_SSH='ssh -F {sshd}' vm-migrate --recover a.qmp ssh://hostb/whatever")
    assert (done.status, done.text) == (0, "a.qmp: the guest is on the other side, and 'running'\n")


def test_a_host_that_is_not_reached(guests: Guests, two: Hosts, sshd: Path) -> None:
    source = source_on_a(guests, two)
    done = move(two, sshd, before="false ")
    assert done.status == 1
    assert "the link is lost: its command ended with status 1" in done.err
    two.link("B", "down")
    done = two.sh("A", f"VM_SSH='ssh -F {sshd} -o ConnectTimeout=2' vm-migrate a.qmp ssh://hostb/b.qmp")
    assert done.status == 1
    assert "255 is ssh's own" in done.err
    as_it_was(source)


def test_the_network_goes_away(guests: Guests, two: Hosts, sshd: Path) -> None:
    source = source_on_a(guests, two)
    waiting_on_b(guests, two)
    client = Client(two)
    brief = f"ssh -F {sshd} -o ServerAliveInterval=1 -o ServerAliveCountMax=2"
    uri = f"ssh://hostb{two.folder}/b.qmp"
    moving = two.background("A", f"VM_SSH='{brief}' vm-migrate --speed 20m a.qmp {uri} 2> words")
    until(lambda: source.cmd("query-migrate").get("ram", {}).get("transferred", 0) > 5 << 20, 20, "under way")
    two.link("B", "down")
    assert moving.wait(60) == 1
    assert "; the guest runs on\n" in Path(two.folder, "words").read_text()
    as_it_was(source)
    client.lives()


@pytest.mark.parametrize(("kind", "who"), [("D", "ssh"), ("L", "sshd"), ("G", "ssh")])
def test_ssh_dies(guests: Guests, two: Hosts, sshd: Path, who: str, kind: str) -> None:
    """The client is the child of link_fault.py; the server's process of this connection ends with its descriptor."""
    source, there = source_on_a(guests, two), waiting_on_b(guests, two)
    client = Client(two)
    if who == "ssh":
        done = move(two, sshd, "--timeout-handover", "5", before=link_fault(kind, "after", "kill", "receiver"))
    else:
        # OpenSSH 9.8 has it as sshd-session; another one of this machine is none of ours.
        sessions = "pkill -KILL --ns $$ --nslist net -f 'sshd(-session)?: root@notty'"
        two.background("B", f"until [ -e {two.folder}/once ]; do sleep 0.02; done; {sessions}")
        done = move(two, sshd, "--timeout-handover", "5", before=link_fault(kind, "after", "pause", "1"))
    running = [guest for guest in (source, there) if runs(guest)]
    assert len(running) == 1, (source.status(), there.status(), done.err)
    assert (done.status, running[0]) in ((0, there), (1, source)), done.err
    if kind != "D":
        # Granted before its death, and asked anew; or taken back.
        assert (running[0] is there) == (done.status == 0)
    client.lives()


# Disks


def log_of(disk: Path, kind: str) -> list[int]:
    if kind == "raw":
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.with_suffix(".raw"), disk)
    status, words = fsck(disk)
    assert status == 0, words
    return disk_counts(disk)


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_disk_that_both_see(guests: Guests, two: Hosts, sshd: Path, disk: Path, kind: str) -> None:
    path = disk.with_suffix(f".{kind}")
    source = guests.with_disk(path, qemu=two.qemu("A"))
    source.wait_count(5)
    there = guests.waiting("b", qemu=two.qemu("B"), disk=path)
    done = move(two, sshd)
    assert (done.status, done.err) == (0, "")
    stood = source.count() or 0
    there.wait_count(stood + 10)
    assert source.errors() == there.errors() == 0
    source.end()
    there.end()
    log = log_of(disk, kind)
    assert log == list(range(1, len(log) + 1))
    assert len(log) >= stood + 9


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_disk_of_one_taken_back(guests: Guests, two: Hosts, sshd: Path, disk: Path, kind: str) -> None:
    """The other one is loaded, and has not taken the image."""
    path = disk.with_suffix(f".{kind}")
    source = guests.with_disk(path, qemu=two.qemu("A"))
    there = guests.waiting("b", qemu=two.qemu("B"), disk=path)
    done = move(two, sshd, before=link_fault("L", "before", "cut"))
    assert done.status == 1, done.err
    until(lambda: there.status() == "paused", 10, "loaded", lambda: f"{there.status()} {done.err} {there.stderr()}")
    as_it_was(source)
    source.wait_count((source.count() or 0) + 10)
    assert source.errors() == 0
    there.end()
    source.end()
    log = log_of(disk, kind)
    assert log == list(range(1, len(log) + 1))


def test_a_disk_locked_by_another(guests: Guests, two: Hosts, sshd: Path, disk: Path) -> None:
    """Granted, but it cannot run: the way out is printed, and works once the lock is gone."""
    source = guests.with_disk(disk, qemu=two.qemu("A"))
    there = guests.waiting("b", qemu=two.qemu("B"), disk=disk)
    before, uri = link_fault("G", "before", "pause", "6"), f"ssh://hostb{two.folder}/b.qmp"
    ssh = f"VM_SSH={shlex.quote(f'{before}ssh -F {sshd}')}"
    moving = two.background("A", f"{ssh} vm-migrate --downtime 300 --timeout-handover 1 a.qmp {uri} 2> words")
    until(lambda: source.status() == "postmigrate", 30, "given away")
    third = guests.start(
        "c", kind="metal", mem=64, extra=["-drive", f"if=none,id=d,file={disk}", "-device", "virtio-blk-pci,drive=d"]
    )
    assert third.alive()
    status = moving.wait(60)
    words = Path(two.folder, "words").read_text()
    assert status == 5, words
    assert 'Failed to get "write" lock' in words
    assert (source.status(), there.status()) == ("postmigrate", "paused")
    third.end()
    assert there.alive()
    done = two.sh("A", f"{ssh} vm-migrate --recover a.qmp {uri}")
    assert (done.status, done.text) == (0, "a.qmp: the guest is on the other side, and 'running'\n"), done.err
    there.wait_advance()
    assert there.errors() == 0


def test_a_disk_that_is_another_there(guests: Guests, two: Hosts, sshd: Path, disk: Path, work: Path) -> None:
    source = guests.with_disk(disk, qemu=two.qemu("A"))
    other = work / "other.qcow2"
    assert run("qemu-img", "create", "-q", "-f", "qcow2", other, "64M").status == 0
    guests.waiting("b", qemu=two.qemu("B"), disk=other)
    done = move(two, sshd)
    assert done.status == 4, done.err
    assert "disk0" in done.err
    as_it_was(source)


def test_the_guest_keeps_its_time(guests: Guests, two: Hosts, sshd: Path) -> None:
    """The monotonic clock never goes back, and the wall clock is set by the agent where asked to."""
    source = guests.running("a", qemu=two.qemu("A"), **WITH_AGENT)
    there = guests.waiting("b", qemu=two.qemu("B"), **WITH_AGENT)
    answering(source)
    # Slow, so that the guest stands still for long enough to tell.
    done = move(two, sshd, "--clock", before=link_fault("L", "before", "pause", "3"))
    assert (done.status, done.err) == (0, "")
    there.wait_count((source.count() or 0) + 5)
    times = [*source.uptimes(), *there.uptimes()]
    assert times == sorted(times)
    ask = "from vmstate.qemu import guest_agent; import time; print(guest_agent.time_of('b.agent') / 1e9 - time.time())"
    found = two.sh("B", f"{sys.executable} -c {shlex.quote(ask)}")
    assert abs(float(found.text)) < 1.5, found.err


def test_a_clock_that_cannot_be_set(guests: Guests, two: Hosts, sshd: Path) -> None:
    source, there = source_on_a(guests, two), waiting_on_b(guests, two)
    done = move(two, sshd, "--clock")
    assert done.status == 0
    assert "the clock of the guest was not set: it has no port for a guest agent" in done.err
    went_on(source.count() or 0, there)


def test_many_times_back_and_forth(guests: Guests, two: Hosts) -> None:
    """A few times here, fifty in tests/long."""
    back_and_forth(guests, two, 3)


def back_and_forth(guests: Guests, two: Hosts, times: int) -> None:
    source = source_on_a(guests, two)
    client = Client(two)
    name, guest = "A", source
    for number in range(times):
        there = guests.waiting(
            f"g{number}", qemu=two.qemu("B" if name == "A" else "A"), net=two.tap(), append="ip=192.0.2.5/24"
        )
        receiver = shlex.join(
            ["ip", "netns", "exec", two.name("B" if name == "A" else "A"), "vm-restore", "--receive", there.qmp]
        )
        done = two.sh(
            name, f"vm-migrate --downtime 300 --after quit {guest.name}.qmp {shlex.quote(f'link:{receiver}')}"
        )
        assert done.status == 0, done.err
        guest.wait_gone()
        assert runs(there)
        name, guest = "B" if name == "A" else "A", there
        client.lives()
    guest.wait_sum()
    assert len(set(guest.sums())) == 1
