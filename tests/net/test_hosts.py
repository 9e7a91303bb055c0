"""From host A to host B, over nc and over ssh, with real network cards: the guest's connections live."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import Guests
from guest.judge import as_it_was, went_on
from vm import until

from net.hosts import ADDRESS, Client, Hosts, source_on_a, waiting_on_b

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.timeout(240)]
KEY = "me@example.org"


@pytest.mark.parametrize(
    ("seal", "unseal"),
    [(f"gpg -q -e -z 0 -r {KEY}", "gpg -q -d"), (f"vm-encrypt -r {KEY}", "vm-encrypt -d")],
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


def test_two_hosts_are_what_they_seem(two: Hosts) -> None:
    reach = f"ping -c 1 -W 2 {ADDRESS['B']}"
    assert two.sh("A", reach).status == 0
    two.link("B", "down")
    assert two.sh("A", reach).status != 0
