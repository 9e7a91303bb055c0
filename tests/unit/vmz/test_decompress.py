"""Compressed inputs, with their ends proven or not: every cut, every flipped byte, every wrapping."""

import bz2
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from vmstate.errors import Damaged
from vmstate.io.descriptors import BLOCK
from vmstate.io.readers import Reader
from vmstate.vmz import convert, decompress, zstd
from vmstate.vmz.decompress import Members, recognise, unpacked
from vmstate.vmz.zstd import Unzstd

from unit.streams import Pieces

CONTENT = b"QEVM" + bytes(range(256)) * 3 + bytes(2000) + os.urandom(64)
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}
SKIPPABLE = struct.pack("<II", 0x184D2A5E, 5) + b"index"
# Around the edges of zstd's blocks, of our own pieces, and of what a pipe gives at once.
EDGES = [1, 2, 3, 65535, 65536, 65537, 131071, 131072, 131073, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]


def everything(source: Reader, step: int = BLOCK) -> bytes:
    found = bytearray()
    buffer = memoryview(bytearray(step))
    while count := source.readinto(buffer):
        found += buffer[:count]
    # An end is final.
    assert source.readinto(buffer) == 0
    return bytes(found)


def reader(kind: str, data: bytes, piece: int = 1 << 30) -> Reader:
    return Unzstd(Pieces(data, piece)) if kind == "zstd" else Members(kind, Pieces(data, piece))


def unwrap(data: bytes, piece: int = 1 << 30) -> bytes:
    first = data[: decompress.FIRST]
    return everything(unpacked(Pieces(data[len(first) :], piece), first))


def some(length: int) -> bytes:
    """Neither random nor empty, as memory is."""
    return (os.urandom(1000) + bytes(3000)) * (length // 4000) + os.urandom(length % 4000)


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("length", EDGES)
def test_there_and_back(kind: str, length: int) -> None:
    content = some(length)
    packed = PACKERS[kind](content)
    for piece, step in ((1 << 30, BLOCK), (4095, BLOCK), (65537, 131071), (BLOCK, 4096)):
        assert everything(reader(kind, packed, piece), step) == content


@pytest.mark.parametrize("kind", PACKERS)
def test_one_byte_at_a_time(kind: str) -> None:
    packed = PACKERS[kind](CONTENT)
    assert everything(reader(kind, packed, 1), 1) == CONTENT
    assert everything(reader(kind, packed + packed, 1)) == CONTENT * 2


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("piece", [1, 7, 1 << 30])
def test_a_cut_at_every_byte(kind: str, piece: int) -> None:
    packed = PACKERS[kind](CONTENT)
    for cut in range(1, len(packed)):
        with pytest.raises(Damaged, match=f"truncated at offset {cut}, in "):
            everything(reader(kind, packed[:cut], piece))
        with pytest.raises(Damaged, match=f"truncated at offset {len(packed) + cut}, in |junk behind"):
            everything(reader(kind, packed + packed[:cut], piece))


@pytest.mark.parametrize("kind", PACKERS)
def test_a_flipped_bit_in_every_byte(kind: str) -> None:
    """Where it is not found it did not matter: the time in a gzip header, an unused bit."""
    packed = PACKERS[kind](CONTENT)
    harmless = 0
    for at in range(len(packed)):
        changed = bytearray(packed)
        changed[at] ^= 1 << at % 8
        try:
            assert everything(reader(kind, bytes(changed))) == CONTENT
            harmless += 1
        except Damaged:
            pass
    assert harmless < 10


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("junk", [b"\0", b"x", b"\0" * 512, b"\x28\xb5", b"\x1f", b"QEVM" * 9])
def test_something_behind_the_end(kind: str, junk: bytes) -> None:
    packed = PACKERS[kind](CONTENT)
    words = f"junk behind .* offset {len(packed)}|truncated at offset {len(packed) + len(junk)}, in "
    for piece in (1, 3, len(packed) + 1, 1 << 30):
        with pytest.raises(Damaged, match=words):
            everything(reader(kind, packed + junk, piece))


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz"])
def test_many_small_members(kind: str) -> None:
    pieces = [some(length) for length in (1, 5, 4096, 65536, 0, 7)] * 20
    packed = b"".join(PACKERS[kind](piece) for piece in pieces)
    for piece in (3, 100, 1 << 30):
        assert everything(reader(kind, packed, piece)) == b"".join(pieces)


# zstd


def test_frames_of_every_kind() -> None:
    pack = zstandard.ZstdCompressor(level=3).compress
    sized, unsized = pack(CONTENT), zstandard.ZstdCompressor(write_content_size=False).compressobj()
    streamed = unsized.compress(CONTENT) + unsized.flush()
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(some(300_000))
    large = zstandard.ZstdDecompressor().decompress(checked)
    random = os.urandom(200_000)
    for piece in (1, 1000, 1 << 30):
        whole = SKIPPABLE + sized + SKIPPABLE * 2 + streamed + pack(b"") + checked + pack(random) + SKIPPABLE
        assert everything(reader("zstd", whole, piece)) == CONTENT * 2 + large + random


def test_only_what_is_skipped() -> None:
    assert everything(reader("zstd", SKIPPABLE)) == b""
    assert everything(reader("zstd", PACKERS["zstd"](b""))) == b""
    for cut in range(1, len(SKIPPABLE)):
        with pytest.raises(Damaged, match=f"truncated at offset {cut}, in "):
            everything(reader("zstd", SKIPPABLE[:cut]))


def test_the_offset_of_the_frame_that_is_wrong() -> None:
    good = PACKERS["zstd"](some(500_000))
    bad = bytearray(good)
    bad[-1] ^= 1
    with pytest.raises(Damaged, match=rf"corrupt frame at offset {len(good)}: .*checksum"):
        everything(reader("zstd", good + bytes(bad) + good))


def frame(descriptor: int, fields: bytes, *parts: tuple[int, int, int, bytes]) -> bytes:
    """A frame from (last, type, size, data) of its blocks."""
    blocks = b"".join((last | kind << 1 | size << 3).to_bytes(3, "little") + data for last, kind, size, data in parts)
    return zstd.FRAME.to_bytes(4, "little") + bytes([descriptor]) + fields + blocks


def test_blocks_made_by_hand() -> None:
    made = frame(0, b"\x38", (0, 0, 3, b"raw"), (0, 1, 70_000, b"r"), (0, 0, 0, b""), (1, 1, 1, b"!"))
    for piece in (1, 1 << 30):
        assert everything(reader("zstd", made * 2, piece)) == (b"raw" + b"r" * 70_000 + b"!") * 2


@pytest.mark.parametrize(
    ("descriptor", "fields", "mebibytes"),
    [
        (0x00, bytes([18 << 3]), 256),
        (0x00, bytes([17 << 3 | 1]), 144),
        (0x00, b"\xff", 15 << 18),
        (0xA0, (200 << 20).to_bytes(4, "little"), 200),
        (0xE0, (1 << 40).to_bytes(8, "little"), 1 << 20),
    ],
)
def test_a_window_that_is_too_large(descriptor: int, fields: bytes, mebibytes: int) -> None:
    made = SKIPPABLE + frame(descriptor, fields, (1, 1, 1, b"x"))
    with pytest.raises(Damaged, match=f"offset 13 wants a window of {mebibytes} MiB, more than 128 MiB") as caught:
        everything(reader("zstd", made))
    assert "zstd -d --long=31" in caught.value.hints[0]


def test_the_largest_window_is_taken() -> None:
    made = frame(0, bytes([17 << 3]), (1, 1, 9, b"x"))
    assert everything(reader("zstd", made)) == b"x" * 9


@pytest.mark.parametrize("wrong", [(1, 3, 1, b"x"), (1, 0, (128 << 10) + 1, bytes(1 << 18)), (1, 1, 1 << 20, b"x")])
def test_blocks_that_cannot_be(wrong: tuple[int, int, int, bytes]) -> None:
    with pytest.raises(Damaged, match="corrupt block header at offset 10: found type"):
        everything(reader("zstd", frame(0, b"\x38", (0, 0, 1, b"x"), wrong)))


def test_a_frame_that_needs_a_dictionary() -> None:
    with pytest.raises(Damaged, match=r"corrupt frame at offset 0: .*[Dd]ictionary"):
        everything(reader("zstd", frame(1, b"\x38\7", (1, 1, 9, b"x"))))


def test_nothing_and_no_zstd() -> None:
    with pytest.raises(Damaged, match="the input is empty"):
        everything(reader("zstd", b""))
    for data in (CONTENT, PACKERS["gzip"](CONTENT), b"abcdefgh", b"x", b"(\xb5x", b"P*\0"):
        for piece in (1, 4, 1 << 30):
            with pytest.raises(Damaged, match="no zstd file: found b['\"].* at offset 0"):
                everything(reader("zstd", data, piece))


def test_little_that_becomes_much_comes_little_by_little() -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    bomb = b"".join(packer.compress(bytes(BLOCK)) for _ in range(300)) + packer.flush()
    assert len(bomb) < 50_000
    for kind, data in (("zstd", bomb), ("gzip", gzip.compress(bytes(300 << 20), 1))):
        source, count, buffer = reader(kind, data), 0, memoryview(bytearray(BLOCK))
        while got := source.readinto(buffer):
            assert got <= BLOCK
            count += got
        assert count == 300 << 20


@pytest.mark.parametrize("threads", [0, 1, 2, 200])
@pytest.mark.parametrize("level", [1, 2, 7])
def test_packing(level: int, threads: int, tmp_path: Path) -> None:
    for length in (1, 131072, 131073, 9 * BLOCK + 1):
        content = some(length)
        fd = os.open(tmp_path / "packed", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            count = convert.compress(Pieces(content, 65536), fd, level, threads, other=True)
            packed = (tmp_path / "packed").read_bytes()
        finally:
            os.close(fd)
        assert len(packed) == count
        assert everything(reader("zstd", packed)) == content
        assert recognise(packed[: decompress.FIRST]) == "vmz"
        assert unwrap(packed, 4095) == content


# What may be around a state


def test_recognise() -> None:
    for kind, pack in PACKERS.items():
        assert recognise(pack(CONTENT)) == kind
    assert recognise(SKIPPABLE) == "zstd"
    assert recognise(CONTENT) == "state"
    assert recognise(b"\x89LZO\0\r\n\x1a\n\x10") == "lzop"
    assert recognise(b"LibvirtQemudSave\2") == recognise(b"LibvirtQemudPart\2") == "libvirt"
    assert recognise(b"-----BEGIN PGP MESSAGE-----\n") == "openpgp"
    for head in (b"\x85\1\x8c\3g", b"\x84\x5e\3g", b"\xc1\x5e\3g", b"\xc1\xc0\x4c\3", b"\x8c\x0d\4\7", b"\xc3\x0d\4\7"):
        assert recognise(head) == "openpgp"
    for other in (b"", b"Q", b"abc", b"\x85", b"\x85\1\x8c\x09g", b"\xff\xff\xff\xff", b"\x7fELF", b"QFI\xfb"):
        assert recognise(other) is None


@pytest.mark.parametrize("piece", [1, 1000, 1 << 30])
@pytest.mark.parametrize("kind", [None, *PACKERS])
def test_unpacked(kind: str | None, piece: int) -> None:
    data = PACKERS[kind](CONTENT) if kind else CONTENT
    assert unwrap(data, piece) == CONTENT
    if kind:
        with pytest.raises(Damaged, match="truncated"):
            unwrap(data[:-1], piece)
        with pytest.raises(Damaged, match="junk"):
            unwrap(data + b"junkjunk", piece)


@pytest.mark.parametrize(
    ("data", "words", "hint"),
    [
        (b"", "the input is empty", ""),
        (b"\x7fELF" + bytes(20), "no state of a guest: found b'\\x7fELF", ""),
        (b"\x85\1\x8c\3" + bytes(20), "found an OpenPGP message at offset 0", "vm-encrypt -d"),
        (b"\x89LZO\0\r\n\x1a\n" + bytes(20), "found a lzop file at offset 0", "lzop -dc"),
    ],
)
def test_what_is_no_state(data: bytes, words: str, hint: str) -> None:
    with pytest.raises(Damaged) as caught:
        unwrap(data)
    assert words in str(caught.value)
    assert hint in " ".join(caught.value.hints)


def libvirt(number: int, data: bytes, order: str = "<", magic: bytes = b"LibvirtQemudSave", version: int = 2) -> bytes:
    xml = b"<domain/>\0" + bytes(70_000)
    return magic + struct.pack(f"{order}19I", version, len(xml), 1, number, 0, *[0] * 14) + xml + data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("piece", [1, 1 << 30])
def test_a_save_file_of_libvirt(order: str, piece: int) -> None:
    for number, kind in enumerate(decompress.LIBVIRT_FORMATS):
        pack = PACKERS.get(kind, bytes)
        if kind not in ("lzop", "sparse"):
            assert unwrap(libvirt(number, pack(CONTENT), order), piece) == CONTENT
        if kind in PACKERS:
            whole = libvirt(number, pack(CONTENT), order)
            with pytest.raises(Damaged, match=f"truncated at offset {len(whole) - 1}"):
                unwrap(whole[:-1], piece)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (libvirt(0, CONTENT, magic=b"LibvirtQemudPart"), "incomplete save file"),
        (libvirt(4, b""), "a format that is not read here: lzop"),
        (libvirt(6, b""), "a format that is not read here: sparse"),
        (libvirt(9, b""), "a format that is not read here: number 9"),
        (libvirt(0, CONTENT, version=3), "unknown version of libvirt's save file at offset 16"),
        (libvirt(0, CONTENT)[:50], "truncated at offset 50, in the header of libvirt's save file"),
        (libvirt(0, CONTENT)[:5000], "truncated at offset 5000, in the XML of libvirt's save file"),
    ],
)
def test_save_files_that_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(Damaged) as caught:
        unwrap(data)
    assert words in str(caught.value)


def test_the_way_around_lzop_starts_where_the_data_does() -> None:
    whole = libvirt(4, b"\x89LZO")
    with pytest.raises(Damaged) as caught:
        unwrap(whole)
    start = int(caught.value.hints[0].split("+")[1].split()[0])
    assert whole[start - 1 :] == b"\x89LZO"
