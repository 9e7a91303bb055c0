"""Two hosts and a switch between them, as network namespaces; the same folders, each with a bridge for its guests.

    A: tap0 -- br0 -- eth0 ==== vA \\
                                  switch (the client's place)
    B: tap0 -- br0 -- eth0 ==== vB /
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from conftest import Done, Guests, run
from vm import Guest, until

ADDRESS = {"A": "192.0.2.1", "B": "192.0.2.2", "S": "192.0.2.100"}
GUEST = "192.0.2.5"

# Sends a line to the guest's echo service now and then over one connection; a line lost for 20 s is the end.
CLIENT = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], 7), 20)
link.settimeout(20)
lines = link.makefile("rb")
for number in range(100000):
    link.sendall(b"%d\\n" % number)
    assert lines.readline() == b"%d\\n" % number
    print(number, flush=True)
    time.sleep(0.1)
"""


@dataclass
class Hosts:
    """`sh("A", …)` runs a pipeline on host A, in `folder`; `background` starts one that surely ends."""

    folder: Path
    prefix: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def name(self, host: str) -> str:
        return f"{self.prefix}{host}"

    def sh(self, host: str, script: str, timeout: float = 90) -> Done:
        return run(*self._command(host, script), cwd=self.folder, timeout=timeout)

    def background(self, host: str, script: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command(host, script), cwd=self.folder, start_new_session=True, stdin=subprocess.DEVNULL
        )
        self.started.append(process)
        return process

    def qemu(self, host: str) -> str:
        """The command line that starts QEMU on a host."""
        return f"ip netns exec {self.name(host)} {os.environ.get('VM_QEMU') or 'qemu-system-x86_64'}"

    def tap(self, mac: str = "52:54:00:00:00:01") -> list[str]:
        return [
            "-netdev",
            "tap,id=net0,ifname=tap0,script=no,downscript=no",
            "-device",
            f"virtio-net-pci,netdev=net0,mac={mac},romfile=",
        ]

    def _command(self, host: str, script: str) -> list[str]:
        return ["ip", "netns", "exec", self.name(host), "bash", "-o", "pipefail", "-c", script]

    def build(self) -> None:
        for host in "ABS":
            ip(f"netns add {self.name(host)}")
            for line in ("link set lo up", "link add br0 type bridge", "link set br0 up"):
                ip(f"-n {self.name(host)} {line}")
            ip(f"-n {self.name(host)} addr add {ADDRESS[host]}/24 dev br0")
        for host in "AB":
            ip(f"-n {self.name(host)} link add eth0 type veth peer name v{host} netns {self.name('S')}")
            for where, port in ((host, "eth0"), ("S", f"v{host}")):
                ip(f"-n {self.name(where)} link set {port} master br0 up")
            ip(f"-n {self.name(host)} tuntap add tap0 mode tap")
            ip(f"-n {self.name(host)} link set tap0 master br0 up")

    def link(self, host: str, state: str) -> None:
        ip(f"-n {self.name(host)} link set eth0 {state}")

    def destroy(self) -> None:
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        for host in "ABS":
            # A session whose link was lost does not know that it is over.
            for pid in run("ip", "netns", "pids", self.name(host)).text.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "del", self.name(host))


def ip(line: str) -> None:
    done = run("ip", *shlex.split(line))
    assert done.status == 0, f"ip {line}: {done.err}"


@contextlib.contextmanager
def hosts(folder: Path) -> Iterator[Hosts]:
    made = Hosts(folder, f"vm{os.getpid()}")
    try:
        made.build()
        yield made
    finally:
        made.destroy()


def source_on_a(guests: Guests, two: Hosts) -> Guest:
    return guests.running("a", qemu=two.qemu("A"), net=two.tap(), append=f"ip={GUEST}/24")


def waiting_on_b(guests: Guests, two: Hosts) -> Guest:
    return guests.waiting("b", qemu=two.qemu("B"), net=two.tap(), append=f"ip={GUEST}/24")


class Client:
    """A TCP connection to the guest, from the switch between the hosts."""

    def __init__(self, two: Hosts) -> None:
        Path(two.folder, "client.py").write_text(CLIENT)
        self._said = Path(two.folder, "client.out")
        self._said.touch()
        self._process = two.background("S", f"exec {sys.executable} client.py {GUEST} > client.out 2>&1")
        until(lambda: self.answers() > 2, 30, "the guest answers", lambda: self._said.read_text())

    def answers(self) -> int:
        return self._said.read_text().count("\n")

    def lives(self) -> None:
        before = self.answers()
        until(lambda: self.answers() > before + 3, 30, "the connection lives", lambda: self._said.read_text())
        assert self._process.poll() is None
