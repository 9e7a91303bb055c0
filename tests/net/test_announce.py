"""vm-announce on real bridges, taps and macvtaps, each test in namespaces of its own (see wires)."""

import json
import os
import pty
import socket
import subprocess
import sys
import time

import pytest
from vmstate.net.nic import Nic
from vmstate.qemu import answers, nics

from net import wires
from net.wires import (
    COMMAND,
    ENVIRONMENT,
    FAST,
    NO_CAPABILITY,
    ONE,
    ONLY_RAW,
    ROOT,
    ROUNDS,
    TWO,
    WAIT,
    add_tap,
    entry_of,
    forwards,
    learned,
    of,
    sh,
    until,
)

namespaces, place, qemu = wires.namespaces, wires.place, wires.qemu


@pytest.mark.root
def test_a_tap_is_announced_on_its_bridge(place):
    host, lan = place
    add_tap(host)
    with lan.listening("wire", "lan0") as seen, host.listening("tap", "tap0"):
        forwards(host, "tap0")
        learned(host, ONE, "up0")
        start = time.monotonic()
        done = host.announce(stdin=f"{ONE} tap0 192.0.2.7 2001:db8::7\n")
        assert time.monotonic() - start >= 0.8
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert entry_of(host, ONE) == ["tap0"]
    assert seen == of(Nic(ONE, "tap0", ("192.0.2.7", "2001:db8::7"))) * ROUNDS


@pytest.mark.root
def test_frames_for_the_card_now_go_to_the_tap(place):
    """What the entry is for: without it the bridge sends the network's frames back to where the card was."""
    host, lan = place
    add_tap(host)
    lan.ip(f"neigh replace 192.0.2.7 lladdr {ONE} dev lan0 nud permanent")
    with host.listening("tap", "tap0") as seen:
        forwards(host, "tap0")
        learned(host, ONE, "up0")
        for size in ("10", "20"):
            ping = lan.command("ping", "-c1", "-W1", "-s", size, "192.0.2.7")
            subprocess.run(ping, timeout=WAIT, capture_output=True)
            assert host.announce("--rounds", "1", ONE, "tap0").returncode == 0
    sizes = [len(frame) for frame in seen if frame[:6] == bytes.fromhex(ONE.replace(":", ""))]
    assert sizes == [14 + 20 + 8 + 20]


@pytest.mark.root
def test_all_cards_in_the_same_rounds(place):
    host, lan = place
    with lan.listening("wire", "lan0") as seen:
        lines = f"{ONE} br0 192.0.2.7\n52:54:00:00:00:01 -\n{TWO} up0\n"
        assert host.announce("--rounds", "3", *FAST, stdin=lines).returncode == 0
    assert seen == (of(Nic(ONE, "br0", ("192.0.2.7",))) + of(Nic(TWO, "up0"))) * 3


@pytest.mark.root
def test_neighbours_learn(place):
    host, lan = place
    old = "02:00:00:00:00:99"
    until(lambda: "fe80::" in lan.ip("-6 addr show dev lan0"), "IPv6 is ready")
    for address in ("192.0.2.7", "2001:db8::7"):
        lan.ip(f"neigh replace {address} lladdr {old} dev lan0 nud stale")
    assert host.announce(*FAST, ONE, "br0", "192.0.2.7", "2001:db8::7").returncode == 0
    until(lambda: old not in lan.ip("neigh show dev lan0"), "the neighbours have learned")
    found = lan.ip("neigh show dev lan0")
    assert f"192.0.2.7 lladdr {ONE}" in found
    assert f"2001:db8::7 lladdr {ONE}" in found


@pytest.mark.root
def test_macvtap(namespaces, tmp_path):
    host, lan = namespaces(), namespaces()
    host.ip(f"link add up0 type veth peer name lan0 netns {lan.name}")
    lan.ip("link set lan0 up")
    host.ip("link set up0 up")
    host.ip(f"link add link up0 name mv0 address {ONE} type macvtap mode bridge")
    host.ip("link set mv0 up")
    with lan.listening("wire", "lan0") as seen:
        # The kernel has router solicitations and reports of its own to send.
        assert host.announce(*FAST, "--rounds", "2", TWO, "mv0", "192.0.2.7").returncode == 0
    frames = [frame for frame in seen if frame[6:12] == bytes.fromhex(TWO.replace(":", ""))]
    assert frames == of(Nic(TWO, "mv0", ("192.0.2.7",))) * 2


@pytest.mark.root
def test_a_macvtap_by_its_descriptor(namespaces, tmp_path):
    """The descriptor of a macvtap has no `iff:` line; its device leads to the interface."""
    host = namespaces()
    host.ip("link add up0 type veth peer name up1")
    host.ip("link add link up0 name mv0 type macvtap mode bridge")
    host.ip("link set mv0 up")
    script = """
import os, sys
from vmstate.net import nic
from vmstate.qemu import nics
(name,) = os.listdir("/sys/class/net/mv0/macvtap")
major, minor = map(int, open(f"/sys/class/net/mv0/macvtap/{name}/dev").read().split(":"))
os.mknod(sys.argv[1], 0o20600, os.makedev(major, minor))
fd = os.open(sys.argv[1], os.O_RDWR)
text = "a: index=0,type=nic,model=a,macaddr=52:54:00:12:34:56\\r\\n \\\\ b: index=0,type=tap,fd=%d\\r\\n" % fd
print(nic.line(nics.from_info_network(text, os.getpid())[0]))
"""
    command = host.command(sys.executable, "-c", script, str(tmp_path / "node"))
    assert sh(*command, env=ENVIRONMENT) == f"{ONE} mv0\n"


@pytest.mark.root
def test_nothing_to_announce(place):
    host, lan = place
    with lan.listening("wire", "lan0") as seen:
        for lines in ("", "\n", f"{ONE} -\n", f"{ONE} - 192.0.2.7\n"):
            done = host.announce(stdin=lines)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert host.announce(ONE, "-").returncode == 0
        done = host.announce("-v", ONE, "-")
        assert done.stderr == f"vm-announce: note: {ONE} has no interface on this host\n"
    assert seen == []


@pytest.mark.root
def test_without_the_capability(place):
    host, lan = place
    add_tap(host)
    with lan.listening("wire", "lan0") as seen, host.listening("tap", "tap0"):
        forwards(host, "tap0")
        learned(host, ONE, "up0")
        done = host.announce(stdin=f"{ONE} tap0\n", before=NO_CAPABILITY)
        assert entry_of(host, ONE) == ["up0"]
        # What sends nothing needs nothing.
        assert host.announce("-n", ONE, "tap0", before=NO_CAPABILITY).returncode == 0
        assert host.announce(ONE, "-", before=NO_CAPABILITY).returncode == 0
    assert done.returncode == 1
    assert done.stderr.startswith("vm-announce: error: sending frames needs the capability CAP_NET_RAW\n")
    assert "vm-announce: hint: run it as root" in done.stderr
    assert seen == []


@pytest.mark.root
def test_with_only_the_one_capability(place):
    host, lan = place
    add_tap(host)
    with lan.listening("wire", "lan0") as seen, host.listening("tap", "tap0"):
        forwards(host, "tap0")
        learned(host, ONE, "up0")
        done = host.announce(*FAST, stdin=f"{ONE} tap0\n{TWO} tap0\n", before=ONLY_RAW)
        quiet = host.announce("-q", "--rounds", "1", ONE, "tap0", before=ONLY_RAW)
        assert entry_of(host, ONE) == ["up0"]
    assert (done.returncode, quiet.returncode) == (0, 0)
    warning, hint = done.stderr.splitlines()
    words = f"vm-announce: warning: forwarding entries were not moved in their bridge, {ONE} to tap0, {TWO} to tap0: "
    assert warning.startswith(words)
    assert "Operation not permitted" in warning
    assert hint.startswith("vm-announce: hint: it needs CAP_NET_ADMIN")
    assert len(quiet.stderr.splitlines()) == 1
    both = of(Nic(ONE, "tap0")) + of(Nic(TWO, "tap0"))
    assert seen == both * ROUNDS + of(Nic(ONE, "tap0"))


@pytest.mark.root
def test_as_another_user_with_the_capability(place):
    """What the hint of the missing capability proposes."""
    host, lan = place
    user = ("setpriv", "--reuid=65534", "--clear-groups")
    # A checkout may lie where another user cannot read.
    plain = (*user, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    able = (*user, "--inh-caps=+net_raw,+dac_read_search", "--ambient-caps=+net_raw,+dac_read_search")
    with lan.listening("wire", "lan0") as seen:
        assert host.announce(*FAST, ONE, "br0", before=able).returncode == 0
        assert host.announce(ONE, "br0", before=plain).returncode == 1
    assert seen == of(Nic(ONE, "br0")) * ROUNDS


@pytest.mark.root
def test_one_bad_card_keeps_no_other_back(place):
    host, lan = place
    add_tap(host, master=None)
    host.ip("link add down0 type veth peer name down1")
    with lan.listening("wire", "lan0") as seen:
        lines = f"{ONE} tap0\n{ONE} nowhere\n{TWO} br0\n{ONE} down0\n{ONE} lo\n"
        done = host.announce(*FAST, stdin=lines)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"vm-announce: error: {ONE} is not announced: tap tap0 is in no bridge,"
        " and a frame sent on it would go into the guest",
        "vm-announce: hint: name the bridge or the uplink by hand: vm-announce MAC IFACE [IP...]",
        f"vm-announce: error: {ONE} is not announced: interface nowhere does not exist",
        f"vm-announce: error: {ONE} is not announced: interface down0 is down",
        "vm-announce: hint: ip link set down0 up",
        f"vm-announce: error: {ONE} is not announced: interface lo is no Ethernet: expected type 1, found 772",
    ]
    assert seen == of(Nic(TWO, "br0")) * ROUNDS


@pytest.mark.root
def test_an_interface_that_goes_away_is_told_once_it_matters(place):
    """It was announced in the first round, so later ones only warn."""
    host, _ = place
    command = host.command(*COMMAND, "--rounds", "2", "--initial", "3000", "--max", "3000", "-v", ONE, "br0")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stderr.readline() == f"vm-announce: note: {ONE} is announced on br0\n"
            sent = "/sys/class/net/br0/statistics/tx_packets"
            until(lambda: host.sh("cat", sent) != "0\n", "the first round", 2)
            host.ip("link set br0 down")
            _, told = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert process.returncode == 0
    assert f"vm-announce: warning: {ONE}: round 2 on br0: Network is down\n" in told


@pytest.mark.root
def test_saying_without_sending(place):
    host, lan = place
    add_tap(host)
    arguments = ONE, "tap0", "192.0.2.7", "2001:db8::7"
    with lan.listening("wire", "lan0") as seen:
        plain, as_json = host.announce("-n", *arguments), host.announce("-n", "--json", *arguments)
        assert entry_of(host, ONE) == []
    assert seen == []
    assert (plain.returncode, plain.stderr) == (0, "")
    where = f"{ONE} is announced on br0, the bridge of tap0"
    parts = "RARP (the line), ARP 192.0.2.7 (the line), ND 2001:db8::7 (the line)"
    assert plain.stdout == f"{where}: {parts}; at 0 50 200 450 800 ms\n"
    told = json.loads(as_json.stdout)
    assert [bytes.fromhex(frame["bytes"]) for frame in told.pop("frames")] == of(Nic(ONE, "tap0", arguments[2:]))
    assert told == {
        "vmstate": 1,
        "type": "announcement",
        "command": "vm-announce",
        "mac": ONE,
        "addresses": ["192.0.2.7", "2001:db8::7"],
        "iface": "br0",
        "tap": "tap0",
        "vlan": [],
        "moments": [0, 50, 200, 450, 800],
    }


@pytest.mark.root
def test_json(place):
    """An object for each frame as it is sent, and one for each card that counts what has left."""
    host, lan = place
    with lan.listening("wire", "lan0") as seen:
        done = host.announce("--json", *FAST, stdin=f"{ONE} br0 192.0.2.7\n{TWO} nowhere\n")
    assert done.returncode == 1
    *sent, over = map(json.loads, done.stdout.splitlines())
    kinds = [("rarp", None), ("arp-request", "192.0.2.7"), ("arp-reply", "192.0.2.7")]
    told = [(frame["type"], frame["frame"], frame["address"], frame["round"], frame["iface"]) for frame in sent]
    assert told == [("frame", *kind, number, "br0") for number in range(1, ROUNDS + 1) for kind in kinds]
    assert [frame["ms"] for frame in sent] == sorted(frame["ms"] for frame in sent)
    assert (over["type"], over["mac"], over["iface"], over["tap"]) == ("announced", ONE, "br0", None)
    assert (over["rounds"], over["sent"], over["left"]) == (ROUNDS, 15, 15)
    assert len(seen) == 15
    assert json.loads(done.stderr)["status"] == 1


def run(*arguments, **more):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=WAIT, env=ENVIRONMENT, **more)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (f"{ONE} -\n{TWO}\n", "line 2: expected MAC IFACE [IP...], found '52:54:00:12:34:57'"),
        ("03:00:00:00:00:01 br0\n", "line 1: expected the MAC address of one card, found '03:00:00:00:00:01'"),
        (f"{ONE} br0 192.0.2\n", "line 1: expected an IPv4 or IPv6 address, found '192.0.2'"),
        ("\x00\udcff" * 1000, "line 1: expected MAC IFACE [IP...], found '\\x00\\udcff"),
        ("QEVM" * 300000, "line 1: expected NIC lines, found one of more than 65536 bytes"),
    ],
)
def test_bad_lines(lines, words):
    done = run(input=lines.encode(errors="surrogateescape"))
    assert done.returncode == 3
    assert done.stderr.decode().startswith(f"vm-announce: error: {words}")
    assert len(done.stderr) < 500


@pytest.mark.parametrize(
    "arguments",
    [
        (ONE,),
        ("nonsense", "br0"),
        (ONE, "br0", "nonsense"),
        (ONE, "a/b"),
        ("--rounds", "0", ONE, "-"),
        ("--rounds", "x", ONE, "-"),
        ("--rounds", "9" * 5000, ONE, "-"),
        ("--initial", "-1", ONE, "-"),
        ("--nonsense",),
    ],
)
def test_wrong_usage(arguments):
    done = run(*arguments, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"vm-announce: error: ")
    assert b"internal" not in done.stderr


def test_a_terminal_is_no_input():
    ours, theirs = pty.openpty()
    try:
        done = run(stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert b"hint: vm-restore GUEST < STATE | vm-announce" in done.stderr


def test_synopsis_is_the_usage():
    page = subprocess.run(["mandoc", "-T", "utf8", str(ROOT / "man/vm-announce.1")], capture_output=True, timeout=WAIT)
    text = subprocess.run(["col", "-b"], input=page.stdout, capture_output=True, timeout=WAIT).stdout.decode()
    synopsis = text.split("SYNOPSIS")[1].split("DESCRIPTION")[0].split()
    assert synopsis == run("--help").stdout.decode().split("Usage:")[1].split("\n\n")[0].split()


@pytest.mark.guest
def test_qemu_announces_with_the_same_frame(qemu):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.bind(("127.0.0.1", 0))
        wire.settimeout(WAIT)
        back = f"udp=127.0.0.1:{wire.getsockname()[1]},localaddr=127.0.0.1:0"
        _, monitor = qemu("-netdev", f"socket,id=n,{back}", "-device", f"virtio-net-pci,netdev=n,mac={ONE},romfile=")
        # A stopped guest's frames would wait in QEMU.
        monitor.ask("cont")
        monitor.ask("announce-self", initial=5, max=10, rounds=3, step=5)
        frames = [wire.recv(2048) for _ in range(3)]
    assert frames == of(Nic(ONE, "br0")) * 3


@pytest.mark.guest
@pytest.mark.root
def test_cards_of_a_real_qemu(qemu, namespaces):
    host = namespaces()
    process, monitor = qemu(
        *("-nic", f"tap,ifname=mine0,script=no,downscript=no,model=e1000,mac={ONE}"),
        *("-netdev", "tap,id=q,queues=2,ifname=mine1,script=no,downscript=no"),
        *("-device", f"virtio-net-pci,mq=on,netdev=q,mac={TWO},romfile="),
        *("-nic", "user,model=virtio,mac=52:54:00:12:34:58"),
        *("-netdev", "hubport,hubid=3,id=h1", "-device", "rtl8139,netdev=h1,mac=52:54:00:12:34:59"),
        *("-netdev", "tap,ifname=mine2,script=no,downscript=no,id=t", "-netdev", "hubport,hubid=3,id=h2,netdev=t"),
        before=host.command(),
    )
    text = monitor.ask("human-monitor-command", **{"command-line": "info network"})
    cards = nics.from_info_network(text, process.pid, answers.rx_filters(monitor))
    assert sorted((nic.mac, nic.iface) for nic in cards) == [
        (ONE, "mine0"),
        (TWO, "mine1"),
        ("52:54:00:12:34:58", None),
        ("52:54:00:12:34:59", "mine2"),
    ]


@pytest.mark.guest
@pytest.mark.root
def test_taps_by_descriptor_of_a_real_qemu(qemu, namespaces):
    """Descriptors opened by somebody else, as libvirt or a script with `3<>` passes them."""
    host = namespaces()
    opener = """
import fcntl, os, struct, sys
for number, (name, flags) in enumerate((("one", 0x1002), ("two", 0x1102), ("two", 0x1102)), 20):
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))
    os.dup2(fd, number)
    os.close(fd)
os.execvp(sys.argv[1], sys.argv[1:])
"""
    process, monitor = qemu(
        *("-netdev", "tap,id=a,fd=20", "-device", f"e1000,netdev=a,mac={ONE},romfile="),
        *("-netdev", "tap,id=b,fds=21:22", "-device", f"virtio-net-pci,mq=on,netdev=b,mac={TWO},romfile="),
        before=host.command(sys.executable, "-c", opener),
    )
    text = monitor.ask("human-monitor-command", **{"command-line": "info network"})
    cards = nics.from_info_network(text, process.pid, answers.rx_filters(monitor))
    assert sorted((nic.mac, nic.iface) for nic in cards) == [(ONE, "one"), (TWO, "two")]
    assert [nic.iface for nic in nics.from_info_network(text, None)] == [None, None]
