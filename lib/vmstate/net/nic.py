"""A guest's network card, and the NIC line that tells of it between commands.

A NIC line is `MAC IFACE [IP...]`, blank-separated; IFACE is `-` for a card with no interface on this host.
"""

import ipaddress
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import Damaged, WrongUsage

SYS = "/sys"
# Where Debian keeps ip and bridge is not in every user's PATH.
TOOLS = "/usr/sbin:/usr/bin:/sbin:/bin"
IFACE_BYTES = 15
QUOTED = 60
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


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
    if not MAC.fullmatch(mac):
        raise ValueError(f"expected a MAC address like 52:54:00:12:34:56, found {_quoted(text)}")
    if not is_unicast(mac):
        raise ValueError(f"expected the MAC address of one card, found {_quoted(text)}, a group's or nobody's")
    return mac


def is_mac(text: str) -> bool:
    """Whether a text is meant as an Ethernet address."""
    return bool(MAC.fullmatch(text.lower().replace("-", ":")))


def is_unicast(mac: str) -> bool:
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
    if not is_announceable(address) or "%" in text:
        raise ValueError(f"expected the address of one card, found {_quoted(text)}")
    return str(address)


def announceable(text: str) -> bool:
    """Whether a text is the address of one card, and could stand in a NIC line."""
    try:
        return "%" not in text and is_announceable(ipaddress.ip_address(text))
    except ValueError:
        return False


def is_announceable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    useless = address.is_multicast or address.is_unspecified or address.is_loopback
    return not useless and str(address) != "255.255.255.255"
