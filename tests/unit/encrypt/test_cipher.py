"""Hundreds of damaged messages of a real state: nothing of any of them comes out, and each is called damaged."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vmstate.encrypt.cipher import Cipher, Receivers
from vmstate.encrypt.gpg import Means
from vmstate.encrypt.passphrase import Passphrase
from vmstate.errors import Damaged

from unit.streams import state

SEED = 20261125


def through(data: bytes, work: Callable[[int, int], None]) -> bytes:
    """What `work` makes of `data`, from one descriptor to another."""
    source, sink = os.memfd_create("source"), os.memfd_create("sink")
    try:
        os.write(source, data)
        os.lseek(source, 0, os.SEEK_SET)
        work(source, sink)
        return os.pread(sink, 1 << 30, 0)
    finally:
        os.close(source)
        os.close(sink)


@pytest.fixture(scope="module")
def messages(gnupg: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[bytes, Means]]]:
    """One for a key, a signed one, and one for a passphrase, which costs less."""
    path = tmp_path_factory.mktemp("pass") / "pass"
    path.write_text("secret\n")
    conf = gnupg / "gpg.conf"
    conf.write_text("s2k-count 65536\n")
    given = Means(passphrase=Passphrase.of_file(str(path)))
    plain = state("q35-7.2")

    def make(receivers: Receivers, means: Means) -> tuple[bytes, Means]:
        return through(plain, lambda source, sink: Cipher(source, sink, means).encrypt(receivers)), means

    me = ["me@example.org"]
    yield {
        "key": make(Receivers(me), Means()),
        "signed": make(Receivers(me, signer=me[0]), Means()),
        "passphrase": make(Receivers(passphrase=True), given),
        "other": make(Receivers(passphrase=True), given),
    }
    conf.unlink()


def opened(message: bytes, means: Means) -> tuple[str, bytes]:
    """Why it is damaged, and what has come out."""
    reasons = [""]

    def work(source: int, sink: int) -> None:
        try:
            Cipher(source, sink, means).decrypt()
        except Damaged as error:
            reasons.append(str(error))

    out = through(message, work)
    return reasons[-1], out


def refused(message: bytes, means: Means, what: str) -> str:
    """The reason; nothing has come out."""
    reason, out = opened(message, means)
    assert reason, f"{what}: taken"
    assert out == b"", f"{what}: {len(out)} bytes came out"
    return reason


def test_whole_ones_come_back(messages: dict[str, tuple[bytes, Means]]) -> None:
    for message, means in messages.values():
        back = through(message, lambda source, sink, means=means: Cipher(source, sink, means).decrypt())
        assert back == state("q35-7.2")


@pytest.mark.parametrize(("kind", "count"), [("key", 40), ("signed", 20), ("passphrase", 140)])
def test_flipped_bits(kind: str, count: int, messages: dict[str, tuple[bytes, Means]]) -> None:
    message, means = messages[kind]
    chance = random.Random(SEED)
    for _ in range(count):
        at, bit = chance.randrange(len(message)), chance.randrange(8)
        changed = bytearray(message)
        changed[at] ^= 1 << bit
        refused(bytes(changed), means, f"{kind}: bit {bit} of byte {at}")


@pytest.mark.parametrize(("kind", "count"), [("key", 40), ("signed", 20), ("passphrase", 140)])
def test_cuts(kind: str, count: int, messages: dict[str, tuple[bytes, Means]]) -> None:
    message, means = messages[kind]
    chance = random.Random(SEED + 1)
    for _ in range(count):
        end = chance.randrange(600, len(message))
        assert "is cut" in refused(message[:end], means, f"{kind}: {end} bytes of it")


def test_splices_of_two_messages(messages: dict[str, tuple[bytes, Means]]) -> None:
    (one, means), (other, _) = messages["passphrase"], messages["other"]
    chance = random.Random(SEED + 2)
    for _ in range(20):
        at = chance.randrange(1, len(one))
        refused(one[:at] + other[at:], means, f"spliced at {at}")
    refused(one + other, means, "one behind the other")


def test_every_byte_of_a_head(messages: dict[str, tuple[bytes, Means]]) -> None:
    """What was changed there makes it a message of another kind, or for somebody else; or nothing, and it is whole."""
    chance = random.Random(SEED + 3)
    taken = []
    for kind in ("key", "passphrase"):
        message, means = messages[kind]
        for at in range(24):
            changed = bytearray(message)
            changed[at] ^= 1 << chance.randrange(8)
            reason, out = opened(bytes(changed), means)
            assert out == (b"" if reason else state("q35-7.2"))
            taken += [] if reason else [(kind, at)]
    # The version of a key packet: 2 is another name for 3.  For a passphrase with OCB (version 5) gpg 2.4 does not look
    # at the mode, since it knows only one.
    harmless = {("key", 3)} | ({("passphrase", 4)} if messages["passphrase"][0][2] == 5 else set())
    assert set(taken) <= harmless


# A message as GnuPG 2.4 makes it, with OCB, for the passphrase "secret"; older ones read it, but say that it was not
# protected, and that a changed one is good.
OCB = bytes.fromhex(
    "c34d050902030873616c7473616c74606969696969696969696969696969691c264f52e44250a842df0a89bac61195701414789469814737"
    "319ab85f70b1ff1e8d61dbb241be38a4880c0b3b6b5913d44e010902006a6a6a6a6a6a6a6a6a6a6a6a6a6a6ae0a552bfa1a203158a181c8d"
    "110b418e291db1fe191b3aad5484158a08b133b4d5718560f04307d269c9c29bc19bd4a2cd65f52fe5331925a9ba52"
)


def test_ocb(messages: dict[str, tuple[bytes, Means]], tmp_path: Path) -> None:
    means = messages["passphrase"][1]
    assert opened(OCB, means) == ("", b"whole and authentic")
    (tmp_path / "wrong").write_text("wrong")
    wrong = Means(passphrase=Passphrase.of_file(str(tmp_path / "wrong")))
    assert "wrong passphrase" in refused(OCB, wrong, "a wrong passphrase")
    for at in range(80, len(OCB)):
        refused(OCB[:at] + bytes([OCB[at] ^ 1]) + OCB[at + 1 :], means, f"byte {at}")
    for end in range(100, len(OCB), 5):
        assert "is cut" in refused(OCB[:end], means, f"{end} bytes of it")
    refused(OCB + b"x", means, "junk behind it")
