"""What a card's own traffic tells of it, from frames that scapy makes."""

import pytest
from scapy.all import ARP, IP, TCP, Ether, ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, IPv6
from vmstate.net import frames
from vmstate.net.sniffer import Seen, address_told, is_for

MAC, OTHER = "52:54:00:12:34:56", "52:54:00:12:34:57"


def arp(**values):
    return Ether(src=MAC) / ARP(**{"hwsrc": MAC, "psrc": "192.0.2.7", "pdst": "192.0.2.1", **values})


def discovery(message, source="2001:db8::7"):
    return Ether(src=MAC) / IPv6(src=source, dst="ff02::1", hlim=255) / message


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (arp(), "192.0.2.7"),
        (arp(op=2), "192.0.2.7"),
        # A probe asks whether an address is free.
        (arp(psrc="0.0.0.0"), None),
        # Somebody else's answer, which the card only carries.
        (arp(hwsrc=OTHER), None),
        (discovery(ICMPv6ND_NS(tgt="2001:db8::1")), "2001:db8::7"),
        (discovery(ICMPv6ND_NS(tgt="2001:db8::7"), source="::"), None),
        (discovery(ICMPv6ND_NA(tgt="2001:db8::9", R=0) / ICMPv6NDOptDstLLAddr(lladdr=MAC)), "2001:db8::9"),
        # Advertised by us it would no longer be a router.
        (discovery(ICMPv6ND_NA(tgt="2001:db8::9", R=1)), None),
        # Whoever routes carries packets of others.
        (Ether(src=MAC) / IP(src="192.0.2.9") / TCP(), None),
        (Ether(src=MAC) / IPv6(src="2001:db8::9") / TCP(), None),
    ],
)
def test_what_a_card_claims(packet, expected):
    assert address_told(bytes(packet)) == expected


def test_what_is_cut_or_nonsense():
    for packet in (arp(), discovery(ICMPv6ND_NS(tgt="2001:db8::1"))):
        for length in range(len(bytes(packet))):
            address_told(bytes(packet)[:length])


def test_our_own_frames_claim_what_they_announce():
    for frame in frames.of_addresses(MAC, ("192.0.2.7", "2001:db8::7")):
        assert address_told(frame.data) == frame.address


def test_for_whom_a_frame_is():
    mac = frames.packed(MAC)
    there = bytes(Ether(dst=MAC, src=OTHER))
    everybody = bytes(Ether(dst="ff:ff:ff:ff:ff:ff", src=MAC))
    assert is_for(mac, Seen(True, there, ()), tap=True)
    assert is_for(mac, Seen(False, there, ()), tap=False)
    assert not is_for(mac, Seen(False, there, ()), tap=True)
    assert not is_for(mac, Seen(True, everybody, ()), tap=True)
