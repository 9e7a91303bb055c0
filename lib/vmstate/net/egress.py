"""On which interface a card's frames are sent, such that they go to the network and not into the guest."""

import os
import socket
import time
from typing import NamedTuple

from ..errors import CannotDo
from . import bridge_fdb
from .frames import ETHERNET, ethertype, packed
from .nic import SYS, Nic

IFF_UP = 1
# How long what was seen of an interface counts, in seconds: thousands of lines may name the same bridge.
FRESH = 1.0


class Egress(NamedTuple):
    """A card, the interface its frames are sent on, and the tap that this bridge shall find it behind.

    switched: it is a bridge of Open vSwitch, which is given the frames as from the tap.
    """

    nic: Nic
    iface: str
    tap: str | None = None
    switched: bool = False

    @property
    def own(self) -> str:
        """The interface on which the card's own traffic is seen."""
        return self.tap or self.iface


def egress_of(nic: Nic, given: str | None = None) -> Egress:
    """Where a card (one with an interface) is announced, on `given` if that is not None; CannotDo if nowhere."""
    iface = nic.iface
    assert iface is not None
    if given is not None:
        _usable(given)
        return Egress(nic, given, iface if _is_tap(iface) and _master(iface) else None)
    return Egress(nic, *_place(iface))


class EgressFinder:
    """`egress_of` for many cards: what is seen of an interface counts for a second."""

    def __init__(self, given: str | None = None) -> None:
        self._given = given
        self._seen: dict[str | None, tuple[float, Egress | CannotDo]] = {}

    def of(self, nic: Nic) -> Egress:
        now = time.monotonic()
        when, found = self._seen.get(nic.iface, (-FRESH, None))
        if found is None or now - when > FRESH:
            try:
                found = egress_of(nic, self._given)
            except CannotDo as error:
                found = error
            self._seen[nic.iface] = (now, found)
        if isinstance(found, CannotDo):
            raise found
        return found._replace(nic=nic)


def _place(iface: str) -> tuple[str, str | None, bool]:
    """The interface to send on, the tap, and whether that is a port of Open vSwitch, for what a card is tied to."""
    if (lower := lower_of(iface)) and not _is_up(iface):
        # One that is up takes them there itself, and to the other macvtaps on it as well.
        _usable(lower)
        return lower, None, False
    _usable(iface)
    if not _is_tap(iface):
        return iface, None, False
    # A frame sent on the tap itself would go into the guest.
    bridge = _bridge_of(iface)
    if bridge is not None:
        _usable(bridge)
        return bridge, iface, False
    switch = _switch_of(iface)
    # The internal port of such a switch can be a tap, too; the switch reads what is sent on it.
    return (switch, iface, True) if switch != iface else (iface, None, False)


def path_of(iface: str, name: str) -> str:
    return f"{SYS}/class/net/{iface}/{name}"


def number(iface: str, name: str) -> int:
    """A number that sysfs has for an interface; OSError or ValueError where it has none."""
    with open(path_of(iface, name)) as file:
        return int(file.read(), 0)


def lower_of(iface: str) -> str | None:
    """The device on which a macvtap lies; None for anything else."""
    if not os.path.isdir(path_of(iface, "macvtap")):
        return None
    below = [name.removeprefix("lower_") for name in os.listdir(path_of(iface, "")) if name.startswith("lower_")]
    return below[0] if below else None


def _is_tap(iface: str) -> bool:
    return os.path.exists(path_of(iface, "tun_flags"))


def _is_up(iface: str) -> bool:
    try:
        return bool(number(iface, "flags") & IFF_UP)
    except (OSError, ValueError):
        return False


def _master(iface: str) -> str | None:
    try:
        return os.path.basename(os.readlink(path_of(iface, "master")))
    except OSError:
        return None


def _usable(iface: str) -> None:
    """CannotDo unless it exists, is Ethernet, and up."""
    try:
        index = socket.if_nametoindex(iface)
    except OSError as error:
        raise CannotDo(f"interface {iface} does not exist") from error
    try:
        seen, kind, flags = (number(iface, name) for name in ("ifindex", "type", "flags"))
    except FileNotFoundError:
        seen = 0
    if seen != index:
        raise CannotDo(
            f"{SYS} does not show interface {iface}: it belongs to another network namespace",
            "name the namespace: vm-announce --netns NAME; or enter it with ip netns exec, which changes both",
        )
    if kind != ETHERNET:
        raise CannotDo(f"interface {iface} is no Ethernet: expected type {ETHERNET}, found {kind}")
    if not flags & IFF_UP:
        raise CannotDo(f"interface {iface} is down", f"ip link set {iface} up")


def _bridge_of(tap: str) -> str | None:
    """A bridge of Linux."""
    master = _master(tap)
    return master if master and os.path.isdir(path_of(master, "bridge")) else None


def _switch_of(tap: str) -> str:
    """A bridge of Open vSwitch; CannotDo where there is none."""
    from . import openvswitch

    if switch := openvswitch.bridge_of(tap):
        return switch
    hint = "name the bridge or the uplink by hand: vm-announce MAC IFACE [IP...]"
    master = _master(tap)
    if master is None:
        raise CannotDo(f"tap {tap} is in no bridge, and a frame sent on it would go into the guest", hint)
    raise CannotDo(f"tap {tap} is in {master}, which is no bridge of Linux", hint)


def send(sender: socket.socket, place: Egress, frame: bytes) -> None:
    """One frame of a card to the network; OSError."""
    if place.switched and place.tap:
        from . import openvswitch

        openvswitch.send(place.iface, place.tap, frame)
    else:
        sender.sendto(frame, (place.iface, ethertype(frame)))


def steer(place: Egress) -> str | None:
    """Move the bridge's forwarding entry of the card to its tap; the reason why that was not possible, or None.

    Without it the bridge goes on sending to the port where the card was before, until the guest sends a frame.
    """
    if place.tap is None or place.switched or _master(place.tap) is None:
        return None
    try:
        bridge_fdb.move_entry(packed(place.nic.mac), socket.if_nametoindex(place.tap))
    except OSError as error:
        return error.strerror or str(error)
    return None


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
