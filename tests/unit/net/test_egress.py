"""Where frames go, and the request that moves a bridge's entry."""

import os
import socket

import pytest
from vmstate.errors import CannotDo
from vmstate.net import bridge_fdb, egress, openvswitch
from vmstate.net.nic import Nic

MAC = "52:54:00:12:34:56"


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A made-up sysfs: a function that adds an interface to it."""
    numbers = {}

    def index(name):
        if name not in numbers:
            raise OSError("no interface with this name")
        return numbers[name]

    def add(name, *, kind=1, flags=0x1003, tap=False, bridge=False, master=None, lower=None):
        place = tmp_path / "class/net" / name
        place.mkdir(parents=True)
        numbers[name] = len(numbers) + 1
        for file, value in (("ifindex", str(numbers[name])), ("type", str(kind)), ("flags", hex(flags))):
            (place / file).write_text(value + "\n")
        if tap:
            (place / "tun_flags").write_text("0x1002\n")
        if bridge:
            (place / "bridge").mkdir()
        if lower:
            (place / "macvtap").mkdir()
            os.symlink(f"../{lower}", place / f"lower_{lower}")
        if master:
            os.symlink(f"../{master}", place / "master")
        return place

    monkeypatch.setattr(egress, "SYS", str(tmp_path))
    # No Open vSwitch either.
    monkeypatch.setattr(openvswitch, "TOOLS", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(egress.socket, "if_nametoindex", index)
    return add


def where(iface):
    found = egress.egress_of(Nic(MAC, iface))
    return found.iface, found.tap


def test_a_tap_is_announced_on_its_bridge(system):
    system("br0", bridge=True)
    system("tap0", tap=True, master="br0")
    assert where("tap0") == ("br0", "tap0")


def test_everything_else_is_announced_on_itself(system):
    system("br0", bridge=True)
    system("eth0", master="br0")
    system("macvtap0")
    for name in ("br0", "eth0", "macvtap0"):
        assert where(name) == (name, None)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"tap": True}, "x0 is in no bridge"),
        ({"tap": True, "master": "ovs-system"}, "in ovs-system, which is no bridge of Linux"),
        ({"tap": True, "master": "br1"}, "br1 is down"),
        ({"flags": 0x1002}, "x0 is down"),
        ({"tap": True, "flags": 0x1002, "master": "br0"}, "x0 is down"),
        ({"kind": 65534, "tap": True}, "no Ethernet: expected type 1, found 65534"),
    ],
)
def test_nowhere_to_announce(system, made, words):
    system("br0", bridge=True)
    system("br1", bridge=True, flags=0x1002)
    system("ovs-system")
    system("x0", **made)
    with pytest.raises(CannotDo, match=words):
        where("x0")


def test_no_such_interface(system):
    with pytest.raises(CannotDo, match="x0 does not exist"):
        where("x0")


def test_sysfs_of_another_namespace(system):
    (system("x0") / "ifindex").write_text("99\n")
    with pytest.raises(CannotDo, match="another network namespace"):
        where("x0")


def test_a_macvtap_leads_to_its_lower_device(system):
    system("up0")
    system("mv0", lower="up0")
    system("mv1", lower="up0", flags=0x1002)
    system("up1", flags=0x1002)
    system("mv2", lower="up1", flags=0x1002)
    assert where("mv0") == ("mv0", None)
    assert where("mv1") == ("up0", None)
    assert egress.lower_of("mv0") == "up0"
    assert egress.lower_of("up0") is None
    with pytest.raises(CannotDo, match="up1 is down"):
        where("mv2")


def test_a_given_interface(system):
    system("br0", bridge=True)
    system("tap0", tap=True, master="br0")
    system("tap1", tap=True)
    system("up0")
    found = [egress.egress_of(Nic(MAC, name), "up0") for name in ("tap0", "tap1", "br0")]
    assert [(place.iface, place.tap) for place in found] == [("up0", "tap0"), ("up0", None), ("up0", None)]
    with pytest.raises(CannotDo, match="up9 does not exist"):
        egress.egress_of(Nic(MAC, "tap0"), "up9")


def test_what_was_seen_of_an_interface_counts_for_a_while(system, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(egress.time, "monotonic", lambda: now[0])
    seen = egress.EgressFinder()
    with pytest.raises(CannotDo):
        seen.of(Nic(MAC, "x0"))
    system("x0")
    with pytest.raises(CannotDo):
        seen.of(Nic(MAC, "x0"))
    now[0] += 2
    for mac in (MAC, "52:54:00:12:34:57"):
        assert seen.of(Nic(mac, "x0")) == egress.Egress(Nic(mac, "x0"), "x0")


def test_the_request_to_move_an_entry():
    """As strace shows it of `bridge fdb replace … dev … master dynamic`."""
    words = bytes.fromhex(
        "28000000 1c00 0505 01000000 00000000 07000000 07000000 0200 04 00 0a00 0200 525400123456 0000"
    )
    assert bridge_fdb.entry(bytes.fromhex("525400123456"), 7) == words


def test_a_kernel_that_refuses():
    with pytest.raises(OSError, match="."):
        bridge_fdb.move_entry(bytes.fromhex("525400123456"), socket.if_nametoindex("lo"))
