"""The file .vmz: there and back, at random, and in all the ways in which it can be damaged."""

from __future__ import annotations

import os
import random
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmstate.errors import Damaged
from vmstate.io.descriptors import HOLD
from vmstate.io.readers import FdReader, read_up_to
from vmstate.stream.validate import validate
from vmstate.vmz import convert, decompress, file_format, page_index, writer, zstd
from vmstate.vmz import reader as vmz_reader
from vmstate.vmz.state_file import state_of
from vmstate.vmz.vmz_file import vmz_file

from unit.packed import (
    HARMLESS,
    Change,
    Damage,
    everything,
    flipped,
    frames,
    groups,
    kept,
    opened,
    pack,
    pack_cut,
    unpack,
)
from unit.streams import BAD, GOOD, Pieces, state

# The longest states have four frames only; with these they have some groups.
SMALL = 64 << 10
REAL = "q35-7.2"


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Frames of 64 KiB, three a group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "FRAME", SMALL)
        patch.setattr(vmz_reader, "GROUP", 3 * SMALL)
        patch.setattr(writer, "GROUP", 3 * SMALL)
        yield


@pytest.fixture(scope="module")
def real(small: None) -> bytes:
    return pack(state(REAL))


@pytest.fixture(scope="module")
def other(small: None) -> bytes:
    """Of another state, which has as many groups."""
    return pack(state("q35-10.0"))


def some(length: int) -> bytes:
    """Neither random nor empty, and no two pages alike."""
    chance = random.Random(length)
    whole = (chance.randbytes(1000) + bytes(3096) for _ in range(-(-length // 4096)))
    return b"".join(whole)[:length]


def in_one_pass(data: bytes, piece: int = 1 << 30) -> bytes:
    return b"".join(vmz_reader.Unvmz(Pieces(data, piece)).pieces())


def as_zstd(data: bytes) -> bytes:
    """What zstd makes of it, which knows nothing of the end record."""
    with kept(data) as fd:
        return read_up_to(zstd.Unzstd(FdReader(fd)), 8 << 20) if data else b""


def refused(data: bytes, words: str = ".") -> None:
    """By every reader, in words that have `words` in them."""
    readers: list[Callable[[], object]] = [
        lambda: unpack(data),
        lambda: unpack(data, other=True),
        lambda: validate(decompress.plain(Pieces(data))),
        lambda: at_random(data),
    ]
    for reader in readers:
        with pytest.raises(Damaged, match=words):
            reader()


def at_random(data: bytes) -> bytes:
    with opened(data) as file:
        return everything(file)


# There and back


@pytest.mark.parametrize("name", GOOD)
def test_a_state(name: str) -> None:
    content = state(name)
    data = pack(content)
    assert unpack(data) == in_one_pass(data) == at_random(data) == content
    assert validate(decompress.plain(Pieces(data))).size == len(content)
    assert not file_format.parse_head(data[8:20]).flags


@pytest.mark.parametrize("name", BAD)
def test_no_whole_state(name: str) -> None:
    """What is left behind is no file to any reader."""
    refused(pack_cut(state(name)))
    assert unpack(pack(state(name), other=True), other=True) == state(name)


def longer(content: bytes, count: int) -> bytes:
    """The state with a section of RAM more, in which the first page is sent `count` times."""
    end = b"\0\0\0\0\0\0\0\x10"
    at = content.index(end + b"\x7e") + 13
    number = content[at - 4 : at]
    body = b"".join(b"\0\0\0\0\0\0\0\x08\6pc.ram" + some(4096 + n)[n:] for n in range(count))
    return content[:at] + b"\2" + number + body + end + b"\x7e" + number + content[at:]


def test_a_state_that_is_cut_or_goes_on() -> None:
    content = longer(state("pc-7.2"), 1000)
    chance = random.Random(5)
    for at in [1, 4, 100, file_format.FRAME, *(chance.randrange(len(content)) for _ in range(10)), len(content) - 1]:
        left = pack_cut(content[:at])
        refused(left)
        # What came is there, but for the bytes that the judge still held.
        came = as_zstd(left)
        assert content.startswith(came)
        assert len(came) >= min(at, len(content) - 600_000) - (2 << 20)
    refused(pack_cut(content + b"x"))
    refused(pack_cut(content + content))


@pytest.mark.parametrize(
    "edge",
    [
        file_format.FRAME,
        2 * file_format.FRAME,
        file_format.GROUP,
        file_format.GROUP + file_format.FRAME,
        2 * file_format.GROUP,
    ],
)
@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_sizes_at_the_edges(edge: int, beside: int) -> None:
    content = some(edge + beside)
    data = pack(content, other=True)
    assert unpack(data, other=True) == at_random(data) == content
    sizes = [end.at - start.at for start, end in zip(frames(data), frames(data)[1:], strict=False)]
    count = sum(frame.number is None for frame in frames(data))
    assert len(sizes) >= count == -(-len(content) // file_format.FRAME)
    assert len(groups(data)) == -(-len(content) // file_format.GROUP)


def test_nothing() -> None:
    with pytest.raises(Damaged, match="the input is empty"):
        pack(b"", other=True)
    assert pack_cut(b"", other=True) == pack_cut(b"") == b""


@given(st.integers(1, 700_000), st.integers(1, 300_000), st.integers(1, 300_000), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
@pytest.mark.usefixtures("small")
def test_pieces_of_any_size(length: int, there: int, back: int, threads: int) -> None:
    content = some(length)
    data = pack(content, other=True, piece=there, threads=threads)
    assert data == pack(content, other=True, threads=1)
    assert unpack(data, other=True, piece=back) == content


@pytest.mark.parametrize("piece", [1, 7, 4096, 65537])
def test_a_state_in_pieces(piece: int) -> None:
    data = pack(state("uuid-7.2"), piece=piece)
    assert data == pack(state("uuid-7.2"))
    assert unpack(data, piece=piece) == in_one_pass(data, piece) == state("uuid-7.2")


@pytest.mark.parametrize("threads", [1, 2, 7, 200])
def test_threads_make_no_difference(threads: int) -> None:
    content = some(5 * file_format.GROUP // 2)
    assert pack(content, other=True, threads=threads) == pack(content, other=True, threads=1)


def test_a_view_of_any_size() -> None:
    """`readinto` gives what `pieces` gives, 0 only at the end, and that again and again."""
    content, found = some(2 * file_format.FRAME + 5), bytearray()
    reader, view = vmz_reader.Unvmz(Pieces(pack(content, other=True))), memoryview(bytearray(file_format.FRAME + 3))
    while count := reader.readinto(view):
        found += view[:count]
    assert found == content
    assert reader.readinto(view) == 0
    assert reader.records is not None


def test_the_last_bytes_leave_only_with_the_end() -> None:
    content = some(HOLD + 7 * file_format.GROUP)
    data = pack(content, other=True)
    end = frames(data)[-2]
    for cut in (end.at, end.at + 20, end.end, len(data) - 1):
        with kept() as fd:
            with pytest.raises(Damaged, match="truncated"):
                convert.decompress(Pieces(data[:cut]), fd, 2, other=True)
            left = os.fstat(fd).st_size
        # Groups that were being unpacked are not there.
        assert 2 * file_format.GROUP < left <= len(content) - HOLD


# At random


def test_reads_over_every_edge() -> None:
    content = some(2 * file_format.GROUP + file_format.FRAME + 100)
    with opened(pack(content, other=True)) as file:
        assert (file.content, file.facts, file.blocks) == (len(content), None, {})
        edges = [*range(0, len(content), file_format.FRAME), file_format.GROUP, 2 * file_format.GROUP, len(content)]
        for edge in edges:
            for offset in (edge - 4096, edge - 4095, edge - 1, edge, edge + 1):
                for count in (1, 4096, 2 * file_format.FRAME + 5):
                    if 0 <= offset <= offset + count <= len(content):
                        assert file.read(offset, count) == content[offset : offset + count], (offset, count)
        assert file.read(0, len(content)) == content
        for offset, count in ((-1, 2), (0, len(content) + 1), (len(content), 1), (len(content) - 4095, 4096)):
            with pytest.raises(IndexError):
                file.read(offset, count)


@given(st.data())
@settings(deadline=None, max_examples=20)
@pytest.mark.usefixtures("small")
def test_reads_of_anything(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 700_000))
    content = some(length)
    with opened(pack(content, other=True), cache=data.draw(st.sampled_from([0, 1 << 20]))) as file:
        for _ in range(20):
            offset = data.draw(st.integers(0, length - 1))
            count = data.draw(st.integers(1, length - offset))
            assert file.read(offset, count) == content[offset : offset + count]


@pytest.mark.usefixtures("small")
def test_the_cache_has_a_bound() -> None:
    """And what is asked for again and again is unpacked once."""
    content = some(40 * SMALL)
    with opened(pack(content, other=True), cache=5 * SMALL) as file:
        unpacked = []
        read, file._read_frame = file._read_frame, lambda *where: (unpacked.append(where), read(*where))[1]  # type: ignore[method-assign]
        for offset in range(0, len(content), SMALL):
            assert file.read(offset, 10) == content[offset : offset + 10]
            file.read(0, 10)
            assert sum(map(len, file._frames.values())) <= 5 * SMALL
        assert len(unpacked) == len(set(unpacked)) == 40
        file.read(SMALL, 10)
        assert unpacked[-1] == (0, 1)


@pytest.mark.usefixtures("small")
def test_threads_at_one_file() -> None:
    content = some(40 * SMALL)
    failed: list[int] = []

    def look(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(300):
            offset = chance.randrange(len(content) - 5000)
            if file.read(offset, 5000) != content[offset : offset + 5000]:
                failed.append(offset)

    with opened(pack(content, other=True), cache=3 * SMALL) as file:
        threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not failed


def test_a_file_that_begins_later() -> None:
    data = pack(state(REAL))
    with kept(b"before" + data) as fd:
        os.lseek(fd, 10, os.SEEK_SET)
        file = vmz_file(fd, 4)
        assert file
        assert everything(file) == state(REAL)
        assert vmz_file(fd, 3) is None


def test_what_is_no_file() -> None:
    reading, writing = os.pipe()
    assert vmz_file(reading) is None
    os.close(reading)
    os.close(writing)
    for content in (b"", b"QEVM", state(REAL), zstd.skippable(3, b"")):
        with kept(content) as fd:
            assert vmz_file(fd) is None


# Every structure, changed with its digests made anew


def with_end(data: bytes, records: list[tuple[int, bytes]]) -> bytes:
    """The same file with other records in its end record."""
    end, seek = frames(data)[-2:]
    body = b"".join(file_format.RECORD_HEAD.pack(kind, 0, len(content)) + content for kind, content in records)
    made = zstd.skippable(file_format.END, file_format.digest(body).to_bytes(8, "little") + body)
    entry = seek.end - file_format.SEEK_END.size - file_format.SEEK_ENTRY.size
    return data[: end.at] + made + data[seek.at : entry] + struct.pack("<I", len(made)) + data[entry + 4 :]


def records_of(data: bytes) -> list[tuple[int, bytes]]:
    end = frames(data)[-2]
    found = file_format.parse_end(data[end.at + 8 : end.end], end.at)
    return [(kind, content) for kind, contents in found.items() for content in contents]


def replaced(data: bytes, kind: int, content: bytes | None) -> bytes:
    records = [(each, content if each == kind else old) for each, old in records_of(data)]
    return with_end(data, [(each, new) for each, new in records if new is not None])


def test_a_record_that_is_not_known(real: bytes) -> None:
    records = records_of(real)
    assert with_end(real, records) == real
    for added in ([*records, (0x1234, b"what may come")], [(5, b""), *records]):
        data = with_end(real, added)
        assert unpack(data) == at_random(data) == state(REAL)
        with opened(data) as file:
            assert state_of(file).size == len(state(REAL))
    for added in ([*records, (0x9234, b"what must be known")], [(0x8002, b""), *records]):
        refused(
            with_end(real, added), f"unknown mandatory record {added[-1][0] if added[-1][0] > 0x8001 else 0x8002:#x}"
        )


def test_records_that_are_missing(real: bytes) -> None:
    refused(replaced(real, file_format.REC_TOTALS, None), "no totals")
    refused(with_end(real, [*records_of(real), records_of(real)[0]]), "no totals")
    for kind in (file_format.REC_STATE, file_format.REC_BLOCK):
        without = replaced(real, kind, None)
        for reader in (unpack, at_random):
            with pytest.raises(Damaged, match="the index of the state is missing"):
                reader(without)
    # Enough for one pass, not for reading at random
    without = replaced(real, file_format.REC_GROUPS, None)
    assert unpack(without) == state(REAL)
    with pytest.raises(Damaged, match="no table of groups"):
        at_random(without)


def test_a_head_that_is_not_known(real: bytes) -> None:
    for at, value, words in (
        (11, 2, "another version: expected 1, found 2"),
        (11, 0, "another version"),
        (16, 2, "found 1, flags 0x2"),
        (16, 3, "flags 0x3"),
        (19, 0x80, "flags 0x80000000"),
    ):
        refused(real[:at] + bytes((value,)) + real[at + 1 :], words)
    for size in (0, 1, file_format.LEAST_FRAME - 1, file_format.MOST_FRAME + 1, 0xFFFFFFFF):
        refused(real[:12] + struct.pack("<I", size) + real[16:], f"frames of {size} bytes")


def test_a_head_that_says_another_thing(real: bytes) -> None:
    """That the content was not judged; that frames are larger."""
    refused(real[:16] + b"\1" + real[17:], "not of the frames|not that of this file")
    refused(real[:12] + struct.pack("<I", SMALL + 1) + real[16:], "makes no sense|was expected|not that of this file")


def test_the_end_of_another_file(real: bytes, other: bytes) -> None:
    at, theirs = frames(real)[-2].at, frames(other)[-2].at
    assert len(groups(real)) == len(groups(other))
    refused(real[:at] + other[theirs:], "is not of the frames before it|is not that of this file|no end record")
    # And of one with the same sizes everywhere
    chance = random.Random(9)
    one, two = (pack(chance.randbytes(5 * SMALL), other=True) for _ in range(2))
    assert frames(one) == frames(two)
    at = frames(one)[-2].at
    refused(
        one[:at] + two[at:],
        "is not of the frames before it|is not that of this file|no state of a guest|the end record knows",
    )


def test_two_files_one_behind_the_other(real: bytes, other: bytes) -> None:
    for two in (real + real, real + other, other + real):
        refused(two, "junk behind the seek table|is not that of this file")


@pytest.mark.parametrize("junk", [b"\0", b"junk", bytes(4096), zstd.skippable(3, b"")])
def test_something_behind_the_end(real: bytes, junk: bytes) -> None:
    refused(real + junk, "junk behind the seek table|does not end with a seek table|corrupt seek table|no end record")


def test_groups_that_are_missing_doubled_or_swapped(real: bytes) -> None:
    head, parts, end = real[: frames(real)[0].end], groups(real), real[frames(real)[-2].at :]
    assert head + b"".join(parts) + end == real
    assert len(parts) == 4
    orders = [[n for n in range(4) if n != left_out] for left_out in range(4)]
    orders += [[0, 1, 1, 2, 3], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 0, 2, 3], [0, 2, 1, 3], [3, 1, 2, 0], []]
    for order in orders:
        refused(head + b"".join(parts[n] for n in order) + end)


def test_frames_that_are_missing_doubled_or_swapped(real: bytes) -> None:
    pieces = [real[frame.at : frame.end] for frame in frames(real)]
    for n in range(1, len(pieces)):
        refused(b"".join(pieces[:n] + pieces[n + 1 :]))
        refused(b"".join(pieces[: n + 1] + pieces[n:]))
        swapped = pieces[:n] + pieces[n + 1 : n + 2] + [pieces[n]] + pieces[n + 2 :]
        if swapped != pieces:
            refused(b"".join(swapped))
    # Without its head it is another zstd file, with the same content.
    assert unpack(b"".join(pieces[1:])) == state(REAL)


def test_tables_with_a_digest_of_their_own(real: bytes) -> None:
    """A forged table fits neither its frames nor the end record, and breaks no reader."""
    chance = random.Random(7)
    tables = [frame for frame in frames(real) if frame.number == file_format.TABLE]
    for _ in range(150):
        table = chance.choice(tables)
        body = bytearray(real[table.at + 16 : table.end])
        body[chance.randrange(len(body))] = chance.randrange(256)
        if body == real[table.at + 16 : table.end]:
            continue
        forged = file_format.digest(bytes(body)).to_bytes(8, "little") + body
        refused(real[: table.at + 8] + forged + real[table.end :])


def test_an_end_record_with_a_digest_of_its_own(real: bytes) -> None:
    """Whatever stands in it, readers say that it is damaged, or take it: nothing else happens."""
    chance = random.Random(8)
    refusals, records = 0, records_of(real)
    for _ in range(400):
        number = chance.randrange(len(records))
        kind, content = records[number]
        changed = bytearray(content)
        if kind == file_format.REC_TOTALS or chance.random() < 0.5:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        else:
            # Below the packing, where there is one
            head = content.index(zstd.FRAME.to_bytes(4, "little"))
            plain = bytearray(file_format.unpack(content[head:], 1 << 20, 0))
            for _ in range(chance.randrange(1, 4)):
                plain[chance.randrange(len(plain))] = chance.choice([0, 1, 2, 255, chance.randrange(256)])
            changed = bytearray(content[:head] + writer.pack(bytes(plain)))
        forged = with_end(real, [*records[:number], (kind, bytes(changed)), *records[number + 1 :]])
        for reader in (unpack, look):
            try:
                reader(forged)
            except Damaged:
                refusals += 1
    assert refusals > 100


def look(data: bytes) -> None:
    """Whatever is known of a file."""
    with opened(data) as file:
        state_of(file)
        for name, block in file.blocks.items():
            for number in {0, block.pages // 2, block.pages - 1}:
                try:
                    file.page(name, number)
                except LookupError as error:
                    assert isinstance(error, IndexError) or "sent as a difference" in str(error)


# Accidents


def test_flipped_bits(real: bytes) -> None:
    """Each is found; tests/long/check_vmz.py has ten thousand of them in a larger file."""
    damage = Damage(real)
    assert not damage.harmless(Change("two", flipped(real, 300)))
    for change in [*damage.flips(1000), *damage.flips_between(500)]:
        assert not damage.harmless(change) or int(change.what.split()[1].rstrip(",")) in HARMLESS, change.what


def test_every_bit_of_the_head(real: bytes) -> None:
    damage = Damage(real)
    assert damage.harmless(Change("none", real))
    found = {bit for bit in range(8 * 20) if damage.harmless(Change(f"bit {bit}", flipped(real, bit)))}
    assert found == HARMLESS


def test_every_cut_at_an_edge_and_others(real: bytes) -> None:
    damage = Damage(real)
    for change in damage.cuts(400):
        assert not damage.harmless(change), change.what


def test_every_cut_and_every_bit_of_a_little_file() -> None:
    content = b"QEVM" + some(200)
    data = pack(content, other=True)
    assert len(data) < 700
    for cut in range(len(data)):
        refused(data[:cut])
    for bit in range(8 * 20, 8 * len(data)):
        with pytest.raises(Damaged):
            unpack(flipped(data, bit), other=True)


def test_an_index_of_another_state(real: bytes, other: bytes) -> None:
    """With all digests right: the facts do not fit the devices."""
    theirs = dict(records_of(other))
    mixed = replaced(real, file_format.REC_STATE, theirs[file_format.REC_STATE])
    with opened(mixed) as file, pytest.raises(Damaged):
        state_of(file)


def test_records_of_no_sense() -> None:
    block = page_index.BLOCK_HEAD.pack(2, 1 << 20, 4096, 0, 1) + b"pc"
    for data in (
        b"",
        block,
        block + b"no frame",
        block + writer.pack(b""),
        block + writer.pack(struct.pack("<IBq", 255, 2, 9)),
        block + writer.pack(struct.pack("<IB", 256, 2)),
        block + writer.pack(struct.pack("<IBq", 256, 2, -9)),
        block + writer.pack(struct.pack("<IBq", 256, 1, 9)),
        block + writer.pack(struct.pack("<IBqB", 256, 2, 9, 9)),
        page_index.BLOCK_HEAD.pack(2, 1 << 20, 0, 0, 1) + b"pc" + writer.pack(struct.pack("<IBq", 256, 2, 9)),
    ):
        with pytest.raises(Damaged, match="its index cannot be read|record at offset 7"):
            page_index.parse_block(data, 7)
    whole = page_index.parse_block(block + writer.pack(struct.pack("<IBq", 256, 2, 9)), 7)
    assert whole.find(255) == (2, 9 + 255 * 4104)
    for text in (b"", b"[]", b"{}", b'{"page":4096}', b"\xff", b'"early devices description"'):
        with pytest.raises(Damaged, match="its facts about the state cannot be read"):
            page_index.parse_facts({file_format.REC_STATE: [writer.pack(text)]}, 7)
