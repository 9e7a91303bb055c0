"""What an OpenPGP message says of itself without a key: its outer packets (RFC 4880, RFC 9580, LibrePGP).

Nothing is decrypted, and nothing that is found here is proven: who can change the message can change this, too.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from ..errors import Damaged
from ..io.readers import Reader
from ..io.window import Window

PKESK, SKESK, SED, MARKER, SEIPD, AEAD = 1, 3, 9, 10, 18, 20
NOT_ENCRYPTED = {2: "signature", 4: "signed data", 5: "secret key", 6: "public key", 8: "packed data", 11: "plain data"}

# Longer ones exist for no algorithm, post-quantum ones included.
LONGEST_KEY_PACKET = 64 << 10
PIECE = 64 << 10

# The length of a piece of a packet, None where it goes up to the end of the input; whether another one follows.
Piece = tuple[int | None, bool]

CIPHERS = {
    1: "IDEA",
    2: "3DES",
    3: "CAST5",
    4: "Blowfish",
    7: "AES128",
    8: "AES192",
    9: "AES256",
    10: "Twofish",
    11: "Camellia128",
    12: "Camellia192",
    13: "Camellia256",
}
MODES = {1: "EAX", 2: "OCB", 3: "GCM"}
ALGORITHMS = {1: "RSA", 2: "RSA", 8: "Kyber", 16: "ElGamal", 18: "ECDH", 25: "X25519", 26: "X448"}


class Receiver(NamedTuple):
    """key: the id or fingerprint of a key, 'hidden' where the message does not tell; None: a passphrase."""

    key: str | None
    algorithm: str


class Message:
    """cipher: None where it is not visible.  integrity: 'MDC', 'AEAD' or 'none'.  encrypted: bytes of data in it."""

    def __init__(self) -> None:
        self.receivers: list[Receiver] = []
        self.packet = ""
        self.cipher: str | None = None
        self.integrity = "none"
        self.mode: str | None = None
        self.size = self.encrypted = self.pieces = 0

    def values(self) -> dict[str, Any]:
        """For JSON; `signed` is what nobody knows before it is decrypted."""
        held = [{"id": one.key, "algorithm": one.algorithm} for one in self.receivers if one.key is not None]
        plain = {name: value for name, value in self.__dict__.items() if name != "receivers"}
        return {"keys": held, "passphrases": len(self.receivers) - len(held), **plain, "signed": None}

    def lines(self) -> Iterator[str]:
        for one in self.receivers:
            yield f"passphrase  {one.algorithm}" if one.key is None else f"key         {one.key}, {one.algorithm}"
        if not self.receivers:
            yield "key         none is named"
        yield f"cipher      {self.cipher or 'not visible'}"
        mode = f" with {self.mode}" if self.mode else ""
        yield f"integrity   {self.integrity}{mode} ({self.packet})"
        yield "signature   not visible"
        piece = "piece" if self.pieces == 1 else "pieces"
        yield f"size        {self.size:,} bytes, {self.encrypted:,} of them encrypted data in {self.pieces:,} {piece}"


def check_binary(first: bytes) -> None:
    """Armour has text around it that gpg ignores, so it could not be proven whole."""
    if not first:
        raise Damaged("the input is empty")
    if first[:4] == b"----":
        raise Damaged("the message is armoured text: expected a binary one", "pipe it through: gpg --dearmor")
    if not first[0] & 0x80:
        raise Damaged(f"no OpenPGP message: found {first[:4]!r} at offset 0")


def look(source: Reader, tell: Callable[[Window], object] | None = None) -> Message:
    """The whole message, to its end; Damaged where it is cut, is followed by something, or is none.

    tell: gets the window through which the input is read, for whoever wants to know how far it is.
    """
    window, message = Window(source), Message()
    if tell:
        tell(window)
    for length, _more in _up_to_data(window, message):
        message.pieces += 1
        message.encrypted += _skip(window, length)
    if window.need(1):
        raise Damaged(f"something is behind the message, at offset {window.offset}")
    message.size = window.offset
    return message


def look_ahead(source: Reader) -> tuple[Message, bytes, int | None]:
    """What a message says before its data, all bytes that were read for it, and its size where it says that."""
    recorder, message = _Recorder(source), Message()
    window = Window(recorder)
    length, more = next(_up_to_data(window, message))
    return message, bytes(recorder.data), None if more or length is None else window.offset + length


class _Recorder:
    """A `Reader` that keeps what was read."""

    def __init__(self, source: Reader) -> None:
        self._source = source
        self.data = bytearray()

    def readinto(self, view: memoryview, /) -> int:
        count = self._source.readinto(view[:PIECE])
        self.data += view[:count]
        return count


def _up_to_data(window: Window, message: Message) -> Iterator[Piece]:
    """The pieces of the encrypted data, once all that is before it was read."""
    window.need(4)
    check_binary(bytes(window.have()[:4]))
    while True:
        at = window.offset
        tag, pieces = _header(window)
        if tag in (PKESK, SKESK, MARKER):
            _key_packet(window, tag, pieces, message)
        elif tag in (SEIPD, AEAD, SED):
            first = next(pieces)
            _head_of_data(window, tag, message)
            yield first
            yield from pieces
            return
        elif tag in NOT_ENCRYPTED:
            raise Damaged(f"the message is not encrypted: found {NOT_ENCRYPTED[tag]} at offset {at}")
        else:
            raise Damaged(f"no OpenPGP message: found a packet of type {tag} at offset {at}")


def _cut(window: Window, what: str) -> NoReturn:
    raise Damaged(f"the message is cut at offset {window.came}, in {what}")


def _bytes(window: Window, count: int, what: str) -> bytes:
    view = window.need(count)
    if view is None:
        _cut(window, what)
    data = bytes(view)
    window.take(count)
    return data


def _header(window: Window) -> tuple[int, Iterator[Piece]]:
    """A packet's type, and the pieces of its body: each is read once the one before was taken."""
    at = window.offset
    (first,) = _bytes(window, 1, "the head of a packet")
    if not first & 0x80:
        raise Damaged(f"no OpenPGP packet at offset {at}: found {first:#04x}")
    if first & 0x40:
        return first & 0x3F, _new_lengths(window)
    return first >> 2 & 0xF, _old_length(window, first & 3)


def _old_length(window: Window, kind: int) -> Iterator[Piece]:
    length = None if kind == 3 else int.from_bytes(_bytes(window, 1 << kind, "the length of a packet"), "big")
    yield length, False


def _new_lengths(window: Window) -> Iterator[Piece]:
    more = True
    while more:
        (first,) = _bytes(window, 1, "the length of a packet")
        more = 224 <= first < 255
        if first < 192:
            yield first, more
        elif first < 224:
            yield (first - 192 << 8) + _bytes(window, 1, "the length of a packet")[0] + 192, more
        elif more:
            yield 1 << (first & 0x1F), more
        else:
            yield int.from_bytes(_bytes(window, 4, "the length of a packet"), "big"), more


def _key_packet(window: Window, tag: int, pieces: Iterator[Piece], message: Message) -> None:
    at = window.offset - 1
    length, more = next(pieces)
    if length is None or length > LONGEST_KEY_PACKET or more:
        raise Damaged(f"no OpenPGP message: the packet at offset {at} has an impossible length")
    body = _bytes(window, length, "a key packet")
    if tag == MARKER:
        return
    try:
        message.receivers.append(_key(body) if tag == PKESK else _passphrase(body))
    except IndexError:
        raise Damaged(f"the packet at offset {at} is too short") from None


def _key(body: bytes) -> Receiver:
    """Version 3 names the key by its id, version 6 by its fingerprint with a version before it."""
    if body[0] == 6:
        end = 2 + body[1]
        name, algorithm = body[3:end].hex().upper(), body[end]
    else:
        name, algorithm = body[1:9].hex().upper(), body[9]
    return Receiver(name if name.strip("0") else "hidden", ALGORITHMS.get(algorithm, f"algorithm {algorithm}"))


def _passphrase(body: bytes) -> Receiver:
    number = body[2] if body[0] == 6 else body[1]
    return Receiver(None, CIPHERS.get(number, f"cipher {number}"))


def _head_of_data(window: Window, tag: int, message: Message) -> None:
    """Looks at it, and takes nothing."""
    head = bytes(window.need(4) or _cut(window, "the encrypted data"))
    if tag == SED:
        message.packet = "SED, an old unprotected message"
        message.cipher = _cipher_of_passphrase(message)
    elif tag == SEIPD and head[0] == 1:
        message.packet, message.integrity = "SEIPD version 1", "MDC"
        message.cipher = _cipher_of_passphrase(message)
    elif (tag, head[0]) in ((SEIPD, 2), (AEAD, 1)):
        message.packet, message.integrity = ("SEIPD version 2" if tag == SEIPD else "AEAD packet"), "AEAD"
        message.cipher = CIPHERS.get(head[1], f"cipher {head[1]}")
        message.mode = MODES.get(head[2], f"mode {head[2]}")
    else:
        raise Damaged(f"encrypted data of an unknown version {head[0]} at offset {window.offset}")


def _skip(window: Window, length: int | None) -> int:
    """Past so many bytes, None: all that there are; how many it were."""
    done = 0
    while length is None or done < length:
        if not window.need(1):
            if length is None:
                break
            _cut(window, "the encrypted data")
        count = len(window.have()) if length is None else min(length - done, len(window.have()))
        window.take(count)
        done += count
    return done


def _cipher_of_passphrase(message: Message) -> str | None:
    """With a passphrase alone gpg says the cipher beside it; with a key it is a secret."""
    named = {one.algorithm for one in message.receivers if one.key is None}
    return named.pop() if len(named) == 1 and len(message.receivers) == 1 else None
