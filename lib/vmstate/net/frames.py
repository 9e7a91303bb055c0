"""Frames that tell a network where a guest's card is, byte for byte.

Formats: RARP is RFC 903 in the shape QEMU sends; ARP is RFC 826, announced as RFC 5227 and RFC 5944 (4.6) have it; the
unsolicited neighbour advertisement is RFC 4861 (4.4, 7.2.6); tags are those of IEEE 802.1Q, two of them of 802.1ad.
"""

import socket
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

BROADCAST = b"\xff" * 6
NOBODY = bytes(6)
ALL_NODES_MAC = bytes.fromhex("333300000001")
ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")
# The shortest Ethernet frame, without its checksum.
SHORTEST = 60
ARP, RARP, IPV6, VLAN, SERVICE_VLAN = 0x0806, 0x8035, 0x86DD, 0x8100, 0x88A8
ARP_REQUEST, ARP_REPLY, RARP_REQUEST = 1, 2, 3
ICMPV6 = 58
ADVERTISEMENT = 136
OVERRIDE = 0x20000000
ETHERNET = 1


class EthernetFrame(NamedTuple):
    """`kind` is rarp, arp-request, arp-reply or advertisement; `tags` are VLANs from the outermost."""

    kind: str
    address: str | None
    tags: tuple[int, ...]
    data: bytes


def of_card(mac: str, addresses: Iterable[str], tags: Sequence[int] = ()) -> list[EthernetFrame]:
    """What one round sends for a card: RARP, then two ARP frames per IPv4, one advertisement per IPv6 address."""
    return [
        EthernetFrame("rarp", None, tuple(tags), tagged(rarp(packed(mac)), tags)),
        *of_addresses(mac, addresses, tags),
    ]


def of_addresses(mac: str, addresses: Iterable[str], tags: Sequence[int] = ()) -> list[EthernetFrame]:
    """The same without RARP."""
    sender = packed(mac)
    found = []
    for address in addresses:
        if ":" in address:
            made = {"advertisement": advertisement(sender, socket.inet_pton(socket.AF_INET6, address))}
        else:
            ip = socket.inet_pton(socket.AF_INET, address)
            made = {"arp-request": arp_request(sender, ip), "arp-reply": arp_reply(sender, ip)}
        found += [EthernetFrame(kind, address, tuple(tags), tagged(data, tags)) for kind, data in made.items()]
    return found


def packed(mac: str) -> bytes:
    """The 6 bytes of xx:xx:xx:xx:xx:xx."""
    return bytes.fromhex(mac.replace(":", ""))


def rarp(mac: bytes) -> bytes:
    """QEMU's own announcement, 60 bytes: nobody answers it, but switches learn by it."""
    return _arp(RARP, RARP_REQUEST, mac, bytes(4), mac)


def arp_request(mac: bytes, ip: bytes) -> bytes:
    """A gratuitous ARP request, 60 bytes; `ip` has 4."""
    return _arp(ARP, ARP_REQUEST, mac, ip, NOBODY)


def arp_reply(mac: bytes, ip: bytes) -> bytes:
    """A gratuitous ARP reply, 60 bytes, for those who learn from replies alone; `ip` has 4."""
    # RFC 5944: the target is the sender. Linux takes a reply for gratuitous only then.
    return _arp(ARP, ARP_REPLY, mac, ip, mac)


def _arp(ethertype: int, operation: int, mac: bytes, ip: bytes, target: bytes) -> bytes:
    header = BROADCAST + mac + struct.pack("!HHHBBH", ethertype, ETHERNET, 0x0800, 6, 4, operation)
    return (header + mac + ip + target + ip).ljust(SHORTEST, b"\0")


def advertisement(mac: bytes, ip: bytes) -> bytes:
    """An unsolicited neighbour advertisement to all nodes, 86 bytes; `ip` has 16."""
    flags_target_option = struct.pack("!I", OVERRIDE) + ip + b"\x02\x01" + mac
    plain = struct.pack("!BBH", ADVERTISEMENT, 0, 0) + flags_target_option
    summed = checksum(ip + ALL_NODES + struct.pack("!II", len(plain), ICMPV6) + plain)
    message = struct.pack("!BBH", ADVERTISEMENT, 0, summed) + flags_target_option
    header = struct.pack("!IHBB", 6 << 28, len(message), ICMPV6, 255)
    return ALL_NODES_MAC + mac + struct.pack("!H", IPV6) + header + ip + ALL_NODES + message


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tagged(frame: bytes, tags: Sequence[int]) -> bytes:
    """A frame with 4 bytes more for each VLAN: the innermost is a customer's tag, those around it a provider's."""
    # Not cut back to the shortest: whoever takes the tag away must not have to pad.
    kinds = [SERVICE_VLAN] * (len(tags) - 1) + [VLAN]
    return frame[:12] + b"".join(struct.pack("!HH", *pair) for pair in zip(kinds, tags, strict=False)) + frame[12:]


def ethertype(frame: bytes) -> int:
    """The outermost one: what the kernel is told that it sends."""
    return int.from_bytes(frame[12:14], "big")
