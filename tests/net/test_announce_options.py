"""vm-announce beyond its lines: where addresses come from, other places, when it ends, a host with many guests."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from scapy.all import ARP, Dot1Q, Ether, ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from vmstate.net import frames
from vmstate.net.nic import Nic

from net import wires
from net.wires import (
    COMMAND,
    ENVIRONMENT,
    FAST,
    NO_CAPABILITY,
    ONE,
    ONLY_RAW,
    TWO,
    WAIT,
    add_tap,
    entry_of,
    forwards,
    learned,
    of,
    until,
    waits,
)

pytestmark = pytest.mark.root
namespaces, place, qemu = wires.namespaces, wires.place, wires.qemu
ONCE = ("--rounds", "1")
THREE = "52:54:00:12:34:58"

# Opens a tap as QEMU does, and sends the frames that come as lines of hex as its guest; tells what it is sent.
GUEST = """
import fcntl, os, select, struct, sys
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x1002))
print("ready", flush=True)
for line in sys.stdin:
    os.write(fd, bytes.fromhex(line))
"""


@contextlib.contextmanager
def guest_on(host, tap):
    """A function that has a guest on this tap send a frame."""
    command = host.command(sys.executable, "-c", GUEST, tap)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def send(packet):
            process.stdin.write(bytes(packet).hex() + "\n")
            process.stdin.flush()

        try:
            assert process.stdout.readline() == "ready\n"
            forwards(host, tap)
            yield send
        finally:
            process.kill()


@contextlib.contextmanager
def running(host, *arguments, before=(), **more):
    """vm-announce in the background, surely ended."""
    command = host.command(*before, *COMMAND, *arguments)
    more = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    with subprocess.Popen(command, text=True, env=ENVIRONMENT, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


# Where addresses come from


def test_the_neighbour_table_is_asked_where_the_line_is_silent(place):
    host, lan = place
    host.ip(f"neigh replace 192.0.2.7 lladdr {ONE} dev br0 nud stale")
    with lan.listening("wire", "lan0") as seen:
        assert host.announce(*ONCE, stdin=f"{ONE} br0\n").returncode == 0
        assert host.announce(*ONCE, stdin=f"{ONE} br0 192.0.2.8\n").returncode == 0
        assert host.announce(*ONCE, "--as-is", stdin=f"{ONE} br0\n").returncode == 0
    plain = of(Nic(ONE, "br0"))
    assert seen == of(Nic(ONE, "br0", ("192.0.2.7",))) + of(Nic(ONE, "br0", ("192.0.2.8",))) + plain
    listed = host.announce("--list", ONE, "br0").stdout.splitlines()
    assert listed == [
        f"{ONE} is announced on br0: RARP (the line); at 0 50 200 450 800 ms",
        f"{ONE} is announced on br0: ARP 192.0.2.7 (the host's neighbour table); at 0 50 200 450 800 ms",
    ]


def test_what_the_bridge_has_learned_behind_the_tap_is_announced_too(place):
    host, lan = place
    add_tap(host)
    with lan.listening("wire", "lan0") as seen, host.listening("tap", "tap0"):
        forwards(host, "tap0")
        learned(host, TWO, "tap0")
        learned(host, THREE, "up0")
        done = host.announce("--json", *ONCE, ONE, "tap0")
    assert seen == of(Nic(ONE, "tap0")) + of(Nic(TWO, "tap0"))
    assert [one["mac"] for one in objects(done.stdout) if one["type"] == "announced"] == [ONE, TWO]


@pytest.mark.parametrize(
    ("packet", "address", "vlan"),
    [
        (Ether(src=ONE) / ARP(hwsrc=ONE, psrc="192.0.2.7", pdst="192.0.2.1"), "192.0.2.7", ()),
        (
            Ether(src=ONE) / IPv6(src="2001:db8::7", dst="ff02::1", hlim=255) / ICMPv6ND_NS(tgt="2001:db8::1"),
            "2001:db8::7",
            (),
        ),
        (
            Ether(src=ONE) / IPv6(src="fe80::7", dst="ff02::1", hlim=255) / ICMPv6ND_NA(tgt="2001:db8::7", R=0),
            "2001:db8::7",
            (),
        ),
        (Ether(src=ONE) / Dot1Q(vlan=10) / ARP(hwsrc=ONE, psrc="192.0.2.7", pdst="192.0.2.1"), "192.0.2.7", (10,)),
    ],
    ids=["ARP", "solicitation", "advertisement", "in a VLAN"],
)
def test_learning_from_the_guests_own_traffic(place, packet, address, vlan):
    host, _ = place
    add_tap(host)
    with guest_on(host, "tap0") as send, running(host, "--json", "--learn", "2", "-v", ONE, "tap0") as process:
        # It speaks somewhat later than it is announced.
        assert json.loads(process.stdout.readline())["frame"] == "rarp"
        send(packet)
        told = [json.loads(line) for line in process.stdout]
        assert process.wait(WAIT) == 0
    heard = [one for one in told if one["type"] == "announced" and address in one["addresses"]]
    assert [(one["mac"], tuple(one["vlan"]), one["iface"], one["rounds"]) for one in heard] == [(ONE, vlan, "br0", 5)]
    assert all(one["left"] == one["sent"] for one in heard)


def test_a_list_says_what_was_learned(place):
    host, lan = place
    add_tap(host)
    with (
        guest_on(host, "tap0") as send,
        lan.listening("wire", "lan0") as seen,
        running(host, "--list", "--learn", "1.5", ONE, "tap0") as process,
    ):
        for _ in range(10):
            send(Ether(src=ONE) / ARP(hwsrc=ONE, psrc="192.0.2.7", pdst="192.0.2.1"))
            time.sleep(0.1)
        told, _ = process.communicate(timeout=WAIT)
    assert "ARP 192.0.2.7 (the card's own traffic)" in told
    # Only what the guest has sent itself.
    assert {frame[12:14] for frame in seen} <= {b"\x08\x06"}
    assert process.returncode == 0


@pytest.mark.guest
def test_the_cards_of_a_guest(place, qemu, tmp_path):
    host, lan = place
    card = ("-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no")
    card += ("-device", f"virtio-net-pci,netdev=n,mac={ONE},romfile=", "-nic", f"user,model=e1000,mac={TWO}")
    card += ("-qmp", f"unix:{tmp_path}/a.qmp,server,nowait")
    qemu(*card, before=host.command())
    host.ip("link set tap0 master br0 up")
    forwards(host, "tap0")
    # Only now: a new port can change the bridge's own address, with which its neighbours go.
    host.ip(f"neigh replace 192.0.2.7 lladdr {ONE} dev br0 nud stale")
    with lan.listening("wire", "lan0") as seen:
        done = host.announce("-v", *FAST, *ONCE, f"{tmp_path}/a.qmp")
        assert host.announce(*ONCE, "--guest", f"{tmp_path}/a.qmp", stdin=f"{ONE} tap0\n").returncode == 0
    assert done.returncode == 0
    assert f"note: {TWO} has no interface on this host" in done.stderr
    assert f"warning: the guest at {tmp_path}/a.qmp is 'prelaunch'" in done.stderr
    assert "note: the guest has no port for an agent" in done.stderr
    assert seen == of(Nic(ONE, "tap0", ("192.0.2.7",))) * 2
    done = host.announce(*ONCE, "--guest", "nowhere.qmp", stdin=f"{ONE} tap0\n")
    assert (done.returncode, done.stdout) == (0, "")
    assert "warning: no guest at nowhere.qmp" in done.stderr
    assert host.announce(*ONCE, "nowhere.qmp").returncode == 1


@pytest.mark.guest
def test_qemu_itself(place, qemu, tmp_path):
    host, lan = place
    card = ("-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no")
    card += ("-device", f"virtio-net-pci,netdev=n,mac={ONE},romfile=")
    _, monitor = qemu(*card, "-qmp", f"unix:{tmp_path}/a.qmp,server,nowait", before=host.command())
    host.ip("link set tap0 master br0 up")
    forwards(host, "tap0")
    path = f"{tmp_path}/a.qmp"
    waiting = host.announce("--self", path, before=NO_CAPABILITY)
    assert waiting.returncode == 0
    assert f"warning: the guest at {path} is 'prelaunch'" in waiting.stderr
    monitor.ask("cont")
    with lan.listening("wire", "lan0") as seen:
        done = host.announce("--self", "--rounds", "3", *FAST, path, before=NO_CAPABILITY)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        time.sleep(0.5)
    assert len(seen) >= 3
    assert set(seen) == set(of(Nic(ONE, "tap0")))


# Where it sends


def test_a_macvtap_that_is_down_is_announced_below(namespaces):
    host, lan = namespaces(), namespaces()
    host.ip(f"link add up0 type veth peer name lan0 netns {lan.name}")
    lan.ip("link set lan0 up")
    host.ip("link set up0 up")
    host.ip(f"link add link up0 name mv0 address {ONE} type macvtap mode bridge")
    with lan.listening("wire", "lan0") as seen:
        assert host.announce(*ONCE, "--as-is", TWO, "mv0", "192.0.2.7").returncode == 0
    assert [frame for frame in seen if frame[6:12] == frames.packed(TWO)] == of(Nic(TWO, "mv0", ("192.0.2.7",)))
    listed = host.announce("--list", "--as-is", TWO, "mv0").stdout
    assert listed.startswith(f"{TWO} is announced on up0: ")


def test_another_macvtap_on_the_same_device_hears_it_too(namespaces):
    host, lan = namespaces(), namespaces()
    host.ip(f"link add up0 type veth peer name lan0 netns {lan.name}")
    lan.ip("link set lan0 up")
    host.ip("link set up0 up")
    for name in ("mv0", "mv1"):
        host.ip(f"link add link up0 name {name} type macvtap mode bridge")
        host.ip(f"link set {name} up")
    with lan.listening("wire", "lan0") as outside, host.listening("wire", "mv1") as beside:
        assert host.announce(*ONCE, "--as-is", ONE, "mv0").returncode == 0
    for seen in (outside, beside):
        assert [frame for frame in seen if frame[6:12] == frames.packed(ONE)] == of(Nic(ONE, "mv0"))
    assert f"{ONE} is announced on mv0, which leads to up0" in host.announce("--list", "--as-is", ONE, "mv0").stdout


def test_on_a_given_interface(place):
    """The frames go there; the entry in the bridge of the tap is moved all the same."""
    host, lan = place
    add_tap(host)
    with lan.listening("wire", "lan0") as seen, host.listening("tap", "tap0") as inside:
        forwards(host, "tap0")
        learned(host, ONE, "up0")
        assert host.announce(*ONCE, "--as-is", "--on", "up0", ONE, "tap0").returncode == 0
        assert entry_of(host, ONE) == ["tap0"]
    assert seen == of(Nic(ONE, "tap0"))
    # What is sent on a port does not come back by the bridge.
    assert inside == []
    done = host.announce(*ONCE, "--on", "up9", ONE, "tap0")
    assert (done.returncode, done.stderr) == (
        1,
        f"vm-announce: error: {ONE} is not announced: interface up9 does not exist\n",
    )


def test_in_a_namespace_by_its_name(place):
    host, lan = place
    add_tap(host)
    with lan.listening("wire", "lan0") as seen, host.listening("tap", "tap0"):
        forwards(host, "tap0")
        words = [*COMMAND, *ONCE, "--as-is", "--netns", host.name, ONE, "tap0"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT, env=ENVIRONMENT)
        assert (done.returncode, done.stderr) == (0, "")
        assert entry_of(host, ONE) == ["tap0"]
    assert seen == of(Nic(ONE, "tap0"))


@pytest.mark.parametrize("name", ["nowhere", "../x", ""])
def test_no_such_namespace(name):
    words = [*COMMAND, "--netns", name, ONE, "br0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT, env=ENVIRONMENT)
    assert done.returncode == 1
    assert done.stderr == (
        f"vm-announce: error: there is no network namespace {name!r}\nvm-announce: hint: ip netns list\n"
    )


def test_a_namespace_needs_its_capability(namespaces):
    host = namespaces()
    words = [*ONLY_RAW, *COMMAND, "--netns", host.name, ONE, "br0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "hint: it needs CAP_SYS_ADMIN" in done.stderr


# When


def test_until_heard(place):
    host, lan = place
    add_tap(host)
    lan.ip(f"neigh replace 192.0.2.7 lladdr {ONE} dev lan0 nud permanent")
    arguments = ("--until-heard", "--rounds", "100", "--as-is", "--json", ONE, "tap0")
    with host.listening("tap", "tap0"):
        forwards(host, "tap0")
        learned(host, ONE, "up0")
        with running(host, *arguments) as process:
            # Two rounds nobody answers.
            until(lambda: sum("frame" in process.stdout.readline() for _ in range(2)) == 2, "two rounds")
            start = time.monotonic()
            subprocess.run(lan.command("ping", "-c1", "-W1", "192.0.2.7"), timeout=WAIT, capture_output=True)
            told, _ = process.communicate(timeout=WAIT)
            assert time.monotonic() - start < 2
        assert process.returncode == 0
    (heard,) = [one for one in objects(told) if one["type"] == "heard"]
    assert heard["mac"] == ONE and heard["ms"] > 50
    assert 2 <= heard["rounds"] < 10


def test_until_heard_on_a_given_bridge(place):
    """Where only the bridge is known, what comes by it for the card."""
    host, lan = place
    lan.ip(f"neigh replace 192.0.2.7 lladdr {ONE} dev lan0 nud permanent")
    with running(host, "--until-heard", "--rounds", "100", "--as-is", ONE, "br0") as process:
        for _ in range(5):
            subprocess.run(lan.command("ping", "-c1", "-W1", "192.0.2.7"), timeout=WAIT, capture_output=True)
            if process.poll() is not None:
                break
        told, _ = process.communicate(timeout=WAIT)
    assert told.startswith(f"{ONE} was heard of on br0 after ")


def test_until_the_rounds_are_over(place):
    host, _ = place
    done = host.announce("--until-heard", *FAST, "--as-is", ONE, "br0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{ONE} was not heard of on br0 in 5 rounds\n"
    done = host.announce("--until-heard", "--json", *FAST, "--as-is", ONE, "br0")
    (heard,) = [one for one in objects(done.stdout) if one["type"] == "heard"]
    assert (heard["ms"], heard["rounds"]) == (None, 5)


def first_frame(lan, process, line):
    """Seconds from a line to its first frame, as the kernel has stamped that."""
    script = """
import socket, struct, sys, time
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
link.setsockopt(socket.SOL_SOCKET, 35, 1)
link.bind(("lan0", 0))
print("ready", flush=True)
while True:
    data, words, _, _ = link.recvmsg(256, 256)
    if data[6:11].hex() == "5254001234":
        seconds, nanoseconds = struct.unpack("qq", words[0][2][:16])
        print(seconds + nanoseconds / 1e9, flush=True)
        break
"""
    with subprocess.Popen(lan.command(sys.executable, "-c", script), stdout=subprocess.PIPE, text=True) as watcher:
        try:
            assert watcher.stdout.readline() == "ready\n"
            begun = time.time()
            process.stdin.write(line)
            process.stdin.flush()
            return float(watcher.stdout.readline()) - begun
        finally:
            watcher.kill()


def test_the_first_frame_is_there_at_once(place):
    """Within 5 ms of its line, by a command that waits for it, as at the end of a pipeline; and the tap's entry."""
    host, lan = place
    add_tap(host)
    taken = []
    with host.listening("tap", "tap0"):
        forwards(host, "tap0")
        for _ in range(7):
            with running(host, "--rounds", "1") as process:
                until(lambda pid=process.pid: waits(pid), "it waits for a line")
                taken.append(first_frame(lan, process, f"{ONE} tap0 192.0.2.7\n"))
                process.stdin.close()
                assert process.wait(WAIT) == 0
    assert sorted(taken)[len(taken) // 2] < 0.005, taken


def test_nothing_slow_comes_before_the_first_frame(place):
    """What is looked up, and all that needs, is imported behind it."""
    host, _ = place
    command = host.command(sys.executable, "-X", "importtime", COMMAND[1], *ONCE, "--as-is", ONE, "br0", "192.0.2.7")
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=ENVIRONMENT)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0
    assert "docopt" in imported
    heavy = {"asyncio", "ctypes", "dataclasses", "inspect", "shutil", "subprocess", "tempfile", "threading"}
    assert not imported & heavy


@pytest.mark.parametrize("words", [("--learn", "0.3"), ("--until-heard",), ("--check",), ("--json",)], ids=str)
def test_with_only_the_one_capability_all_but_the_entry_works(place, words):
    host, _ = place
    done = host.announce(*FAST, *words, "-v", ONE, "br0", "192.0.2.7", before=ONLY_RAW)
    assert done.returncode == 0
    assert "can be heard" not in done.stderr and "could not be seen" not in done.stderr
    assert "error" not in done.stderr


# As a filter


def test_a_line_is_announced_before_the_next_one_comes(place):
    host, lan = place
    with lan.listening("wire", "lan0") as seen, running(host, "--json", *ONCE, "--as-is") as process:
        for mac in (ONE, TWO):
            process.stdin.write(f"{mac} br0\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["mac"] == mac
            assert json.loads(process.stdout.readline())["type"] == "announced"
        process.stdin.close()
        assert process.wait(WAIT) == 0
    assert seen == of(Nic(ONE, "br0")) + of(Nic(TWO, "br0"))


def test_a_line_that_comes_again(place):
    host, lan = place
    with lan.listening("wire", "lan0") as seen:
        lines = f"{ONE} br0\n{ONE} br0\n"
        assert host.announce(*ONCE, "--as-is", stdin=lines).returncode == 0
        assert host.announce(*ONCE, "--as-is", "--follow", stdin=lines).returncode == 0
    assert seen == of(Nic(ONE, "br0")) * 3


def test_one_instance_for_a_host(place, tmp_path):
    """It reads a FIFO until it is told to end, whoever opens and closes that."""
    host, lan = place
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_RDWR)
    with lan.listening("wire", "lan0") as seen:
        source = os.open(tmp_path / "fifo", os.O_RDONLY)
        with running(host, "--follow", "--json", *ONCE, "--as-is", stdin=source) as process:
            os.close(source)
            for number, mac in enumerate((ONE, TWO, ONE)):
                (tmp_path / "fifo").write_text(f"{mac} br0\n")
                if not number:
                    told = process.stdout.readline()
                    os.close(fd)
                else:
                    told = process.stdout.readline()
                assert json.loads(told)["mac"] == mac
                assert json.loads(process.stdout.readline())["type"] == "announced"
            assert not select.select([process.stderr], [], [], 0.3)[0]
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT) == -signal.SIGTERM
    assert seen == of(Nic(ONE, "br0")) + of(Nic(TWO, "br0")) + of(Nic(ONE, "br0"))


def test_bad_lines_keep_no_good_ones_back(place):
    host, lan = place
    with lan.listening("wire", "lan0") as seen:
        done = host.announce(*ONCE, "--as-is", stdin=f"{ONE} br0\nnonsense\n\n{TWO} br0 192.0.2\n{THREE} br0\n")
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        "vm-announce: error: line 2: expected MAC IFACE [IP...], found 'nonsense'",
        "vm-announce: error: line 4: expected an IPv4 or IPv6 address, found '192.0.2'",
    ]
    assert seen == of(Nic(ONE, "br0")) + of(Nic(THREE, "br0"))


def test_faults_without_number_are_counted(place):
    host, _ = place
    done = host.announce(*ONCE, "--as-is", stdin="nonsense\n" * 500)
    assert done.returncode == 3
    *told, counted = done.stderr.splitlines()
    assert len(told) == 20
    assert counted == "vm-announce: warning: 480 more lines are no NIC lines"


def test_ten_thousand_lines(place):
    host, _ = place
    lines = "".join(f"52:54:01:00:{n >> 8:02x}:{n & 255:02x} br0 10.1.{n >> 8}.{n & 255}\n" for n in range(10000))
    before = packets(place)
    done = host.announce("--rounds", "2", stdin=lines)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert packets(place) - before >= 10000 * 3 * 2


def packets(place):
    return int(place[1].sh("cat", "/sys/class/net/lan0/statistics/rx_packets"))


def test_an_interface_that_vanishes_in_the_middle(place):
    host, lan = place
    host.ip("link add gone0 type veth peer name gone1")
    for name in ("gone0", "gone1"):
        host.ip(f"link set {name} up")
    arguments = ("--rounds", "4", "--initial", "300", "--max", "300", "--as-is", "--json")
    with lan.listening("wire", "lan0") as seen, running(host, *arguments) as process:
        process.stdin.write(f"{ONE} gone0\n{TWO} gone0\n{THREE} br0\n")
        process.stdin.close()
        assert {json.loads(process.stdout.readline())["mac"] for _ in range(3)} == {ONE, TWO, THREE}
        host.ip("link del gone0")
        told, errors = process.stdout.read(), process.stderr.read()
        assert process.wait(WAIT) == 0
    assert seen == of(Nic(THREE, "br0")) * 4
    warned = [one["message"] for one in objects(errors)]
    assert warned[0] == f"{ONE}: round 2 on gone0: No such device"
    assert "the same 5 times more on gone0: No such device" in warned
    ends = {one["mac"]: (one["sent"], one["left"]) for one in objects(told) if one["type"] == "announced"}
    assert ends == {ONE: (1, 1), TWO: (1, 1), THREE: (4, 4)}


# What has left, and whether it is believed


def test_what_does_not_leave_is_told(place):
    """A queue that lets one frame out in a second holds the others; one that is full refuses them."""
    host, _ = place
    slow = "tc qdisc add dev br0 root tbf rate 400bit burst 70 limit 1000"
    full = "tc qdisc replace dev br0 root pfifo limit 0"
    done = host.announce("-v", *ONCE, "--as-is", ONE, "br0", "192.0.2.7")
    assert f"note: {ONE}: 3 frames have left br0" in done.stderr
    host.sh(*slow.split())
    done = host.announce(*ONCE, "--as-is", ONE, "br0", "192.0.2.7")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"vm-announce: warning: {ONE}: of 3 frames 1 have left br0\n"
    host.sh(*full.split())
    done = host.announce(*ONCE, "--as-is", ONE, "br0", "192.0.2.7")
    assert done.returncode == 1
    assert done.stderr == (f"vm-announce: error: {ONE} is not announced: round 1 on br0: No buffer space available\n")


def test_check(place):
    host, lan = place
    add_tap(host)
    with lan.listening("wire", "lan0") as seen, host.listening("tap", "tap0"):
        forwards(host, "tap0")
        learned(host, ONE, "up0")
        done = host.announce("--check", ONE, "tap0")
        as_json = host.announce("--check", "--json", ONE, "tap0")
        assert entry_of(host, ONE) == ["up0"]
    assert seen == []
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    assert first == f"{ONE} is announced on br0, the bridge of tap0: likely to be believed"
    text = "\n".join(rest)
    assert f"bridge br0 has {ONE} behind up0: the old place" in text
    assert "arp_accept of br0 is 0" in text
    assert "(arp_notify)" in text
    (told,) = objects(as_json.stdout)
    assert (told["type"], told["mac"], told["likely"]) == ("check", ONE, True)
    assert {one["bad"] for one in told["findings"]} == {False}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("bridge link set dev tap0 locked on", "port tap0 is locked"),
        ("bridge link set dev tap0 learning off", "port tap0 learns nothing"),
        ("ip link set up0 nomaster", "bridge br0 has no port to the network"),
        ("sysctl -qw net.ipv4.conf.br0.drop_gratuitous_arp=1", "this host drops gratuitous ARP on br0"),
        ("sysctl -qw net.ipv4.conf.br0.arp_accept=1", "takes the IPv4 address, known or not"),
    ],
)
def test_doubts(place, setting, words):
    host, _ = place
    add_tap(host)
    with host.listening("tap", "tap0"):
        forwards(host, "tap0")
        host.sh(*setting.split())
        done = host.announce("--check", ONE, "tap0")
    assert words in done.stdout
    assert done.returncode == (0 if "arp_accept" in setting else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vlan", "0", ONE, "br0"), "--vlan: expected a number from 1 to 4094"),
        (("--vlan", "4095", ONE, "br0"), "found '4095'"),
        (("--vlan", "1.2.3", ONE, "br0"), "or two of them"),
        (("--vlan", "x", ONE, "br0"), "found 'x'"),
        (("--learn", "long", ONE, "br0"), "--learn: expected seconds up to 3600, found 'long'"),
        (("--learn", "1", "--as-is", ONE, "br0"), "--learn does not go with --as-is"),
        (("--self", "--vlan", "1", "a.qmp"), "--vlan does not go with --self"),
        (("--self", ONE, "br0"), "--self does not go with MAC IFACE"),
        (("--follow", ONE, "br0"), "--follow does not go with MAC IFACE"),
        (("--guest", "a.qmp", "b.qmp"), "--guest does not go with GUEST"),
        (("--list", "--until-heard", ONE, "br0"), "--until-heard does not go with --list"),
        (("--check", "--follow"), "--follow does not go with --check"),
        ((ONE,), f"expected IFACE behind {ONE}"),
        (("--self",), "no guest given"),
    ],
)
def test_what_does_not_go_together(arguments, words):
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "VM_GUEST"}
    command = [*COMMAND, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, env=environment, input="")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
