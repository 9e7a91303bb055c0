"""A guest's network cards and their interfaces on the host, from what QEMU says of them.

This module does not talk to QEMU: it reads the answers of `info network` (HMP) and `query-rx-filter` (QMP).
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..net.neighbours import neighbours
from ..net.nic import MAC, SYS, Nic, is_unicast
from .answers import RxFilter

PROC = "/proc"
# "net0: index=0,type=tap,ifname=tap0,..."; in a hub the port's name stands before: "hub0port1: net0: index=0,..."
_CLIENT = re.compile(r"(?:.*: )?(?P<name>\S+): index=(?P<queue>\d+),type=(?P<type>[^,]+),?(?P<info>.*)")
_PEER = " \\ "


class _Client(NamedTuple):
    """One line of `info network`: a card, or what it is plugged into."""

    name: str
    type: str
    info: str

    def value(self, key: str) -> str | None:
        # An interface's name may hold a comma, so the end is where the next key begins.
        found = re.search(rf"(?:^|,){key}=(.*?)(?:,\w+=|$)", self.info)
        return found[1] if found else None


def from_info_network(text: str, pid: int | None, filters: Iterable[RxFilter] = ()) -> list[Nic]:
    """The cards of a guest and their interfaces on this host, each card once, in QEMU's order.

    `text` is what HMP `info network` printed, `pid` the QEMU that printed it (None: unknown), `filters` what
    the cards take frames for: the address there wins, since the guest may have changed it.  `iface` is the tap or
    macvtap, the bridge where only that is known, None for a card with no interface (user, socket, ...) or where
    /proc/PID cannot be read.  `addresses` are those that the host's neighbour table has for the card.
    """
    macs = {entry.name: entry.mac for entry in filters}
    groups = list(_groups(text))
    ifaces = _ifaces([client for group in groups for client in group if client.type == "tap"], pid)
    found = []
    for group in groups:
        iface = next((ifaces[client] for client in group if ifaces.get(client)), None)
        for card in (client for client in group if client.type == "nic"):
            if mac := _mac_of(card, macs):
                found.append((mac, iface))
    known = neighbours() if found else {}
    return [Nic(mac, iface, known.get(mac, ())) for mac, iface in found]


def _mac_of(card: _Client, macs: dict[str, str]) -> str | None:
    for mac in (macs.get(card.name, ""), (card.value("macaddr") or "").lower()):
        if MAC.fullmatch(mac) and is_unicast(mac):
            return mac
    return None


def _groups(text: str) -> Iterator[list[_Client]]:
    """What is plugged together: a card and its peer, or everything on one hub; further queues are left out."""
    group: list[_Client] = []
    for part in text.splitlines():
        if not part.startswith(_PEER) and (_CLIENT.fullmatch(part) or part.startswith("hub ")):
            yield group
            group = []
        found = _CLIENT.fullmatch(part.removeprefix(_PEER))
        if found and found["queue"] == "0":
            group.append(_Client(found["name"], found["type"], found["info"]))
    yield group


def _ifaces(taps: Sequence[_Client], pid: int | None) -> dict[_Client, str | None]:
    """The interface of each tap."""
    found = {tap: tap.value("ifname") or _of_descriptor(pid, tap.value("fd")) for tap in taps}
    # For a tap that a helper opened QEMU tells neither name nor descriptor: it is the one that no other card has.
    helped = [tap for tap in taps if tap.value("helper")]
    left = _of_process(pid) - {name for name in found.values() if name} if helped else set()
    for tap in helped:
        bridge = tap.value("br")
        fitting = {name for name in left if bridge in (None, _master(name))}
        # Two taps from one bridge cannot be told apart; their frames leave by that bridge all the same.
        rivals = [other for other in helped if bridge is None or other.value("br") in (None, bridge)]
        found[tap] = fitting.pop() if len(fitting) == len(rivals) == 1 else bridge
    return found


def _master(iface: str) -> str | None:
    with contextlib.suppress(OSError):
        return os.path.basename(os.readlink(f"{SYS}/class/net/{iface}/master"))
    return None


def _of_process(pid: int | None) -> set[str]:
    """Every tap that a process has open."""
    try:
        descriptors = os.listdir(f"{PROC}/{pid}/fdinfo") if pid else []
    except OSError:
        return set()
    return {name for descriptor in descriptors if (name := _of_descriptor(pid, descriptor))}


def _of_descriptor(pid: int | None, descriptor: str | None) -> str | None:
    """The tap or macvtap behind a descriptor of a process; None where it is none, or cannot be seen."""
    if not pid or not descriptor or not descriptor.isdecimal():
        return None
    with contextlib.suppress(OSError):
        with open(f"{PROC}/{pid}/fdinfo/{descriptor}", errors="surrogateescape") as info:
            if found := re.search(r"^iff:\t(.+)$", info.read(), re.MULTILINE):
                return found[1]
        return _macvtap(f"{PROC}/{pid}/fd/{descriptor}")
    return None


def _macvtap(path: str) -> str | None:
    # Each macvtap is a character device of its own; sysfs has it below its interface: .../net/IFACE/macvtap/tapN
    device = os.stat(path).st_rdev
    place = os.path.realpath(f"{SYS}/dev/char/{os.major(device)}:{os.minor(device)}")
    found = re.search(r"/net/([^/]+)/(?:macvtap/|ipvtap/)?tap\d+$", place)
    return found[1] if found else None
