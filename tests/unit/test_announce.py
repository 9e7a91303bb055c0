"""Frames byte for byte, their moments, and where they go."""

import ipaddress
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate import announce
from vmstate.errors import CannotDo
from vmstate.nics import Nic

MAC = "52:54:00:12:34:56"
PADDING = "00" * 18
# Written down field by field from the RFCs; the checksum of the last was confirmed by tcpdump ("icmp6 sum ok").
RARP = "ffffffffffff 525400123456 8035  0001 0800 06 04 0003  525400123456 00000000 525400123456 00000000" + PADDING
REQUEST = "ffffffffffff 525400123456 0806  0001 0800 06 04 0001  525400123456 c0000207 000000000000 c0000207" + PADDING
REPLY = "ffffffffffff 525400123456 0806  0001 0800 06 04 0002  525400123456 c0000207 525400123456 c0000207" + PADDING
ADVERTISEMENT = (
    "333300000001 525400123456 86dd  60000000 0020 3a ff"
    " 20010db8000000000000000000000007 ff020000000000000000000000000001"
    " 88 00 7463 20000000 20010db8000000000000000000000007 02 01 525400123456"
)


def test_rarp_is_qemus():
    assert announce.frames(Nic(MAC, "br0")) == [bytes.fromhex(RARP)]


def test_arp_in_both_forms():
    found = announce.frames(Nic(MAC, "br0", ("192.0.2.7",)))
    assert found == [bytes.fromhex(text) for text in (RARP, REQUEST, REPLY)]
    assert {len(frame) for frame in found} == {60}


def test_advertisement():
    found = announce.frames(Nic(MAC, "br0", ("2001:db8::7",)))
    assert found == [bytes.fromhex(RARP), bytes.fromhex(ADVERTISEMENT)]


def test_several_addresses_keep_their_order():
    found = announce.frames(Nic(MAC, "br0", ("2001:db8::7", "192.0.2.7")))
    assert found == [bytes.fromhex(text) for text in (RARP, ADVERTISEMENT, REQUEST, REPLY)]


@given(st.binary(min_size=6, max_size=6), st.ip_addresses(v=6))
def test_checksum_is_right_for_every_address(mac, address):
    frame = announce.advertisement(mac, address.packed)
    ip, message = frame[14:54], frame[54:]
    summed = ip[8:40] + (32).to_bytes(4, "big") + (58).to_bytes(4, "big") + message
    # A sum in ones' complement is the number itself modulo 65535; a right checksum makes it nought.
    assert int.from_bytes(summed, "big") % 0xFFFF == 0
    assert len(frame) == 86
    assert frame[6:12] == mac == frame[-6:]
    assert ip[7] == 255


@given(st.binary(min_size=6, max_size=6), st.ip_addresses(v=4))
def test_arp_names_the_address_twice(mac, address):
    for frame in (announce.arp_request(mac, address.packed), announce.arp_reply(mac, address.packed)):
        assert ipaddress.ip_address(frame[28:32]) == ipaddress.ip_address(frame[38:42]) == address


def test_schedule_is_qemus():
    assert announce.schedule() == [0, 50, 200, 450, 800]


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ((50, 550, 1, 100), [0]),
        ((50, 550, 9, 100), [0, 50, 200, 450, 800, 1250, 1800, 2350, 2900]),
        ((10, 100, 4, 0), [0, 10, 20, 30]),
        ((500, 100, 3, 10), [0, 100, 200]),
        ((0, 0, 3, 5), [0, 0, 0]),
    ],
)
def test_schedule_never_waits_longer_than_max(given_, expected):
    assert announce.schedule(*given_) == expected


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 50), st.integers(0, 500))
def test_schedule_waits_grow_up_to_max(initial, maximum, rounds, step):
    moments = announce.schedule(initial, maximum, rounds, step)
    waits = [later - sooner for sooner, later in zip(moments, moments[1:], strict=False)]
    assert len(moments) == rounds
    assert waits == sorted(waits)
    assert all(wait <= maximum for wait in waits)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A made-up sysfs: a function that adds an interface to it."""
    numbers = {}

    def index(name):
        if name not in numbers:
            raise OSError("no interface with this name")
        return numbers[name]

    def add(name, *, kind=1, flags=0x1003, tap=False, bridge=False, master=None):
        place = tmp_path / "class/net" / name
        place.mkdir(parents=True)
        numbers[name] = len(numbers) + 1
        for file, value in (("ifindex", str(numbers[name])), ("type", str(kind)), ("flags", hex(flags))):
            (place / file).write_text(value + "\n")
        if tap:
            (place / "tun_flags").write_text("0x1002\n")
        if bridge:
            (place / "bridge").mkdir()
        if master:
            os.symlink(f"../{master}", place / "master")
        return place

    monkeypatch.setattr(announce, "SYS", str(tmp_path))
    monkeypatch.setattr(announce.socket, "if_nametoindex", index)
    return add


def where(iface):
    found = announce.target(Nic(MAC, iface))
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


class Sender:
    """Stands for the packet socket; 'bad' interfaces refuse."""

    def __init__(self):
        self.sent = []

    def sendto(self, frame, place):
        if place[0] == "bad":
            raise OSError(100, "Network is down")
        self.sent.append((place, frame))


def test_one_that_fails_keeps_no_other_back():
    good, bad = announce.Target(Nic(MAC, "good"), "good"), announce.Target(Nic(MAC, "bad"), "bad")
    sender = Sender()
    failures = list(announce.announce(sender, [bad, good], [0, 1]))
    assert failures == [announce.Failure(number, bad, "Network is down") for number in (1, 2)]
    assert sender.sent == [(("good", 0x8035), bytes.fromhex(RARP))] * 2


def test_moments_do_not_drift(monkeypatch):
    """A round that takes long shortens the wait behind it."""
    now, waits = [1000.0], []

    def sleep(seconds):
        waits.append(round(seconds, 6))
        now[0] += seconds

    class Slow(Sender):
        def sendto(self, frame, place):
            now[0] += 0.020

    monkeypatch.setattr(announce.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(announce.time, "sleep", sleep)
    assert not list(announce.announce(Slow(), [announce.Target(Nic(MAC, "x"), "x")], [0, 50, 60, 200]))
    assert waits == [0, 0.030, 0, 0.110]
