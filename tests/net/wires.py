"""A host, a bridge and the network behind it, in namespaces: what the tests of vm-announce stand on.

host: tap0 -- br0 -- up0 ======== lan0 :lan
"""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vmstate.net import frames

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "bin/vm-announce")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
ONE, TWO = "52:54:00:12:34:56", "52:54:00:12:34:57"
WAIT = 20
FAST = ("--initial", "5", "--step", "5")
ROUNDS = 5
NO_CAPABILITY = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--")
ONLY_RAW = ("setpriv", "--bounding-set=-all,+net_raw", "--inh-caps=-all,+net_raw", "--")

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


def of(nic):
    """One round of a card."""
    return [frame.data for frame in frames.of_card(nic.mac, nic.addresses)]


def sh(*command, **more):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT, **more).stdout


def until(check, what, wait=WAIT):
    end = time.monotonic() + wait
    while not check():
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.02)


def waits(pid):
    """Whether a command has nothing to do; `ip netns exec` has become the command by then."""

    def stat():
        # State, and the time that it has used; behind its name, which may hold anything.
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], words[11:13]

    before = stat()
    time.sleep(0.2)
    return before == stat() and before[0] == "S"


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
    forwards(host, "up0")
    until(lambda: host.sh("cat", "/sys/class/net/br0/carrier") == "1\n", "br0 has a carrier")
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
