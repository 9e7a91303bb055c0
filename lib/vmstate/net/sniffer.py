"""What goes by on an interface: frames for a card, and what a card tells of itself.  A packet socket that only reads.

A card's addresses are taken from ARP and neighbour discovery alone, where it speaks for itself: the source of an IP
packet may be anybody for whom it routes.
"""

import array
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .frames import ARP, IPV6, NOBODY

ETH_P_ALL = 3
OUTGOING = 4
SOL_PACKET = 263
PACKET_ADD_MEMBERSHIP, PACKET_AUXDATA = 1, 8
PROMISCUOUS = 1
SO_ATTACH_FILTER = 26
AUXDATA = struct.Struct("=IIIHHHH")
TAG_VALID = 0x10
# As much of a frame as matters, and how many are read before others have their turn.
SNAP, AT_ONCE = 128, 256
SOLICITATION, ADVERTISEMENT = 135, 136
ROUTER = 0x80
# Only what this host sends: load the packet's direction, keep it if that is "outgoing" (linux/filter.h).
ONLY_OUTGOING = ((0x28, 0, 0, 0xFFFFF000 + 4), (0x15, 0, 1, OUTGOING), (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0))


class Seen(NamedTuple):
    """A frame without its tags, and these from the outermost; outgoing: this host sends it on that interface."""

    outgoing: bool
    data: bytes
    tags: tuple[int, ...]


class Sniffer:
    """One interface, whatever its frames are for; OSError where it is gone.  all: else only what this host sends."""

    def __init__(self, iface: str, *, all: bool = True) -> None:  # noqa: A002 - as one says it
        self.iface = iface
        self._index = socket.if_nametoindex(iface)
        # Bound before it hears anything: with a protocol it would hear all interfaces from here on.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        try:
            self._set_up(iface, all)
        except BaseException:
            self._socket.close()
            raise

    def _set_up(self, iface: str, every: bool) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        if every:
            wanted = struct.pack("=iHH8s", self._index, PROMISCUOUS, 0, b"")
            self._socket.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, wanted)
        else:
            code = array.array("B", b"".join(struct.pack("=HBBI", *part) for part in ONLY_OUTGOING))
            program = struct.pack("HL", len(ONLY_OUTGOING), code.buffer_info()[0])
            self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        self._socket.bind((iface, ETH_P_ALL))

    def fileno(self) -> int:
        return self._socket.fileno()

    def is_there(self) -> bool:
        """Whether the interface of that name is still the same."""
        try:
            return socket.if_nametoindex(self.iface) == self._index
        except OSError:
            return False

    def close(self) -> None:
        self._socket.close()

    def frames(self) -> Iterator[Seen]:
        """Those that have come, some hundreds at most."""
        for _ in range(AT_ONCE):
            try:
                data, words, _, where = self._socket.recvmsg(SNAP, 64)
            except OSError:
                # None is there, or the interface has gone.
                return
            yield Seen(where[2] == OUTGOING, *_untagged(data, words))

    def raw(self) -> Iterator[bytes]:
        """The same as bytes alone, as far as they are kept, with their tags where they stand in the frame."""
        while True:
            try:
                yield self._socket.recv(SNAP)
            except OSError:
                return


def _untagged(data: bytes, words: list[tuple[int, int, bytes]]) -> tuple[bytes, tuple[int, ...]]:
    """The kernel hands over the outermost tag beside the frame; any other one stands in it."""
    tags = []
    for level, kind, word in words:
        if (level, kind) == (SOL_PACKET, PACKET_AUXDATA) and len(word) >= AUXDATA.size:
            status, *_, tag, _ = AUXDATA.unpack_from(word)
            tags += [tag & 0xFFF] if status & TAG_VALID else []
    while data[12:14] in (b"\x81\x00", b"\x88\xa8") and len(data) >= 18:
        tags.append(int.from_bytes(data[14:16], "big") & 0xFFF)
        data = data[:12] + data[16:]
    # A tag of VLAN 0 has only a priority.
    return data, tuple(tag for tag in tags if tag)


def address_told(data: bytes) -> str | None:
    """The IP address that the sender of an untagged frame claims for itself; None where it claims none."""
    kind = int.from_bytes(data[12:14], "big")
    if kind == ARP:
        return _by_arp(data)
    return _by_discovery(data) if kind == IPV6 else None


def _by_arp(data: bytes) -> str | None:
    # A probe, which asks whether an address is free, has none of its own.
    if len(data) < 42 or data[22:28] != data[6:12] or not any(data[28:32]):
        return None
    return socket.inet_ntop(socket.AF_INET, data[28:32])


def _by_discovery(data: bytes) -> str | None:
    if len(data) < 78 or data[20] != 58 or data[6:12] == NOBODY:
        return None
    if data[54] == SOLICITATION:
        claimed = data[22:38]
    elif data[54] == ADVERTISEMENT and not data[58] & ROUTER:
        claimed = data[62:78]
    else:
        return None
    return socket.inet_ntop(socket.AF_INET6, claimed) if any(claimed) else None


def is_for(mac: bytes, seen: Seen, tap: bool) -> bool:
    """Whether a frame goes to a card: on its tap it leaves this host, on another interface it comes."""
    return seen.data[:6] == mac and seen.outgoing == tap
