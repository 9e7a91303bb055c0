"""Whether the bridges of two hosts are in one subnet, before a guest moves from one to the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Guests
from vm import MAC, Guest
from vmstate.migrate.finding import Finding
from vmstate.migrate.preflight import compare

from net.hosts import ADDRESS, Hosts, hosts, ip

pytestmark = [pytest.mark.root, pytest.mark.guest]

FACTS = """
import json, sys
from vmstate.qemu import monitor
from vmstate.migrate import preflight
with monitor.Monitor(sys.argv[1]) as m:
    json.dump(preflight.facts(m), sys.stdout)
"""


def known(two: Hosts, host: str, guest: Guest) -> dict[str, Any]:
    """Facts as a process on that host finds them."""
    Path(two.folder, "facts.py").write_text(FACTS)
    done = two.sh(host, f"{sys.executable} facts.py {guest.qmp}", timeout=30)
    assert done.status == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def found(guests: Guests, two: Hosts) -> list[Finding]:
    source = guests.start("a", kind="metal", qemu=two.qemu("A"), net=two.tap())
    there = guests.waiting("b", kind="metal", qemu=two.qemu("B"), net=two.tap())
    ours, theirs = known(two, "A", source), known(two, "B", there)
    assert ours["nics"] == [{"mac": MAC, "iface": "tap0", "subnets": ["192.0.2.0/24"]}]
    return compare(ours, theirs)


def test_one_subnet(guests: Guests, work: Path) -> None:
    with hosts(work) as two:
        assert found(guests, two) == []
        guests.end()


def test_another_subnet(guests: Guests, work: Path) -> None:
    with hosts(work) as two:
        ip(f"-n {two.name('B')} addr del {ADDRESS['B']}/24 dev br0")
        ip(f"-n {two.name('B')} addr add 198.51.100.1/24 dev br0")
        findings = found(guests, two)
        assert [(f.level, f.text) for f in findings] == [
            ("warning", f"card {MAC} is in 192.0.2.0/24, and there in 198.51.100.0/24: not the same subnet")
        ]
        guests.end()


def test_a_bridge_without_an_address(guests: Guests, work: Path) -> None:
    with hosts(work) as two:
        ip(f"-n {two.name('B')} addr flush dev br0")
        assert found(guests, two) == []
        guests.end()


def test_a_macvtap(guests: Guests, work: Path) -> None:
    """It is in the subnet of the device below it."""
    with hosts(work) as two:
        ip(f"-n {two.name('A')} link add link br0 name mv0 address {MAC} type macvtap mode bridge")
        ip(f"-n {two.name('A')} link set mv0 up")
        index = two.sh("A", "cat /sys/class/net/mv0/ifindex").text.strip()
        device = two.sh("A", "cat /sys/class/net/mv0/macvtap/*/dev").text.strip().replace(":", " ")
        assert two.sh("A", f"mknod tap{index} c {device}").status == 0
        # QEMU is handed a descriptor of it by a shell.
        opened = Path(work, "qemu")
        opened.write_text(f'#!/bin/bash\nexec 9<>{work}/tap{index}\nexec {two.qemu("A")} "$@"\n')
        opened.chmod(0o755)
        card = ["-netdev", "tap,id=net0,fd=9", "-device", f"virtio-net-pci,netdev=net0,mac={MAC},romfile="]
        guest = guests.start("a", kind="metal", qemu=str(opened), net=card)
        assert known(two, "A", guest)["nics"] == [{"mac": MAC, "iface": "mv0", "subnets": ["192.0.2.0/24"]}]
        guests.end()
