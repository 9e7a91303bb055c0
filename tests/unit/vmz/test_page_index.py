"""The index of a .vmz: the last copy of each page, whatever came before it, and the state without its pages."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmstate.errors import CannotDo
from vmstate.inspect.summary import survey, survey_index
from vmstate.stream import constants
from vmstate.stream.page_map import AGAIN, NORMAL, UNSENT, ZERO, PageMap
from vmstate.stream.reader import StateReader
from vmstate.stream.records import Block, Blocks, EndOfBody, Packed, Pages, Record
from vmstate.stream.validate import State
from vmstate.stream.writer import encode
from vmstate.vmz import convert, file_format, page_index, reader, writer
from vmstate.vmz.state_file import RawFile, state_of
from vmstate.vmz.vmz_file import VmzFile

from unit.packed import kept, pack
from unit.streams import GOOD, Pieces, state
from unit.vmz.test_format_by_document import Places as Walk

PAGE = 4096
NONE = memoryview(b"")
RAM = Block(b"pc.ram", 40 * PAGE)
# Room for the name in the first record of each run
NAMED = 1 + len(RAM.name)
# Some runs and pages that are kept, down to one
FEW = [(page_index.MOST_RUNS, page_index.MOST_PAGES), (8, 1 << 20), (1 << 20, 16), (1, 1), (0, 0)]
PLAIN, DELTA = "plain", "delta"


@contextmanager
def opened(stream: bytes, cache: int = 32 << 20) -> Iterator[VmzFile]:
    fd = os.memfd_create("state")
    try:
        convert.compress(Pieces(stream), fd, 1, 2)
        os.lseek(fd, 0, os.SEEK_SET)
        yield VmzFile(fd, cache=cache)
    finally:
        os.close(fd)


# Records by hand: each is its kind, first page and number of pages


Sent = tuple[str | int, int, int]


def records(sent: list[Sent]) -> Iterator[Record]:
    """One behind the other, from offset 100 on."""
    offset = 100
    for kind, first, count in sent:
        if kind == DELTA:
            for page in range(first, first + count):
                made: Record = Packed(RAM, constants.RAM_SAVE_FLAG_XBZRLE, True, page * PAGE, b"1234", offset=offset)
                yield made
                offset += len(encode(made))
        else:
            zero = kind == ZERO
            yield Pages(RAM, zero, True, ((first * PAGE, count),), PAGE, NONE, offset=offset)
            offset += NAMED + count * (9 if zero else 8 + PAGE)


def model(sent: list[Sent]) -> dict[int, tuple[int, int]]:
    """Kind and place of each page that was sent."""
    last: dict[int, tuple[int, int]] = {}
    for record in records(sent):
        if isinstance(record, Packed):
            new = [(record.address // PAGE, NORMAL | page_index.PACKED, record.offset)]
        else:
            assert isinstance(record, Pages)
            ((address, count),) = record.runs
            kind, begin = ZERO if record.zero else NORMAL, record.offset + record.first
            new = [(address // PAGE + n, kind, 0 if record.zero else begin + n * (8 + PAGE)) for n in range(count)]
        for page, kind, place in new:
            last[page] = kind | (AGAIN if page in last else 0), place
    return last


def indexed(sent: list[Sent]) -> page_index.BlockIndex:
    """There and back."""
    places, page_map = page_index.PageIndexBuilder(), PageMap(RAM, PAGE)
    places.see(Blocks(RAM.size, (RAM,)))
    for record in records(sent):
        places.see(record)
        if isinstance(record, Pages):
            for address, count in record.runs:
                page_map.mark(address, count, record.zero)
        elif isinstance(record, Packed):
            page_map.mark(record.address, 1, False)
    state = State()
    state.maps = {RAM.name: page_map}
    made = places.records(state)
    found = page_index.parse_blocks(
        {file_format.REC_BLOCK: [data for kind, data in made if kind == file_format.REC_BLOCK]}, 0
    )[RAM.name]
    assert (found.block, found.page, found.again) == (RAM, PAGE, page_map.again)
    assert found.page_map().kinds() == page_map.kinds()
    assert found.page_map().count() == page_map.count()
    return found


def agrees(sent: list[Sent]) -> None:
    found, expected = indexed(sent), model(sent)
    for page in range(RAM.size // PAGE):
        assert found.find(page) == expected.get(page, (0, 0)), page
    # The runs say the same, and cover the block.
    at = 0
    for first, count, kind, place in found.runs():
        assert (first, count > 0) == (at, True)
        assert (kind, place) == expected.get(first, (0, 0))
        at += count
    assert at == RAM.size // PAGE


@pytest.fixture(params=FEW, ids=str)
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, pages = request.param
    monkeypatch.setattr(page_index, "MOST_RUNS", runs)
    monkeypatch.setattr(page_index, "MOST_PAGES", pages)


CASES: dict[str, list[Sent]] = {
    "nothing": [],
    "once": [(PLAIN, 0, 40)],
    "rounds": [(PLAIN, 0, 40), (PLAIN, 5, 10), (PLAIN, 8, 20), (PLAIN, 9, 1)],
    "backwards": [(PLAIN, page, 1) for page in reversed(range(40))],
    "the same again": [(PLAIN, 7, 3)] * 9,
    "zero after normal": [(PLAIN, 0, 40), (ZERO, 3, 30), (ZERO, 39, 1)],
    "normal after zero": [(ZERO, 0, 40), (PLAIN, 3, 30), (PLAIN, 39, 1)],
    "to and fro": [(PLAIN, 0, 9), (ZERO, 2, 5), (PLAIN, 3, 2), (ZERO, 4, 1), (PLAIN, 4, 1), (ZERO, 3, 1)],
    "deltas": [(PLAIN, 0, 40), (DELTA, 4, 6), (PLAIN, 6, 2), (DELTA, 7, 1), (ZERO, 9, 1), (DELTA, 39, 1)],
    "gaps": [(PLAIN, 1, 1), (ZERO, 3, 2), (PLAIN, 38, 1)],
}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("case", CASES)
def test_the_last_copy_wins(case: str) -> None:
    agrees(CASES[case])


def test_what_is_last_in_each_case() -> None:
    """By hand, so that the model above is not all that there is."""
    found = indexed(CASES["zero after normal"])
    assert found.find(2) == (NORMAL, 100 + 8 + NAMED + 2 * 4104)
    assert found.find(3) == (ZERO | AGAIN, 0)
    found = indexed(CASES["normal after zero"])
    second = 100 + NAMED + 40 * 9
    assert found.find(2) == (ZERO, 0)
    assert found.find(32) == (NORMAL | AGAIN, second + 8 + NAMED + 29 * 4104)
    for number in (-1, 40):
        with pytest.raises(IndexError):
            found.find(number)
    found = indexed(CASES["deltas"])
    assert found.find(4) == (NORMAL | AGAIN | page_index.PACKED, 100 + NAMED + 40 * 4104)
    assert len(list(found.runs())) < 14


spans = st.integers(0, 39).flatmap(lambda first: st.tuples(st.just(first), st.integers(1, 40 - first)))
sends = st.lists(st.tuples(st.sampled_from([PLAIN, PLAIN, ZERO, DELTA]), spans).map(lambda one: (one[0], *one[1])))


@given(sends, st.sampled_from(FEW))
@settings(deadline=None, max_examples=300)
def test_any_order_of_pages(sent: list[Sent], few: tuple[int, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_index, "MOST_RUNS", few[0])
        patch.setattr(page_index, "MOST_PAGES", few[1])
        agrees(sent)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that writes the same pages again and again costs no more than once."""
    monkeypatch.setattr(page_index, "MOST_RUNS", 100)
    layers, most = page_index._Layers(), 0
    for record in records([(PLAIN, page % 40, 1) for page in range(0, 40 * 500, 7)]):
        assert isinstance(record, Pages)
        layers.add(record)
        most = max(most, len(layers._runs) // 3)
    assert most <= 2 * 40 + 100 + 1


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", ["live-10.0", "q35-7.2", "xbzrle-10.0"])
def test_what_is_thrown_away_makes_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(state(name)) as file:
        found = file.blocks
    monkeypatch.undo()
    with opened(state(name)) as file:
        assert file.blocks == found


# Real states


@pytest.mark.parametrize("name", GOOD)
def test_every_page(name: str) -> None:
    stream, walk = state(name), Walk(state(name))
    with opened(stream) as file:
        assert [block.block.name.decode() for block in file.blocks.values()] == list(walk.blocks)
        for block in file.blocks.values():
            for number in range(block.pages):
                kind, place = walk.last.get((block.block.name.decode(), number), (0, 0))
                if kind & page_index.PACKED:
                    with pytest.raises(LookupError, match="sent as a difference, or packed"):
                        file.page(block.block.name, number)
                    continue
                found = file.page(block.block.name, number)
                expected = stream[place : place + PAGE] if kind & NORMAL else bytes(PAGE) if kind else None
                assert found == expected, (block.block.text, number)
            for number in (-1, block.pages):
                with pytest.raises(IndexError):
                    file.page(block.block.name, number)
        with pytest.raises(KeyError):
            file.page(b"no.ram", 0)


@pytest.mark.parametrize("name", GOOD)
def test_a_survey_by_the_index(name: str) -> None:
    """All that vm-inspect shows but for pages that are the same, which only the pages themselves tell."""
    whole = survey(Pieces(state(name)))
    with opened(state(name)) as file:
        quick = survey_index(file)
    assert without_duplicates(quick.everything()) == without_duplicates(whole.everything())
    assert {block["duplicate"] for block in quick.values()["blocks"]} <= {None}
    assert quick.state.parts == whole.state.parts
    for one, other in zip(quick.maps, whole.maps, strict=True):
        assert one.kinds() == other.kinds()


def without_duplicates(values: dict[str, Any]) -> dict[str, Any]:
    blocks = [{name: value for name, value in block.items() if name != "duplicate"} for block in values["blocks"]]
    return {**values, "blocks": blocks}


def resent(name: str, more: bytes) -> bytes:
    """The state with more records before its last section of RAM ends."""
    stream = state(name)
    at = [record.offset for record in StateReader(Pieces(stream)) if isinstance(record, EndOfBody)][-1]
    return stream[:at] + more + stream[at:]


def test_pages_that_are_sent_again_in_a_real_state() -> None:
    name = "pc-10.0"
    with opened(state(name)) as file:
        ram = next(iter(file.blocks.values()))
    kinds = [ram.find(number)[0] for number in range(ram.pages)]
    full, second, third = [number for number, kind in enumerate(kinds) if kind == NORMAL][:3]
    empty, empty_too = [number for number, kind in enumerate(kinds) if kind == ZERO][:2]
    one, two = (random.Random(seed).randbytes(PAGE) for seed in (1, 2))

    def page(number: int, content: bytes | None) -> bytes:
        raw = memoryview(bytes(9 + len(ram.block.name)) + (b"\0" if content is None else content))
        return encode(Pages(ram.block, content is None, True, ((number * PAGE, 1),), PAGE, raw))

    more = [page(full, None), page(empty, one), page(second, one), page(second, two), page(empty_too, two)]
    more += [page(empty_too, None), page(third, None), page(third, one)]
    stream = resent(name, b"".join(more))
    with opened(stream) as file, opened(state(name)) as before:
        pages = {number: file.page(ram.block.name, number) for number in range(ram.pages)}
        changed = {full: bytes(PAGE), empty: one, second: two, empty_too: bytes(PAGE), third: one}
        for number, found in pages.items():
            assert found == changed.get(number, before.page(ram.block.name, number)), number
        assert file.blocks[ram.block.name].again == before.blocks[ram.block.name].again + len(more)
        assert file.blocks[ram.block.name].find(full) == (ZERO | AGAIN, 0)
        assert without_duplicates(survey_index(file).values()) == without_duplicates(survey(Pieces(stream)).values())


@pytest.mark.parametrize("cache", [0, 256 << 10, 32 << 20])
def test_reads_over_edges_and_a_bound_of_the_cache(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FRAME", 64 << 10)
    monkeypatch.setattr(reader, "GROUP", 3 * (64 << 10))
    monkeypatch.setattr(writer, "GROUP", 3 * (64 << 10))
    stream = state("q35-7.2")
    with opened(stream, cache) as file:
        assert len(file.pieces) > 8
        for edge in [*file.pieces, file.content]:
            for offset in (edge - PAGE, edge - PAGE + 1, edge - 1, edge):
                for count in (1, PAGE, 200_000):
                    if offset >= 0 and offset + count <= file.content:
                        assert file.read(offset, count) == stream[offset : offset + count]
            assert sum(map(len, file._frames.values())) <= max(cache, 2 * (64 << 10))
        assert file.read(0, file.content) == stream
        for offset, count in ((-1, 2), (file.content, 1), (0, file.content + 1)):
            with pytest.raises(IndexError):
                file.read(offset, count)


@pytest.mark.parametrize("window", [1, 7, 100])
def test_windows_make_no_difference(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on in the next window is one run, or two that say the same."""
    for name in ("live-7.2", "compress-7.2", "virtio-mem-10.0"):
        monkeypatch.undo()
        with opened(state(name)) as other:
            monkeypatch.setattr(page_index, "WINDOW", window)
        with opened(state(name)) as file:
            for key, block in file.blocks.items():
                same = other.blocks[key]
                assert [block.find(n) for n in range(block.pages)] == [same.find(n) for n in range(same.pages)]


def test_it_is_small() -> None:
    for name in ("q35-10.0", "virt-aarch64-7.2"):
        with opened(state(name)) as file:
            size = sum(
                len(data) for kind in (file_format.REC_STATE, file_format.REC_BLOCK) for data in file.records[kind]
            )
            assert size < 3000, name
            assert sum(len(block.starts) for block in file.blocks.values()) < 400


@pytest.mark.parametrize("name", ["live-7.2", "xbzrle-10.0", "virtio-mem-10.0"])
def test_it_needs_few_frames(name: str) -> None:
    """Head and devices, not RAM."""
    with opened(state(name)) as file:
        read: list[tuple[int, int]] = []
        read_one, file.read = file.read, lambda at, count: (read.append((at, count)), read_one(at, count))[1]  # type: ignore[method-assign]
        state_of(file)
        first, count = file.facts["devices"] if file.facts else (0, 0)
        assert all(at + size <= 200_000 or at >= first for at, size in read), read
        assert sum(size for _, size in read) < 200_000 + file.content - first


@pytest.mark.parametrize("name", ["live-7.2", "compress-7.2", "virtio-mem-10.0", "ignore-shared-10.0"])
def test_a_plain_state_has_the_same_index(name: str) -> None:
    with kept(state(name)) as fd, opened(state(name)) as other:
        file = RawFile(fd)
        assert (file.facts, file.blocks, file.content) == (other.facts, other.blocks, other.content)
        assert survey_index(file).values() == survey_index(other).values()
        for key, block in file.blocks.items():
            for n in range(block.pages):
                if not block.find(n)[0] & page_index.PACKED:
                    assert file.page(key, n) == other.page(key, n)


def test_without_an_index() -> None:
    with kept(pack(state("pc-7.2"), other=True)) as fd, pytest.raises(CannotDo, match="this .vmz has no index"):
        survey_index(VmzFile(fd))


def test_a_reader_of_a_part() -> None:
    content = state("pc-7.2")
    with opened(state("pc-7.2")) as file:
        for begin, end in ((0, None), (5, 6), (1000, 300_000), (len(content) - 1, None), (7, 7)):
            reader, found, view = file.reader(begin, end), bytearray(), memoryview(bytearray(50_000))
            while count := reader.readinto(view):
                found += view[:count]
            assert found == content[begin:end]


@given(st.lists(st.tuples(st.sampled_from([UNSENT, ZERO, NORMAL, ZERO | AGAIN, NORMAL | AGAIN, 9]), st.integers(1, 9))))
def test_pages_of_one_kind_are_found_together(runs: list[tuple[int, int]]) -> None:
    """One of a kind that there is not yet is left out neither."""
    kinds = b"".join(bytes((kind,)) * count for kind, count in runs)
    found = [same[0] for same in page_index.SAME.finditer(kinds)]
    assert b"".join(found) == kinds
    assert all(len(set(piece)) == 1 for piece in found)
    assert all(one[0] != other[0] or one[0] == 9 for one, other in pairwise(found))
