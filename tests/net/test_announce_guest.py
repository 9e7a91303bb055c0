"""A real guest that moves between two hosts, and what the network makes of its announcement.

The switch between the hosts still has it at the old one; from the switch's place it is pinged and held by TCP.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Guests
from vm import MAC, Guest, until
from vmstate.qemu import guest_agent

from net.hosts import GUEST, Client, Hosts, source_on_a, waiting_on_b

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.timeout(240)]
STALE = "02:00:00:00:00:99"


def loaded(guests: Guests, two: Hosts, card: str = "") -> Guest:
    """The guest on B, held and silent, that ran on A until now, with properties of its card; QEMU's own move."""
    net = two.tap()
    net[-1] += card
    source = guests.running("a", qemu=two.qemu("A"), net=net, append=f"ip={GUEST}/24")
    guest = guests.waiting("b", qemu=two.qemu("B"), net=net, append=f"ip={GUEST}/24")
    two.sh("S", f"ping -c 1 -W 5 {GUEST}")
    carry(two, source, guest)
    return guest


def carry(two: Hosts, source: Guest, guest: Guest) -> None:
    """By way of a file."""
    guest.cmd("stop")
    guest.cmd("migrate-set-parameters", **{"announce-rounds": 0})
    path = two.folder / "state"
    source.cmd("migrate-set-parameters", **{"max-bandwidth": 0})
    source.cmd("migrate", uri=f"exec:cat > {path}")
    source.wait_status("postmigrate")
    guest.cmd("migrate-incoming", uri=f"exec:cat {path}")
    guest.wait_status("paused")


def port_of_the_switch(two: Hosts) -> str:
    entries = json.loads(two.sh("S", "bridge -j fdb show br br0").text)
    return "".join(entry["ifname"] for entry in entries if entry["mac"] == MAC)


def answers(two: Hosts, seconds: float = 1) -> bool:
    return two.sh("S", f"ping -c 1 -W {seconds} {GUEST}").status == 0


def unreachable(two: Hosts) -> bool:
    """Whether nobody gets through while the switch has it at the old place: in a second in which the guest does not
    speak by itself, as it does when it asks for routers, or whether a neighbour is there still."""
    for _ in range(8):
        assert two.sh("S", f"bridge fdb replace {MAC} dev vA master dynamic").status == 0
        if not answers(two):
            return True
    return False


@pytest.fixture
def guest(guests: Guests, two: Hosts) -> Iterator[Guest]:
    yield loaded(guests, two)


def test_one_round_has_the_network_find_it(guest: Guest, two: Hosts) -> None:
    """Nobody gets through before; afterwards its source, which keeps the state, is not where it is announced."""
    guest.cmd("cont")
    assert unreachable(two)
    done = two.sh("B", f"vm-announce --rounds 1 {MAC} tap0 {GUEST}")
    assert (done.status, done.err) == (0, "")
    assert port_of_the_switch(two) == "vB"
    assert answers(two)
    for words in ("a.qmp", "--self a.qmp"):
        done = two.sh("A", f"vm-announce {words}")
        assert done.status == 1
        assert "the guest at a.qmp was moved away, and is to be announced where it runs" in done.err
    assert port_of_the_switch(two) == "vB"


def test_a_connection_goes_on(guests: Guests, two: Hosts) -> None:
    """Of TCP, held from the switch's place all the time."""
    source, moved = source_on_a(guests, two), waiting_on_b(guests, two)
    client = Client(two)
    carry(two, source, moved)
    moved.cmd("cont")
    assert two.sh("B", f"vm-announce --rounds 1 {MAC} tap0 {GUEST}").status == 0
    client.lives()
    assert port_of_the_switch(two) == "vB"


def test_until_it_is_heard(guest: Guest, two: Hosts) -> None:
    """It ends with the first ping that the network sends to the new place."""
    guest.cmd("cont")
    pings = two.background("S", f"ping -q -i 0.05 {GUEST}")
    done = two.sh("B", f"vm-announce --until-heard --json --rounds 100 {MAC} tap0 {GUEST}")
    pings.terminate()
    assert done.status == 0
    told = [json.loads(line) for line in done.text.splitlines()]
    (heard,) = [one for one in told if one["type"] == "heard"]
    assert (heard["rounds"], heard["tap"]) == (1, "tap0")
    assert heard["ms"] < 200


def test_a_stale_address_is_corrected_by_ours_and_not_by_rarp(guests: Guests, two: Hosts) -> None:
    """A neighbour has the guest's address at another card: QEMU's announcement, by MAC alone, leaves it there.

    The guest is not one that QEMU can ask to announce itself, as Windows, e1000 and others are not.
    """
    guest = loaded(guests, two, ",guest_announce=off")
    guest.cmd("cont")
    for address, family in ((GUEST, "-4"), ("2001:db8::5", "-6")):
        two.sh("S", f"ip neigh replace {address} lladdr {STALE} dev br0 nud stale")
        assert STALE in neighbour(two, address, family)
    guest.cmd("announce-self", initial=5, max=5, rounds=3, step=0)
    until(lambda: port_of_the_switch(two) == "vB", 10, "the switch has heard QEMU")
    time.sleep(0.5)
    assert two.sh("B", f"vm-announce --as-is --rounds 3 --initial 5 --step 0 {MAC} tap0").status == 0
    for address, family in ((GUEST, "-4"), ("2001:db8::5", "-6")):
        assert STALE in neighbour(two, address, family)
    assert two.sh("B", f"vm-announce --rounds 1 {MAC} tap0 {GUEST} 2001:db8::5").status == 0
    for address, family in ((GUEST, "-4"), ("2001:db8::5", "-6")):
        until(lambda a=address, f=family: MAC in neighbour(two, a, f), 10, "the neighbour has learned")
    assert answers(two)


def neighbour(two: Hosts, address: str, family: str) -> str:
    return two.sh("S", f"ip {family} neigh show {address} dev br0").text


def test_the_guests_agent_knows_its_addresses(guests: Guests, two: Hosts, work: Path) -> None:
    guest = guests.running("a", qemu=two.qemu("A"), net=two.tap(), append=f"ip={GUEST}/24", agent=True)
    until(lambda: agent_answers(work / "a.agent"), 60, "the agent answers")
    listed = two.sh("A", "vm-announce --list a.qmp").text
    assert f"ARP {GUEST} (the guest's agent)" in listed
    assert "ND fe80::" in listed
    listed = two.sh("A", f"echo {MAC} tap0 | vm-announce --list --guest a.qmp").text
    assert f"ARP {GUEST} (the guest's agent)" in listed
    done = two.sh("A", "vm-announce --json --rounds 1 a.qmp")
    told = [json.loads(line) for line in done.text.splitlines()]
    assert {GUEST} <= {address for one in told if one["type"] == "announced" for address in one["addresses"]}
    assert guest.running()


def agent_answers(path: Path) -> bool:
    try:
        return bool(guest_agent.addresses(str(path), 1))
    except Exception:  # noqa: BLE001 - it starts
        return False


def test_a_virtio_guest_announces_itself(guest: Guest, two: Hosts) -> None:
    """Asked by its QEMU it sends ARP with its own address, which no QEMU knows."""
    guest.cmd("cont")
    two.sh("S", f"ip neigh replace {GUEST} lladdr {STALE} dev br0 nud stale")
    done = two.sh("B", "vm-announce --self b.qmp")
    assert (done.status, done.err) == (0, "")
    until(lambda: MAC in neighbour(two, GUEST, "-4"), 20, "the guest has announced itself")
