"""What a guest's network cards are: the NIC lines between commands, and where QEMU has tied a card to the host.

A NIC line is `MAC IFACE [IP...]`, blank-separated; IFACE is `-` for a card with no interface on this host.

This module does not talk to QEMU: it reads the answers of `info network` (HMP) and `query-rx-filter` (QMP).
"""

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import Damaged, WrongUsage

PROC = "/proc"
SYS = "/sys"
# Where Debian keeps ip and bridge is not in every user's PATH.
TOOLS = "/usr/sbin:/usr/bin:/sbin:/bin"
IFACE_BYTES = 15
QUOTED = 60
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
# "net0: index=0,type=tap,ifname=tap0,..."; in a hub the port's name stands before: "hub0port1: net0: index=0,..."
_CLIENT = re.compile(r"(?:.*: )?(?P<name>\S+): index=(?P<queue>\d+),type=(?P<type>[^,]+),?(?P<info>.*)")
_PEER = " \\ "


class Nic(NamedTuple):
    """A guest's card: `mac` as xx:xx:xx:xx:xx:xx in lower case, `iface` on the host, IPv4 and IPv6 `addresses`."""

    mac: str
    iface: str | None = None
    addresses: tuple[str, ...] = ()


def line(nic: Nic) -> str:
    """The NIC line, without a newline."""
    return " ".join((nic.mac, nic.iface or "-", *nic.addresses))


def parse_line(text: str, number: int = 1) -> Nic:
    """The inverse of `line`; Damaged, naming line `number`, what was expected and what was found."""
    try:
        return _nic(text.split())
    except ValueError as error:
        raise Damaged(f"line {number}: {error}") from error


def parse_lines(text: str) -> list[Nic]:
    """All NIC lines of an input, empty ones left out; Damaged at the first bad one."""
    return [parse_line(part, number) for number, part in enumerate(text.split("\n"), 1) if part.strip()]


def from_arguments(mac: str, iface: str, addresses: Sequence[str] = ()) -> Nic:
    """A card named on the command line; WrongUsage."""
    try:
        return _nic([mac, iface, *addresses])
    except ValueError as error:
        raise WrongUsage(str(error)) from error


def _nic(words: Sequence[str]) -> Nic:
    if len(words) < 2:
        raise ValueError(f"expected MAC IFACE [IP...], found {_quoted(' '.join(words))}")
    iface = None if words[1] == "-" else _iface(words[1])
    return Nic(_mac(words[0]), iface, tuple(dict.fromkeys(map(_address, words[2:]))))


def _quoted(text: str) -> str:
    # What came may be anything, a whole memory image too.
    return ascii(text if len(text) <= QUOTED else text[:QUOTED] + "...")


def _mac(text: str) -> str:
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise ValueError(f"expected a MAC address like 52:54:00:12:34:56, found {_quoted(text)}")
    if not _unicast(mac):
        raise ValueError(f"expected the MAC address of one card, found {_quoted(text)}, a group's or nobody's")
    return mac


def is_mac(text: str) -> bool:
    """Whether a text is meant as an Ethernet address."""
    return bool(_MAC.fullmatch(text.lower().replace("-", ":")))


def _unicast(mac: str) -> bool:
    return not int(mac[:2], 16) & 1 and mac != "00:00:00:00:00:00"


def _iface(text: str) -> str:
    # The kernel's own rule; it also keeps a name from leading anywhere else in /sys.
    fits = text.isprintable() and len(text.encode()) <= IFACE_BYTES
    if not fits or "/" in text or ":" in text or text in (".", ".."):
        raise ValueError(f"expected the name of an interface, or -, found {_quoted(text)}")
    return text


def _address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"expected an IPv4 or IPv6 address, found {_quoted(text)}") from None
    if not _announceable(address) or "%" in text:
        raise ValueError(f"expected the address of one card, found {_quoted(text)}")
    return str(address)


def announceable(text: str) -> bool:
    """Whether a text is the address of one card, and could stand in a NIC line."""
    try:
        return "%" not in text and _announceable(ipaddress.ip_address(text))
    except ValueError:
        return False


def _announceable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    useless = address.is_multicast or address.is_unspecified or address.is_loopback
    return not useless and str(address) != "255.255.255.255"


class _Client(NamedTuple):
    """One line of `info network`: a card, or what it is plugged into."""

    name: str
    type: str
    info: str

    def value(self, key: str) -> str | None:
        # An interface's name may hold a comma, so the end is where the next key begins.
        found = re.search(rf"(?:^|,){key}=(.*?)(?:,\w+=|$)", self.info)
        return found[1] if found else None


def from_info_network(text: str, pid: int | None, filters: Iterable[dict[str, Any]] = ()) -> list[Nic]:
    """The cards of a guest and their interfaces on this host, each card once, in QEMU's order.

    `text` is what HMP `info network` printed, `pid` the QEMU that printed it (None: unknown), `filters` the answer of
    `query-rx-filter`: its `main-mac` wins, since the guest may have changed the address.  `iface` is the tap or
    macvtap, the bridge where only that is known, None for a card with no interface (user, socket, ...) or where
    /proc/PID cannot be read.  `addresses` are those that the host's neighbour table has for the card.
    """
    macs = {str(entry.get("name")): str(entry.get("main-mac", "")).lower() for entry in filters}
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
        if _MAC.fullmatch(mac) and _unicast(mac):
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


def neighbours() -> dict[str, tuple[str, ...]]:
    """MAC -> addresses by the host's neighbour table; empty where it cannot be read."""
    return from_neighbours(_told("ip", "-j", "neigh", "show"))


def learned() -> dict[str, tuple[str, ...]]:
    """Port of a bridge -> the MACs that it has learned there; empty where that cannot be read."""
    return from_forwarding(_told("bridge", "-j", "fdb", "show"))


def links() -> list[dict[str, Any]]:
    """What `ip -d -j link show` tells of every interface; empty where it cannot be asked."""
    return _told("ip", "-d", "-j", "link", "show")


def _told(name: str, *words: str) -> list[dict[str, Any]]:
    # Whoever only reads or writes lines needs none of these, and is under way the sooner.
    import json
    import shutil
    import subprocess

    tool = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{TOOLS}")
    if not tool:
        return []
    try:
        answer = subprocess.run([tool, *words], capture_output=True, timeout=5, check=True)
        return list(json.loads(answer.stdout or b"[]"))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return []


def from_forwarding(entries: Iterable[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The same from the answer of `bridge -j fdb show`."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries:
        mac = str(entry.get("mac", "")).lower()
        # What a person or the kernel has set: a port's own address, groups.
        by_hand = entry.get("state") in ("permanent", "static") or "self" in entry.get("flags", ())
        if not by_hand and _MAC.fullmatch(mac) and _unicast(mac):
            found.setdefault(str(entry.get("ifname")), {})[mac] = None
    return {port: tuple(macs) for port, macs in found.items()}


def from_neighbours(entries: Iterable[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The same from the answer of `ip -j neigh show`; IPv4 comes first."""
    known: dict[str, set[ipaddress.IPv4Address | ipaddress.IPv6Address]] = {}
    for entry in entries:
        # An advertisement that does not say "router" would take a router out of every neighbour's routes.
        if {"FAILED", "INCOMPLETE"} & set(entry.get("state", ())) or "router" in entry or "lladdr" not in entry:
            continue
        with contextlib.suppress(ValueError, KeyError):
            address = ipaddress.ip_address(entry["dst"])
            if _announceable(address):
                known.setdefault(str(entry["lladdr"]).lower(), set()).add(address)
    return {mac: tuple(map(str, sorted(found, key=lambda a: (a.version, a.packed)))) for mac, found in known.items()}
