"""Frames that tell a network where a guest's card is, when they are sent, and on which interface.

Formats: RARP is RFC 903 in the shape QEMU sends; ARP is RFC 826, announced as RFC 5227 and RFC 5944 (4.6) have it; the
unsolicited neighbour advertisement is RFC 4861 (4.4, 7.2.6).
"""

import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import CannotDo
from .nics import SYS, TOOLS, Nic

BROADCAST = b"\xff" * 6
NOBODY = bytes(6)
ALL_NODES_MAC = bytes.fromhex("333300000001")
ALL_NODES = ipaddress.IPv6Address("ff02::1").packed
# The shortest Ethernet frame, without its checksum.
SHORTEST = 60
ARP, RARP, IPV6 = 0x0806, 0x8035, 0x86DD
ARP_REQUEST, ARP_REPLY, RARP_REQUEST = 1, 2, 3
ICMPV6 = 58
ADVERTISEMENT = 136
OVERRIDE = 0x20000000
ETHERNET = 1
IFF_UP = 1


def frames(nic: Nic) -> list[bytes]:
    """What one round sends for a card: RARP, then two ARP frames per IPv4, one advertisement per IPv6 address."""
    mac = bytes.fromhex(nic.mac.replace(":", ""))
    found = [rarp(mac)]
    for address in map(ipaddress.ip_address, nic.addresses):
        if address.version == 4:
            found += [arp_request(mac, address.packed), arp_reply(mac, address.packed)]
        else:
            found.append(advertisement(mac, address.packed))
    return found


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


def schedule(initial: int = 50, maximum: int = 550, rounds: int = 5, step: int = 100) -> list[int]:
    """The moments of the rounds in ms; QEMU's announce-initial, -max, -rounds and -step: 0, 50, 200, 450, 800."""
    moments = [0]
    for number in range(rounds - 1):
        moments.append(moments[-1] + min(initial + number * step, maximum))
    return moments


@dataclass(frozen=True)
class Target:
    """A card, the interface its frames are sent on, and the tap that this bridge shall find it behind."""

    nic: Nic
    iface: str
    tap: str | None = None


def target(nic: Nic) -> Target:
    """Where a card (one with an interface) is announced; CannotDo where that is nowhere."""
    iface = nic.iface
    assert iface is not None
    _usable(iface)
    if not os.path.exists(_sys(iface, "tun_flags")):
        return Target(nic, iface)
    # A frame sent on the tap itself would go into the guest.
    bridge = _bridge_of(iface)
    _usable(bridge)
    return Target(nic, bridge, iface)


def _sys(iface: str, name: str) -> str:
    return f"{SYS}/class/net/{iface}/{name}"


def _number(iface: str, name: str) -> int:
    with open(_sys(iface, name)) as file:
        return int(file.read(), 0)


def _usable(iface: str) -> None:
    """CannotDo unless it exists, is Ethernet, and up."""
    try:
        index = socket.if_nametoindex(iface)
    except OSError as error:
        raise CannotDo(f"interface {iface} does not exist") from error
    try:
        seen, kind, flags = (_number(iface, name) for name in ("ifindex", "type", "flags"))
    except FileNotFoundError:
        seen = 0
    if seen != index:
        raise CannotDo(
            f"{SYS} does not show interface {iface}: it belongs to another network namespace",
            "enter a namespace with ip netns exec, which changes both",
        )
    if kind != ETHERNET:
        raise CannotDo(f"interface {iface} is no Ethernet: expected type {ETHERNET}, found {kind}")
    if not flags & IFF_UP:
        raise CannotDo(f"interface {iface} is down", f"ip link set {iface} up")


def _bridge_of(tap: str) -> str:
    hint = "name the bridge or the uplink by hand: vm-announce MAC IFACE [IP...]"
    try:
        master = os.path.basename(os.readlink(_sys(tap, "master")))
    except OSError as error:
        raise CannotDo(f"tap {tap} is in no bridge, and a frame sent on it would go into the guest", hint) from error
    if not os.path.isdir(_sys(master, "bridge")):
        raise CannotDo(f"tap {tap} is in {master}, which is no bridge of Linux", hint)
    return master


def steer(place: Target) -> str | None:
    """Move the bridge's forwarding entry of the card to its tap; the reason why that was not possible, or None.

    Without it the bridge goes on sending to the port where the card was before, until the guest sends a frame.
    """
    if place.tap is None:
        return None
    tool = shutil.which("bridge", path=f"{os.environ.get('PATH', '')}:{TOOLS}")
    if not tool:
        return "no command 'bridge' (package iproute2)"
    command = [tool, "fdb", "replace", place.nic.mac, "dev", place.tap, "master", "dynamic"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (done.stderr.strip() or f"bridge ended with status {done.returncode}") if done.returncode else None


def packet_socket() -> socket.socket:
    """For sending alone; CannotDo without CAP_NET_RAW."""
    try:
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    except PermissionError as error:
        raise CannotDo(
            "sending frames needs the capability CAP_NET_RAW",
            "run it as root, or keep the one capability:"
            " setpriv --reuid USER --clear-groups --inh-caps +net_raw --ambient-caps +net_raw vm-announce",
        ) from error


@dataclass(frozen=True)
class Failure:
    """A card that a round (counted from 1) could not announce."""

    round: int
    target: Target
    reason: str


def announce(sender: socket.socket, targets: Sequence[Target], moments: Sequence[int]) -> Iterator[Failure]:
    """Send every card's frames at each of the moments (ms from now); one card's failure keeps no other back."""
    prepared = [(place, frames(place.nic)) for place in targets]
    start = time.monotonic()
    for number, moment in enumerate(moments, 1):
        time.sleep(max(0.0, start + moment / 1000 - time.monotonic()))
        for place, parts in prepared:
            try:
                for frame in parts:
                    sender.sendto(frame, (place.iface, int.from_bytes(frame[12:14], "big")))
            except OSError as error:
                yield Failure(number, place, error.strerror or str(error))
