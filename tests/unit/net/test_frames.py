"""Frames byte for byte."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.net import frames

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


def sent(*addresses, tags=()):
    return [frame.data for frame in frames.of_card(MAC, addresses, tags)]


def test_rarp_is_qemus():
    assert sent() == [bytes.fromhex(RARP)]


def test_arp_in_both_forms():
    found = sent("192.0.2.7")
    assert found == [bytes.fromhex(text) for text in (RARP, REQUEST, REPLY)]
    assert {len(frame) for frame in found} == {60}


def test_advertisement():
    found = sent("2001:db8::7")
    assert found == [bytes.fromhex(RARP), bytes.fromhex(ADVERTISEMENT)]


def test_several_addresses_keep_their_order():
    found = sent("2001:db8::7", "192.0.2.7")
    assert found == [bytes.fromhex(text) for text in (RARP, ADVERTISEMENT, REQUEST, REPLY)]


@given(st.binary(min_size=6, max_size=6), st.ip_addresses(v=6))
def test_checksum_is_right_for_every_address(mac, address):
    frame = frames.advertisement(mac, address.packed)
    ip, message = frame[14:54], frame[54:]
    summed = ip[8:40] + (32).to_bytes(4, "big") + (58).to_bytes(4, "big") + message
    # A sum in ones' complement is the number itself modulo 65535; a right checksum makes it nought.
    assert int.from_bytes(summed, "big") % 0xFFFF == 0
    assert len(frame) == 86
    assert frame[6:12] == mac == frame[-6:]
    assert ip[7] == 255


@given(st.binary(min_size=6, max_size=6), st.ip_addresses(v=4))
def test_arp_names_the_address_twice(mac, address):
    for frame in (frames.arp_request(mac, address.packed), frames.arp_reply(mac, address.packed)):
        assert ipaddress.ip_address(frame[28:32]) == ipaddress.ip_address(frame[38:42]) == address


def test_each_says_what_it_is():
    found = frames.of_card(MAC, ("192.0.2.7", "2001:db8::7"), (10,))
    told = [(frame.kind, frame.address, frame.tags) for frame in found]
    assert told == [
        ("rarp", None, (10,)),
        ("arp-request", "192.0.2.7", (10,)),
        ("arp-reply", "192.0.2.7", (10,)),
        ("advertisement", "2001:db8::7", (10,)),
    ]
    assert frames.of_addresses(MAC, ("192.0.2.7", "2001:db8::7"), (10,)) == found[1:]


@pytest.mark.parametrize(
    ("tags", "between"),
    [((), ""), ((10,), "8100 000a"), ((100, 10), "88a8 0064 8100 000a"), ((4094, 1), "88a8 0ffe 8100 0001")],
)
def test_tags(tags, between):
    """A customer's tag is the inner one; what is without its tags has its full length still."""
    for frame, plain in zip(sent("192.0.2.7", "2001:db8::7", tags=tags), sent("192.0.2.7", "2001:db8::7"), strict=True):
        assert frame == plain[:12] + bytes.fromhex(between) + plain[12:]
        assert frames.ethertype(frame) == int(between[:4] or f"{frames.ethertype(plain):x}", 16)
