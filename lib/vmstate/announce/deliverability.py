"""Whether an announcement is likely to arrive and to be believed, as far as this host can see, in words.

What a switch beyond this host does (port security, a table that is full) nobody here can see: only what hints at it.
"""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..net import neighbours
from ..net.egress import Egress, lower_of, number, path_of

PROC_SYS = "/proc/sys/net"
FORWARDING = 3
STATES = {0: "is disabled", 1: "is listening", 2: "is learning", 4: "is blocked"}
# Drivers of cards that a hypervisor or a cloud gives, which often lets out no other address than the card's own.
GUEST_CARDS = {"virtio_net", "ena", "hv_netvsc", "vmxnet3", "gve", "xen_netfront", "iavf", "ixgbevf"}


class Doubt(NamedTuple):
    """`bad`: frames or belief may be lost by it.  `hint`: what to do about that, if anything."""

    bad: bool
    text: str
    hint: str = ""


def doubts(place: Egress) -> list[Doubt]:
    """Of one card; what is bad comes first."""
    links = {str(link.get("ifname")): link for link in neighbours.links()}
    found = [*_interface(place.iface), *_bridge(place, links), *_ways_out(place, links), *_sysctls(place)]
    return sorted(found, key=lambda one: not one.bad)


def _interface(iface: str) -> Iterator[Doubt]:
    if _number(iface, "carrier") == 0:
        yield Doubt(True, f"{iface} has no carrier: what is sent on it reaches nobody", "see to the cable or the ports")
    else:
        yield Doubt(False, f"{iface} is up and has a carrier")


def _bridge(place: Egress, links: dict[str, dict[str, Any]]) -> Iterator[Doubt]:
    bridge = place.iface
    if not os.path.isdir(path_of(bridge, "bridge")):
        return
    others = [port for port in _ports(bridge) if port != place.tap]
    if not others:
        yield Doubt(True, f"bridge {bridge} has no port to the network: nobody outside hears what is sent on it")
    if place.tap:
        yield from _port_of_the_guest(place.tap, links.get(place.tap, {}))
        yield from _entry(place)
    if _number(bridge, "bridge/vlan_filtering"):
        text = f"bridge {bridge} filters VLANs: the frames go out in its own VLAN, which may not be the guest's"
        yield Doubt(True, text, f"bridge vlan show; then --vlan ID, with {bridge} itself in that VLAN")
    if _number(bridge, "bridge/nf_call_arptables"):
        yield Doubt(True, f"bridge {bridge} has arptables look at ARP, which may drop it", "arptables -L")


def _port_of_the_guest(tap: str, link: dict[str, Any]) -> Iterator[Doubt]:
    state = _number(tap, "brport/state")
    if state not in (None, FORWARDING):
        text = f"port {tap} {STATES.get(state or 0, 'does not forward')}: no frame goes to the guest yet"
        yield Doubt(True, text, "it forwards once QEMU has opened it, and with STP after the bridge's forward delay")
    flags = link.get("linkinfo", {}).get("info_slave_data", {})
    if flags.get("locked"):
        text = f"port {tap} is locked: the bridge drops frames of addresses that it was not told (port security)"
        yield Doubt(True, text, f"bridge fdb replace MAC dev {tap} master static")
    if flags.get("learning") is False:
        text = f"port {tap} learns nothing: only a moved entry has the guest's frames come to it"
        yield Doubt(True, text, "it needs CAP_NET_ADMIN")
    if flags.get("isolated"):
        yield Doubt(False, f"port {tap} is isolated: other isolated ports do not reach the guest")


def _entry(place: Egress) -> Iterator[Doubt]:
    where = [
        port for port, macs in neighbours.learned().items() if place.nic.mac in macs and port in _ports(place.iface)
    ]
    if where and place.tap not in where:
        text = f"bridge {place.iface} has {place.nic.mac} behind {where[0]}: the old place"
        yield Doubt(False, text + "; its entry is moved when the card is announced")


def _ways_out(place: Egress, links: dict[str, dict[str, Any]]) -> Iterator[Doubt]:
    ports = [port for port in _ports(place.iface) if port != place.tap] or [lower_of(place.iface) or place.iface]
    for port in ports:
        state = _number(port, "brport/state")
        if state not in (None, FORWARDING):
            yield Doubt(True, f"port {port} {STATES.get(state or 0, 'does not forward')}: nothing leaves by it")
        if os.path.exists(path_of(port, "phy80211")):
            yield Doubt(True, f"{port} is a wireless card: an access point takes no other address than its own")
        driver = os.path.basename(os.path.realpath(path_of(port, "device/driver")))
        if driver in GUEST_CARDS:
            text = f"{port} is itself the card of a guest or a part of one ({driver}): whoever gives it may drop frames"
            hint = "allow other MAC addresses there: MAC spoofing, port security, or `ip link set … vf … spoofchk off`"
            yield Doubt(True, f"{text} of other addresses than its own", hint)
    mode = links.get(place.iface, {}).get("linkinfo", {}).get("info_data", {}).get("mode")
    if lower_of(place.iface) and mode in ("private", "vepa"):
        text = f"{place.iface} is in mode {mode}: other guests on {lower_of(place.iface)} hear it only by a switch"
        yield Doubt(mode == "private", f"{text} that sends frames back")


def _sysctls(place: Egress) -> Iterator[Doubt]:
    """What a peer that is set as this host would make of it."""
    iface = place.iface
    yield _ipv4(iface)
    if _sysctl("ipv6", iface, "drop_unsolicited_na"):
        text = f"this host drops unsolicited advertisements on {iface}; peers set like it keep a stale address"
        yield Doubt(True, text, f"sysctl net.ipv6.conf.{iface}.drop_unsolicited_na=0")
    notify = "announces" if _sysctl("ipv4", iface, "arp_notify") else "does not announce"
    text = f"the kernel {notify} this host's own addresses when {iface} comes up (arp_notify)"
    yield Doubt(False, f"{text}; for a guest's it does nothing, unless the guest has it set inside")


def _ipv4(iface: str) -> Doubt:
    if _sysctl("ipv4", iface, "drop_gratuitous_arp"):
        text = (
            f"this host drops gratuitous ARP on {iface} (drop_gratuitous_arp); peers set like it keep a stale address"
        )
        return Doubt(True, text, f"sysctl net.ipv4.conf.{iface}.drop_gratuitous_arp=0")
    if _sysctl("ipv4", iface, "arp_accept"):
        return Doubt(
            False, f"a peer set like this host takes the IPv4 address, known or not (arp_accept of {iface} is on)"
        )
    text = "a peer set like this host corrects the IPv4 address that it knows, and learns none that it does not know"
    return Doubt(False, f"{text} (arp_accept of {iface} is 0); it asks when it needs that")


def _sysctl(family: str, iface: str, name: str) -> int:
    values = []
    # The kernel takes the larger one for all of these.
    for place in ("all", iface):
        try:
            with open(f"{PROC_SYS}/{family}/conf/{place}/{name}") as file:
                values.append(int(file.read()))
        except (OSError, ValueError):
            continue
    return max(values, default=0)


def _ports(bridge: str) -> list[str]:
    try:
        return sorted(os.listdir(path_of(bridge, "brif")))
    except OSError:
        return []


def _number(iface: str, name: str) -> int | None:
    try:
        return number(iface, name)
    except (OSError, ValueError):
        return None
