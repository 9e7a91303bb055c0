"""A reader of .vmz files made from docs/vmz.md alone, and what others make of these files."""

import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard
from conftest import ROOT, Done, run, shell
from streams.walk import Walk, describing

from unit.streams import GOOD, state

# The reader.  Nothing in it comes from vmstate; what is not in the document is not known here.

DOCUMENT = (ROOT / "docs" / "vmz.md").read_text()
HEAD, TABLE, END, SEEK = 0x184D2A56, 0x184D2A57, 0x184D2A58, 0x184D2A5E
TOTALS, GROUPS, FACTS, BLOCK = 0x8001, 2, 3, 4
ZERO, NORMAL, AGAIN, PACKED = 1, 2, 4, 8


def digest(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def unpack(frame: bytes) -> bytes:
    """The content of a frame of zstd that says how large it is, with its checksum right."""
    found = zstandard.get_frame_parameters(frame)
    assert found.has_checksum
    content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    assert len(content) == found.content_size
    return content


@dataclass
class Span:
    """Pages of a block that are of one kind; place: of the first one's content in the stream."""

    first: int
    count: int
    kind: int
    place: int


@dataclass
class Ram:
    name: bytes
    size: int
    page: int
    again: int
    spans: list[Span]

    def pages(self) -> Iterator[tuple[int, int]]:
        """Kind and place of each."""
        for span in self.spans:
            for number in range(span.count):
                yield span.kind, span.place + number * (8 + self.page) if span.kind & NORMAL else 0


def spans(columns: bytes, count: int, page: int) -> list[Span]:
    lengths = struct.unpack_from(f"<{count}I", columns)
    kinds = columns[4 * count : 5 * count]
    jumps = list(struct.unpack(f"<{sum(bool(kind & NORMAL) for kind in kinds)}q", columns[5 * count :]))
    found, first, end = [], 0, 0
    for length, kind in zip(lengths, kinds, strict=True):
        place = 0
        if kind & NORMAL:
            place = end + jumps.pop(0)
            end = place + length * (8 + page)
        found.append(Span(first, length, kind, place))
        first += length
    assert not jumps
    return found


def ram(record: bytes) -> Ram:
    length, size, page, again, count = struct.unpack_from("<HQIQI", record)
    name = record[26 : 26 + length]
    found = Ram(name, size, page, again, spans(unpack(record[26 + length :]), count, page))
    assert sum(span.count for span in found.spans) == -(-size // page)
    return found


@dataclass
class Records:
    content: int
    packed: int
    groups: list[tuple[int, int, int]] = field(default_factory=list)
    facts: dict[str, Any] | None = None
    blocks: list[Ram] = field(default_factory=list)


def records(head: bytes, body: bytes) -> Records:
    """What is in an end record; its totals and its groups are held against each other."""
    assert digest(body[8:]) == int.from_bytes(body[:8], "little")
    at, found = 8, []
    while at < len(body):
        kind, zero, size = struct.unpack_from("<HHI", body, at)
        assert zero == 0
        assert at + 8 + size <= len(body)
        found.append((kind, body[at + 8 : at + 8 + size]))
        at += 8 + size
    kinds = [kind for kind, _ in found]
    assert not [kind for kind in kinds if kind & 0x8000 and kind != TOTALS]
    assert [kinds.count(kind) for kind in (TOTALS, GROUPS)] == [1, 1]
    content, packed, count, chain = struct.unpack("<QQIQ", dict(found)[TOTALS])
    columns = unpack(dict(found)[GROUPS])
    numbers = struct.unpack(f"<{count}I{count}I{count}Q", columns)
    assert digest(head + columns[8 * count :]) == chain
    made = Records(content, packed)
    made.groups = list(zip(numbers[:count], numbers[count : 2 * count], numbers[2 * count :], strict=True))
    assert sum(group[0] for group in made.groups) == content
    for kind, data in found:
        if kind == FACTS:
            made.facts = json.loads(unpack(data))
        elif kind == BLOCK:
            made.blocks.append(ram(data))
    return made


class Pipe:
    """A file from its first byte to its last one, as from a pipe; each byte is taken once."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.content = bytearray()
        self.seek: list[tuple[int, int, int]] = []
        self.groups: list[tuple[int, int, int]] = []
        magic, body = self.skippable()
        assert magic == HEAD
        name, version, self.frame, self.flags = struct.unpack("<3sBII", body)
        assert (name, version) == (b"VMZ", 1)
        assert 64 << 10 <= self.frame <= 1 << 20
        assert self.flags in (0, 1)
        while (found := self.skippable())[0] == TABLE:
            self.group(found[1])
        assert found[0] == END
        self.records = records(data[8:20], found[1])
        end = self.seek.pop()
        packed = sum(entry[0] for entry in self.seek)
        assert (self.records.content, self.records.packed) == (len(self.content), packed)
        assert self.records.groups == self.groups
        self.seek.append(end)
        entries = b"".join(struct.pack("<III", *entry) for entry in self.seek)
        entries += struct.pack("<IBI", len(self.seek), 0x80, 0x8F92EAB1)
        assert self.skippable() == (SEEK, entries)
        assert self.at == len(data)
        assert self.flags or (self.records.facts and self.records.blocks)

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        assert len(found) == count
        self.at += count
        return found

    def skippable(self) -> tuple[int, bytes]:
        magic, size = struct.unpack("<II", self.take(8))
        self.seek.append((8 + size, 0, xxhash.xxh64_intdigest(b"") & 0xFFFFFFFF))
        return magic, self.take(size)

    def group(self, table: bytes) -> None:
        own, content = struct.unpack_from("<QI", table)
        assert digest(table[8:]) == own
        entries = list(struct.iter_unpack("<IQ", table[12:]))
        assert 1 <= len(entries) == -(-content // self.frame) <= 64
        assert content <= 4 << 20
        begin, left = len(self.content), content
        for size, expected in entries:
            frame = self.take(size)
            assert digest(frame) == expected
            found = unpack(frame)
            assert len(found) == min(self.frame, left)
            left -= len(found)
            checksum = xxhash.xxh64_intdigest(found) & 0xFFFFFFFF
            assert int.from_bytes(frame[-4:], "little") == checksum
            self.seek.append((size, len(found), checksum))
            self.content += found
        assert (left, len(self.content) - begin) == (0, content)
        self.groups.append((content, 8 + len(table) + sum(size for size, _ in entries), own))


class File:
    """The same at random: its end first, then the frames that are asked for."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        magic, size = struct.unpack_from("<II", self.data)
        assert (magic, size) == (HEAD, 12)
        _, _, self.frame, _ = struct.unpack_from("<3sBII", self.data, 8)
        count, descriptor, magic = struct.unpack("<IBI", self.data[-9:])
        assert (descriptor, magic) == (0x80, 0x8F92EAB1)
        seek = len(self.data) - 8 - 12 * count - 9
        assert struct.unpack_from("<II", self.data, seek) == (SEEK, 12 * count + 9)
        end = seek - struct.unpack_from("<I", self.data, len(self.data) - 9 - 12)[0]
        assert struct.unpack_from("<II", self.data, end) == (END, seek - end - 8)
        self.records = records(self.data[8:20], self.data[end + 8 : seek])
        assert self.records.packed == end
        self.starts = list(accumulate((group[0] for group in self.records.groups), initial=0))
        self.places = list(accumulate((group[1] for group in self.records.groups), initial=20))
        assert self.places[-1] == end
        self.content = cache(self._content)

    def _content(self, group: int, number: int) -> bytes:
        at = self.places[group]
        magic, size = struct.unpack_from("<II", self.data, at)
        assert magic == TABLE
        table = self.data[at + 8 : at + 8 + size]
        assert digest(table[8:]) == int.from_bytes(table[:8], "little") == self.records.groups[group][2]
        at += 8 + size
        entries = list(struct.iter_unpack("<IQ", table[12:]))
        at += sum(entry[0] for entry in entries[:number])
        frame = self.data[at : at + entries[number][0]]
        assert digest(frame) == entries[number][1]
        return unpack(frame)

    def read(self, offset: int, count: int) -> bytes:
        found = b""
        while len(found) < count:
            at = offset + len(found)
            group = next(n for n, start in enumerate(self.starts[1:]) if at < start)
            number, begin = divmod(at - self.starts[group], self.frame)
            found += self.content(group, number)[begin : begin + count - len(found)]
        return found


# What it finds


class Places(Walk):
    """A plain walk through a stream that notes where each page was last: kind and place by block and number."""

    def __init__(self, stream: bytes) -> None:
        self.last: dict[tuple[str, int], tuple[int, int]] = {}
        super().__init__(stream)

    def _record(self) -> bool:
        begin = self.at
        flags = int.from_bytes(self.bytes[begin : begin + 8], "big") & 0xFFF
        address = int.from_bytes(self.bytes[begin : begin + 8], "big") & ~0xFFF
        goes_on = super()._record()
        kind = {0x002: ZERO, 0x008: NORMAL, 0x040: NORMAL | PACKED, 0x100: NORMAL | PACKED}.get(flags & ~0x020)
        if kind:
            page = self._block, address // 4096
            place = 0 if kind == ZERO else begin if kind & PACKED else self.at - 4096
            self.last[page] = kind | (AGAIN if page in self.last else 0), place
        return goes_on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vmz")


def packed(folder: Path, name: str, stream: bytes, *options: str) -> Path:
    path = folder / f"{name}.vmz"
    if not path.exists():
        (folder / name).write_bytes(stream)
        done = run("vm-compress", "-q", *options, "-o", path, folder / name)
        assert done == Done(0, b"", "")
    return path


def bulk() -> bytes:
    """Enough for a few groups, neither random nor empty."""
    return b"".join(os.urandom(1000) + bytes([n % 256]) * 3000 for n in range(3000)) + b"end"


@pytest.mark.parametrize("name", GOOD)
def test_every_byte_is_accounted_for(name: str, folder: Path) -> None:
    found = Pipe(packed(folder, name, state(name)).read_bytes())
    assert bytes(found.content) == state(name)
    assert found.flags == 0


@pytest.mark.parametrize("name", GOOD)
def test_every_page_is_where_the_index_has_it(name: str, folder: Path) -> None:
    file, stream = File(packed(folder, name, state(name))), state(name)
    walk = Places(stream)
    assert {block.name.decode(): block.size for block in file.records.blocks} == walk.blocks
    assert [block.name.decode() for block in file.records.blocks] == list(walk.blocks)
    for block in file.records.blocks:
        text, again = block.name.decode(), 0
        for number, (kind, place) in enumerate(block.pages()):
            assert (kind, place) == walk.last.get((text, number), (0, 0)), (text, number)
            if kind & NORMAL and not kind & PACKED:
                assert file.read(place, block.page) == stream[place : place + block.page]
            again += max(0, walk.pages[text, number * 4096] - 1)
        assert block.again == again


@pytest.mark.parametrize("name", GOOD)
def test_the_facts_are_those_of_the_stream(name: str, folder: Path) -> None:
    facts, stream = File(packed(folder, name, state(name))).records.facts, state(name)
    assert facts is not None
    documented = re.findall(r"^\| `(\w+)` \|", DOCUMENT.split("\n## The facts\n")[1].split("\n## ")[0], re.MULTILINE)
    assert sorted(facts) == sorted(documented)
    walk, mark = Places(stream), describing(stream)
    assert mark is not None
    assert (facts["machine"], facts["size"]) == (walk.machine, len(stream))
    assert facts["commands"] == [number for number, _ in walk.commands]
    begin, count = facts["devices"]
    assert (begin, begin + count) == (walk.devices, mark)
    assert stream[begin] == 4
    begin, count = facts["description"]
    assert (begin, begin + 5 + count) == (mark + 1, len(stream))
    json.loads(stream[begin + 5 :])
    for begin, count in facts["early"]:
        assert stream[begin] == 4
        assert stream[begin + count - 5] == 0x7E
    assert bool(facts["early"]) == (walk.early and "virtio-mem" in name)
    assert facts["deltas"] == walk.flags["xbzrle"]
    assert facts["packed"] == walk.flags["compress"]
    assert facts["background"] == ("background" in name)


def test_several_groups(folder: Path) -> None:
    content = bulk()
    path = packed(folder, "bulk", content, "--any")
    content = (folder / "bulk").read_bytes()
    found, file = Pipe(path.read_bytes()), File(path)
    assert bytes(found.content) == content
    assert (found.flags, found.records.facts, found.records.blocks) == (1, None, [])
    assert len(found.groups) > 2
    for offset in range(0, len(content) - 5000, 77_777):
        assert file.read(offset, 5000) == content[offset : offset + 5000]


@pytest.mark.parametrize(("name", "step"), [("little", 1), ("uuid-10.0", 41)])
def test_a_changed_byte_is_noticed_or_changes_nothing(name: str, step: int, folder: Path) -> None:
    content, options = (bulk()[:3000], ["--any"]) if name == "little" else (state(name), [])
    whole = packed(folder, name, content, *options).read_bytes()
    content = (folder / name).read_bytes()
    for at in [*range(20), *range(20, len(whole), step)]:
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        try:
            found = Pipe(bytes(changed))
        except (AssertionError, struct.error, zstandard.ZstdError):
            continue
        # As the document has it: in the head only.
        assert (at < 20, bytes(found.content)) == (True, content), at
    for cut in range(0, len(whole), step):
        with pytest.raises((AssertionError, struct.error, zstandard.ZstdError)):
            Pipe(whole[:cut])


def test_the_example_of_the_document() -> None:
    example = DOCUMENT.split("\n### An example\n")[1].split("\n## ")[0]
    bytes_of = re.findall(r"^    (?:[a-z]+ +)((?:[0-9a-f]{2} ?)+)$", example, re.MULTILINE)
    columns = bytes.fromhex("".join(bytes_of))
    shown = re.findall(r"^\| (\d+)(?: to (\d+))? \| (\d+) \|.*\| (\d+) \|$", example, re.MULTILINE)
    rows = [(int(first), int(last or first) - int(first) + 1, int(kind), int(at)) for first, last, kind, at in shown]
    found = spans(columns, len(rows), 4096)
    assert [(span.first, span.count, span.kind, span.place) for span in found] == rows


def test_the_magic_of_the_document(folder: Path) -> None:
    magic = DOCUMENT.split("\n## For file(1)\n")[1].split("```\n")[1]
    (folder / "magic").write_text(magic)
    path = packed(folder, "live-10.0", state("live-10.0"))
    other = packed(folder, "bulk", bulk(), "--any")
    said = run("file", "-b", "-m", folder / "magic", path, other, ROOT / "tests" / "streams" / "live-10.0.zst").text
    one, two, rest = said.splitlines()
    assert one == "state of a QEMU guest, packed by vm-compress, version 1"
    assert two == "bytes packed by vm-compress, version 1"
    assert "vm-compress" not in rest


# What others find


@pytest.mark.parametrize("name", ["bulk", "live-10.0", "q35-7.2"])
def test_zstd_takes_it(name: str, folder: Path) -> None:
    path = packed(folder, "bulk", bulk(), "--any") if name == "bulk" else packed(folder, name, state(name))
    content = (folder / name).read_bytes()
    assert run("zstd", "-qt", path).status == 0
    assert shell(f"zstd -dcq {path.name} | cmp - {name}", folder) == Done(0, b"", "")
    # To an output that can seek it writes in another way.
    assert run("zstd", "-dqf", path, "-o", folder / "again").status == 0
    assert (folder / "again").read_bytes() == content
    made = Pipe(path.read_bytes())
    frames, skipped = len(made.seek), sum(not size for _, size, _ in made.seek)
    line = run("zstd", "-l", path).text.splitlines()[1].split()
    assert line[:2] == [str(frames), str(skipped)]
    assert line[-2] == "XXH64"
    assert f"({made.records.content} B)" in run("zstd", "-lv", path).text


@pytest.mark.parametrize("name", ["bulk", "live-10.0", "block-7.2"])
def test_the_standard_seek_table_leads_to_every_byte(name: str, folder: Path) -> None:
    from pyzstd import SeekableZstdFile

    path = packed(folder, "bulk", bulk(), "--any") if name == "bulk" else packed(folder, name, state(name))
    content, edge = (folder / name).read_bytes(), File(path).frame
    with SeekableZstdFile(path, "r") as file:
        for offset in [*range(len(content) - 4096, 0, -99_991), 0, edge - 1, edge, len(content) - 1]:
            file.seek(offset)
            assert file.read(4096) == content[offset : offset + 4096]
        assert file.seek(0, os.SEEK_END) == len(content)
        file.seek(0)
        assert file.read() == content
