"""vm-announce on real bridges, taps and macvtaps, each test in namespaces of its own.

host: tap0 -- br0 -- up0 ======== lan0 :lan
"""

import contextlib
import itertools
import json
import os
import pty
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vmstate import announce, nics
from vmstate.nics import Nic

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "bin/vm-announce")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
ONE, TWO = "52:54:00:12:34:56", "52:54:00:12:34:57"
WAIT = 20
FAST = ("--initial", "5", "--step", "5")
ROUNDS = 5

# Opens an interface as a guest or a sniffer would, says so, and prints frames from or to our cards until told to end.
LISTENER = """
import fcntl, os, select, socket, struct, sys
kind, name = sys.argv[1:]
if kind == "tap":
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))
else:
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    sniffer.bind((name, 0))
    fd = sniffer.fileno()
print("ready", flush=True)
ended = False
while True:
    ready = select.select([0, fd], [], [], 0.3 if ended else None)[0]
    if fd in ready:
        frame = os.read(fd, 65536)
        if "5254001234" in (frame[0:5].hex(), frame[6:11].hex()):
            print(frame.hex(), flush=True)
    elif ended:
        break
    elif 0 in ready:
        ended = True
"""


def sh(*command, **more):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT, **more).stdout


def until(check, what, wait=WAIT):
    end = time.monotonic() + wait
    while not check():
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.02)


class Namespace:
    def __init__(self, name):
        self.name = name

    def command(self, *command):
        return ["ip", "netns", "exec", self.name, *command]

    def sh(self, *command):
        return sh(*self.command(*command))

    def ip(self, text):
        return sh("ip", "-n", self.name, *text.split())

    def announce(self, *arguments, stdin="", before=()):
        command = self.command(*before, *COMMAND, *arguments)
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=WAIT, env=ENVIRONMENT)

    @contextlib.contextmanager
    def listening(self, kind, name):
        """A list that holds, once the block is left, the frames of our cards that came by."""
        command = self.command(sys.executable, "-c", LISTENER, kind, name)
        frames = []
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "ready\n"
                yield frames
                told, _ = process.communicate("", timeout=WAIT)
                frames += map(bytes.fromhex, told.split())
            finally:
                process.kill()


NUMBERS = itertools.count()


@pytest.fixture
def namespaces():
    """A function that makes namespaces; they are gone afterwards, whatever happened."""
    made = []

    def make():
        name = f"vm-announce-{os.getpid()}-{next(NUMBERS)}"
        made.append(name)
        sh("ip", "netns", "add", name)
        sh("ip", "-n", name, "link", "set", "lo", "up")
        return Namespace(name)

    try:
        yield make
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], timeout=WAIT, capture_output=True)


@pytest.fixture
def place(namespaces):
    """Two namespaces: a host with a bridge and its uplink, and the network behind that."""
    host, lan = namespaces(), namespaces()
    # The host's own router solicitations would mix with what is counted here.
    host.sh("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
    host.ip(f"link add up0 type veth peer name lan0 netns {lan.name}")
    for text in ("link add name br0 type bridge", "link set up0 master br0", "link set br0 up", "link set up0 up"):
        host.ip(text)
    for text in ("addr add 192.0.2.1/24 dev lan0", "addr add 2001:db8::1/64 dev lan0 nodad", "link set lan0 up"):
        lan.ip(text)
    return host, lan


def add_tap(host, master="br0"):
    host.ip("tuntap add tap0 mode tap")
    if master:
        host.ip(f"link set tap0 master {master}")
    host.ip("link set tap0 up")


def entry_of(host, mac):
    """The ports that the bridge has for this card."""
    entries = json.loads(host.sh("bridge", "-j", "fdb", "show", "br", "br0"))
    return [entry["ifname"] for entry in entries if entry["mac"] == mac]


def learned(host, mac, port):
    """As if the card had been behind this port until now."""
    host.sh("bridge", "fdb", "replace", mac, "dev", port, "master", "dynamic")
    assert entry_of(host, mac) == [port]


def forwards(host, port):
    """A port forwards a moment after its tap was opened."""
    until(lambda: "state forwarding" in host.ip(f"-d link show {port}"), f"{port} forwards")


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
    assert seen == announce.frames(Nic(ONE, "tap0", ("192.0.2.7", "2001:db8::7"))) * ROUNDS


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
    assert seen == (announce.frames(Nic(ONE, "br0", ("192.0.2.7",))) + announce.frames(Nic(TWO, "up0"))) * 3


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
    assert frames == announce.frames(Nic(TWO, "mv0", ("192.0.2.7",))) * 2


@pytest.mark.root
def test_a_macvtap_by_its_descriptor(namespaces, tmp_path):
    """The descriptor of a macvtap has no `iff:` line; its device leads to the interface."""
    host = namespaces()
    host.ip("link add up0 type veth peer name up1")
    host.ip("link add link up0 name mv0 type macvtap mode bridge")
    host.ip("link set mv0 up")
    script = """
import os, sys
from vmstate import nics
(name,) = os.listdir("/sys/class/net/mv0/macvtap")
major, minor = map(int, open(f"/sys/class/net/mv0/macvtap/{name}/dev").read().split(":"))
os.mknod(sys.argv[1], 0o20600, os.makedev(major, minor))
fd = os.open(sys.argv[1], os.O_RDWR)
text = "a: index=0,type=nic,model=a,macaddr=52:54:00:12:34:56\\r\\n \\\\ b: index=0,type=tap,fd=%d\\r\\n" % fd
print(nics.line(nics.from_info_network(text, os.getpid())[0]))
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


NO_CAPABILITY = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--")
ONLY_RAW = ("setpriv", "--bounding-set=-all,+net_raw", "--inh-caps=-all,+net_raw", "--")


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
    both = announce.frames(Nic(ONE, "tap0")) + announce.frames(Nic(TWO, "tap0"))
    assert seen == both * ROUNDS + announce.frames(Nic(ONE, "tap0"))


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
    assert seen == announce.frames(Nic(ONE, "br0")) * ROUNDS


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
    assert seen == announce.frames(Nic(TWO, "br0")) * ROUNDS


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
    assert told == f"vm-announce: warning: {ONE}: round 2 on br0: Network is down\n"


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
    assert plain.stdout == f"{where}: RARP, ARP 192.0.2.7, ND 2001:db8::7; at 0 50 200 450 800 ms\n"
    assert json.loads(as_json.stdout) == {
        "vmstate": 1,
        "type": "announcement",
        "command": "vm-announce",
        "mac": ONE,
        "addresses": ["192.0.2.7", "2001:db8::7"],
        "iface": "br0",
        "tap": "tap0",
        "moments": [0, 50, 200, 450, 800],
    }


@pytest.mark.root
def test_json(place):
    host, _ = place
    done = host.announce("--json", *FAST, stdin=f"{ONE} br0\n{TWO} nowhere\n")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["type"], told["mac"], told["iface"], told["tap"]) == ("announced", ONE, "br0", None)
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
        ("QEVM" * 300000, "expected NIC lines, at most 1048576 bytes of them, found more"),
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


class Monitor:
    """As much of QMP as is needed here."""

    def __init__(self, path, process):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT)
        until(lambda: process.poll() is not None or not self._socket.connect_ex(str(path)), "QEMU answers")
        assert process.poll() is None, "QEMU has ended"
        self._file = self._socket.makefile("rwb")
        self._file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command, **arguments):
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while "return" not in (answer := json.loads(self._file.readline())):
            assert "event" in answer, answer
        return answer["return"]

    def close(self):
        self._file.close()
        self._socket.close()


@pytest.fixture
def qemu(tmp_path):
    """A function that starts a QEMU that runs nothing; gives its process and its monitor."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, before=(), **more):
            path = tmp_path / f"{next(NUMBERS)}.qmp"
            command = [*before, "qemu-system-x86_64", "-accel", "tcg", "-S", "-display", "none", "-m", "32", *arguments]
            command += ["-nodefaults", "-qmp", f"unix:{path},server,nowait"]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **more)
            stack.callback(process.wait, WAIT)
            stack.callback(process.kill)
            monitor = Monitor(path, process)
            stack.callback(monitor.close)
            return process, monitor

        yield start


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
    assert frames == announce.frames(Nic(ONE, "br0")) * 3


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
    cards = nics.from_info_network(text, process.pid, monitor.ask("query-rx-filter"))
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
    cards = nics.from_info_network(text, process.pid, monitor.ask("query-rx-filter"))
    assert sorted((nic.mac, nic.iface) for nic in cards) == [(ONE, "one"), (TWO, "two")]
    assert [nic.iface for nic in nics.from_info_network(text, None)] == [None, None]
