"""From host A to host B, over nc and over ssh, with real network cards: the guest's connections live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BIN, Guests, run
from guest.judge import as_it_was, went_on
from vm import Guest, until

from net.hosts import ADDRESS, GUEST, Hosts, hosts

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.timeout(240)]
KEY = "me@example.org"

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


@pytest.fixture
def two(work: Path) -> Iterator[Hosts]:
    with hosts(work) as made:
        yield made


def source_on_a(guests: Guests, two: Hosts) -> Guest:
    return guests.booted("a", qemu=two.qemu("A"), net=two.tap(), append=f"ip={GUEST}/24")


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


@pytest.mark.parametrize(
    ("seal", "unseal"),
    [(f"gpg -q -e -r {KEY}", "gpg -q -d"), (f"vm-encrypt -r {KEY}", "vm-encrypt -d")],
)
def test_over_nc(guests: Guests, two: Hosts, gnupg: Path, seal: str, unseal: str) -> None:
    source, guest = source_on_a(guests, two), waiting_on_b(guests, two)
    client = Client(two)
    receiving = two.background("B", f"nc -l 4444 | {unseal} | vm-restore b.qmp | vm-announce")
    until(lambda: "4444" in two.sh("B", "ss -ltn").text, 20, "nc listens")
    done = two.sh("A", f"vm-dump -q a.qmp | {seal} | nc -N {ADDRESS['B']} 4444")
    assert done.status == 0, done.err
    assert receiving.wait(60) == 0
    went_on(source.count() or 0, guest)
    assert source.status() == "postmigrate"
    client.lives()
    fdb = two.sh("B", "bridge fdb show br br0 | grep 52:54:00:00:00:01").text
    assert "dev tap0" in fdb
    assert "dev vB" in two.sh("S", "bridge fdb show br br0 | grep 52:54:00:00:00:01").text


def test_over_ssh(guests: Guests, two: Hosts, sshd: Path) -> None:
    source, guest = source_on_a(guests, two), waiting_on_b(guests, two)
    client = Client(two)
    remote = f"cd {two.folder} && vm-restore b.qmp | vm-announce"
    done = two.sh("A", f"vm-dump -q --to \"ssh -F {sshd} hostb '{remote}'\" a.qmp")
    assert done.status == 0, done.err
    went_on(source.count() or 0, guest)
    client.lives()


def test_over_ssh_what_the_far_end_refuses_runs_on_here(guests: Guests, two: Hosts, sshd: Path) -> None:
    source = source_on_a(guests, two)
    client = Client(two)
    done = two.sh("A", f"vm-dump --to \"ssh -F {sshd} hostb 'cd {two.folder} && vm-restore no.qmp'\" a.qmp")
    assert done.status == 1
    assert "no guest at no.qmp" in done.err
    as_it_was(source)
    client.lives()


def test_the_network_goes_away(guests: Guests, two: Hosts) -> None:
    source = source_on_a(guests, two)
    guest = waiting_on_b(guests, two)
    two.background("B", "nc -l 4444 | vm-restore b.qmp")
    until(lambda: "4444" in two.sh("B", "ss -ltn").text, 20, "nc listens")
    script = f"vm-dump --speed 20m a.qmp | nc -N {ADDRESS['B']} 4444"
    moving = two.background("A", script)
    until(lambda: source.cmd("query-migrate").get("status") == "active", 20, "under way")
    two.link("B", "down")
    sent = source.cmd("query-migrate")["ram"]["transferred"]
    assert source.running()
    assert sent < 100 << 20
    # Whoever waits for the network may give up at any time; here a person does.
    os.killpg(moving.pid, signal.SIGTERM)
    moving.wait(30)
    until(lambda: source.cmd("query-migrate").get("status") == "failed", 30, "it is over")
    as_it_was(source)
    assert guest.count() is None


@pytest.fixture
def sshd(two: Hosts, work: Path) -> Iterator[Path]:
    """A real sshd on host B with keys of its own; gives the configuration for `ssh -F`."""
    for name in ("host", "user"):
        assert run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / name).status == 0
    (work / "user.pub").rename(work / "allowed")
    Path("/run/sshd").mkdir(exist_ok=True)
    (work / "sshd_config").write_text(
        f"Port 22\nHostKey {work}/host\nAuthorizedKeysFile {work}/allowed\nStrictModes no\nUsePAM no\nPidFile none\n"
        f"SetEnv PATH={BIN}:{os.environ['PATH']}\n"
    )
    (work / "ssh_config").write_text(
        f"Host hostb\n  HostName {ADDRESS['B']}\n  IdentityFile {work}/user\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {work}/known\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
    )
    daemon = two.background("B", f"exec /usr/sbin/sshd -D -e -f {work}/sshd_config > sshd.log 2>&1")
    until(lambda: ":22 " in two.sh("B", "ss -ltn").text, 20, "sshd listens")
    yield work / "ssh_config"
    assert daemon.poll() is None, (work / "sshd.log").read_text()
    subprocess.run(["pkill", "-f", f"{work}/sshd_config"], check=False)


def test_two_hosts_are_what_they_seem(two: Hosts) -> None:
    reach = f"ping -c 1 -W 2 {ADDRESS['B']}"
    assert two.sh("A", reach).status == 0
    two.link("B", "down")
    assert two.sh("A", reach).status != 0
