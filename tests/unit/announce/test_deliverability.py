"""What speaks against an announcement, from a made-up sysfs: what no test can have of a real one."""

import os

import pytest
from vmstate.announce import deliverability
from vmstate.net import egress, neighbours
from vmstate.net.egress import Egress
from vmstate.net.nic import Nic

MAC = "52:54:00:12:34:56"
TAP = Egress(Nic(MAC, "tap0"), "br0", "tap0")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that gives an interface its files; br0 has tap0 and up0, all of which forward."""

    def give(iface, **files):
        for name, value in files.items():
            path = tmp_path / "class/net" / iface / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value + "\n")

    give("br0", carrier="1", bridge__vlan_filtering="0", bridge__nf_call_arptables="0", brif__tap0="", brif__up0="")
    for port in ("tap0", "up0"):
        give(port, carrier="1", brport__state="3")
    monkeypatch.setattr(egress, "SYS", str(tmp_path))
    monkeypatch.setattr(deliverability, "PROC_SYS", str(tmp_path / "sys"))
    monkeypatch.setattr(neighbours, "links", list)
    monkeypatch.setattr(neighbours, "learned", dict)
    give.folder = tmp_path
    return give


def doubts(place=TAP):
    return [one.text for one in deliverability.doubts(place) if one.bad]


def test_nothing_speaks_against_it(system):
    assert doubts() == []


@pytest.mark.parametrize(
    ("iface", "files", "words"),
    [
        ("br0", {"carrier": "0"}, "br0 has no carrier"),
        ("br0", {"bridge__vlan_filtering": "1"}, "bridge br0 filters VLANs"),
        ("br0", {"bridge__nf_call_arptables": "1"}, "bridge br0 has arptables look at ARP"),
        ("tap0", {"brport__state": "2"}, "port tap0 is learning: no frame goes to the guest yet"),
        ("tap0", {"brport__state": "0"}, "port tap0 is disabled"),
        ("up0", {"brport__state": "4"}, "port up0 is blocked: nothing leaves by it"),
        ("up0", {"phy80211__name": "phy0"}, "up0 is a wireless card"),
    ],
)
def test_one_doubt(system, iface, files, words):
    system(iface, **files)
    (text,) = doubts()
    assert text.startswith(words)


def test_a_card_of_a_cloud(system):
    os.makedirs(system.folder / "drivers/ena")
    os.makedirs(system.folder / "class/net/up0/device")
    os.symlink(system.folder / "drivers/ena", system.folder / "class/net/up0/device/driver")
    (found,) = [one for one in deliverability.doubts(TAP) if one.bad]
    assert "(ena)" in found.text
    assert "port security" in found.hint


@pytest.mark.parametrize(
    ("flags", "words"),
    [({"locked": True}, "port tap0 is locked"), ({"learning": False}, "port tap0 learns nothing")],
)
def test_a_port_that_takes_not_everybody(system, monkeypatch, flags, words):
    link = {"ifname": "tap0", "linkinfo": {"info_slave_kind": "bridge", "info_slave_data": flags}}
    monkeypatch.setattr(neighbours, "links", lambda: [link])
    (text,) = doubts()
    assert text.startswith(words)


@pytest.mark.parametrize(("mode", "bad"), [("private", True), ("vepa", False), ("bridge", False)])
def test_the_mode_of_a_macvtap(system, monkeypatch, mode, bad):
    system("mv0", carrier="1", macvtap__tap3="", lower_up0="")
    monkeypatch.setattr(neighbours, "links", lambda: [{"ifname": "mv0", "linkinfo": {"info_data": {"mode": mode}}}])
    found = deliverability.doubts(Egress(Nic(MAC, "mv0"), "mv0"))
    assert any(one.bad for one in found) == bad
    assert any(f"mv0 is in mode {mode}" in one.text for one in found) == (mode != "bridge")


def test_what_a_peer_like_this_host_does(system):
    for name, value in (("arp_accept", "1"), ("arp_notify", "1")):
        path = system.folder / "sys/ipv4/conf/all" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    text = "\n".join(one.text for one in deliverability.doubts(TAP))
    assert "takes the IPv4 address, known or not" in text
    assert "the kernel announces this host's own addresses" in text
    path = system.folder / "sys/ipv6/conf/br0/drop_unsolicited_na"
    path.parent.mkdir(parents=True)
    path.write_text("1")
    assert "drops unsolicited advertisements on br0" in doubts()[0]
