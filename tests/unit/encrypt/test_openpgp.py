"""Outer packets of messages made by hand: every form that a packet has."""

import pytest
from vmstate.encrypt.openpgp import Message, Receiver, look, look_ahead
from vmstate.errors import Damaged


class Bytes:
    """A `Reader` that gives a few bytes at a time."""

    def __init__(self, data: bytes, size: int = 7) -> None:
        self._data = data
        self._size = size

    def readinto(self, view: memoryview, /) -> int:
        count = min(len(view), len(self._data), self._size)
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


def new(tag: int, body: bytes) -> bytes:
    return bytes([0xC0 | tag]) + length(len(body)) + body


def length(count: int) -> bytes:
    if count < 192:
        return bytes([count])
    if count < 8384:
        return (count - 192 + (192 << 8)).to_bytes(2, "big")
    return b"\xff" + count.to_bytes(4, "big")


def old(tag: int, body: bytes, kind: int) -> bytes:
    size = b"" if kind == 3 else len(body).to_bytes(1 << kind, "big")
    return bytes([0x80 | tag << 2 | kind]) + size + body


def pieces(tag: int, body: bytes) -> bytes:
    """512 bytes, a KiB, and the rest."""
    rest = body[1536:]
    return bytes([0xC0 | tag, 0xE9]) + body[:512] + b"\xea" + body[512:1536] + length(len(rest)) + rest


KEY = b"\3" + bytes.fromhex("0123456789ABCDEF") + b"\x01" + bytes(50)
HIDDEN = b"\3" + bytes(8) + b"\x12" + bytes(50)
SIX = b"\6" + b"\x21\6" + bytes(range(1, 33)) + b"\x19" + bytes(50)
PASSPHRASE = b"\4\x09\3\x08saltsalt\x60"
MDC = b"\1" + bytes(3000)
AEAD = b"\1\x09\2\x10" + bytes(3000)
SIX_DATA = b"\2\x09\3\6" + bytes(3000)


def looked(data: bytes) -> Message:
    found = look(Bytes(data))
    assert vars(found) == vars(look(Bytes(data, 1 << 20)))
    assert found.size == len(data)
    ahead, read, size = look_ahead(Bytes(data))
    assert (ahead.integrity, ahead.cipher, ahead.receivers) == (found.integrity, found.cipher, found.receivers)
    assert data.startswith(read)
    assert size == (len(data) if found.pieces == 1 and data[-3001:-3000] != b"\xa7" else None)
    return found


@pytest.mark.parametrize("body", [bytes(4), bytes(191), bytes(192), bytes(8383), bytes(8384), bytes(100_000)])
def test_lengths_of_a_packet(body: bytes) -> None:
    body = b"\1" + body[1:]
    for data in (new(18, body), old(9, body, 2)):
        assert looked(new(1, KEY) + data).encrypted == len(body)


def test_pieces_of_a_packet() -> None:
    found = looked(new(1, KEY) + pieces(18, MDC))
    assert (found.pieces, found.encrypted) == (3, len(MDC))


def test_whom_it_is_for() -> None:
    found = looked(new(10, b"PGP") + new(1, KEY) + old(1, HIDDEN, 1) + new(1, SIX) + new(3, PASSPHRASE) + new(18, MDC))
    assert found.receivers == [
        Receiver("0123456789ABCDEF", "RSA"),
        Receiver("hidden", "ECDH"),
        Receiver(bytes(range(1, 33)).hex().upper(), "X25519"),
        Receiver(None, "AES256"),
    ]
    assert found.cipher is None
    assert [line.split()[0] for line in found.lines()][:4] == ["key", "key", "key", "passphrase"]


@pytest.mark.parametrize(
    ("data", "packet", "cipher", "integrity", "mode"),
    [
        (new(18, MDC), "SEIPD version 1", "AES256", "MDC", None),
        (new(20, AEAD), "AEAD packet", "AES256", "AEAD", "OCB"),
        (new(18, SIX_DATA), "SEIPD version 2", "AES256", "AEAD", "GCM"),
        (new(9, MDC), "SED, an old unprotected message", "AES256", "none", None),
        (old(9, MDC, 3), "SED, an old unprotected message", "AES256", "none", None),
    ],
)
def test_protection(data: bytes, packet: str, cipher: str, integrity: str, mode: str | None) -> None:
    found = look(Bytes(new(3, PASSPHRASE) + data))
    assert (found.packet, found.cipher, found.integrity, found.mode) == (packet, cipher, integrity, mode)
    assert look_ahead(Bytes(new(3, PASSPHRASE) + data))[0].integrity == integrity
    assert found.values()["signed"] is None
    # With a key beside it, only AEAD tells the cipher.
    both = look(Bytes(new(3, PASSPHRASE) + new(1, KEY) + data))
    assert both.cipher == (cipher if integrity == "AEAD" else None)


def test_cut_anywhere() -> None:
    whole = new(1, KEY) + new(3, PASSPHRASE) + pieces(18, MDC)
    for end in range(1, len(whole)):
        with pytest.raises(Damaged, match=r"the message is cut at offset|no OpenPGP message"):
            look(Bytes(whole[:end], 500))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the input is empty"),
        (b"-----BEGIN PGP MESSAGE-----", "armoured text"),
        (b"QEVM", "no OpenPGP message: found b'QEVM' at offset 0"),
        (b"\xfd7zXZ\0" + bytes(100), "a packet of type 61"),
        (new(4, bytes(20)), "the message is not encrypted: found signed data at offset 0"),
        (new(1, KEY) + new(11, bytes(20)), "not encrypted: found plain data at offset 62"),
        (new(1, KEY) + new(18, MDC) + b"x", f"something is behind the message, at offset {65 + len(MDC)}"),
        (new(1, KEY) + b"\0junk", "no OpenPGP packet at offset 62: found 0x0"),
        (new(1, b"\3" + bytes(5)) + new(18, MDC), "the packet at offset 0 is too short"),
        (new(18, b"\7" + bytes(100)), "encrypted data of an unknown version 7"),
        (b"\xc1\xe1" + bytes(100), "an impossible length"),
        (b"\xc1\xff\xff\xff\xff\xff" + bytes(100), "an impossible length"),
        (b"\x87" + bytes(100), "an impossible length"),
    ],
)
def test_what_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(Damaged) as error:
        look(Bytes(data))
    assert words in str(error.value)
