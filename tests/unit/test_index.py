"""The index of a .vmz: every page where it was last, and the same facts as in the whole stream."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmstate import index, layout, vmz
from vmstate.check import State
from vmstate.errors import CannotDo
from vmstate.index import PACKED, BlockIndex, Places
from vmstate.pages import AGAIN, NORMAL, ZERO, PageMap
from vmstate.reader import StateReader
from vmstate.records import Block, Blocks, Pages
from vmstate.records import Packed as PackedPage
from vmstate.statefile import RawFile, state_of
from vmstate.survey import survey, survey_index

from unit.packed import kept, opened, pack
from unit.streams import GOOD, Pieces, state

PAGE = 4096
DIFFERENCE = "a difference"
Last = dict[tuple[bytes, int], bytes | str]


@functools.cache
def packed(name: str) -> bytes:
    return pack(state(name))


@functools.cache
def last_copies(name: str) -> tuple[Last, Counter[tuple[bytes, int]]]:
    """What became of each page, told from the records of the stream: its content, and how often it was sent."""
    found: Last = {}
    sent: Counter[tuple[bytes, int]] = Counter()
    for record in StateReader(Pieces(state(name))):
        if isinstance(record, Pages):
            addresses = [first + record.page * n for first, count in record.runs for n in range(count)]
            for n, address in enumerate(addresses):
                at = record.first + n * record.stride
                place = record.block.name, address // record.page
                found[place] = bytes(record.page) if record.zero else bytes(record.raw[at : at + record.page])
                sent[place] += 1
        elif isinstance(record, PackedPage):
            place = record.block.name, record.address // record.page
            found[place] = DIFFERENCE
            sent[place] += 1
    return found, sent


# Every page of real states


@pytest.mark.parametrize("name", GOOD)
def test_every_page(name: str) -> None:
    last, sent = last_copies(name)
    with opened(packed(name)) as file:
        for block in file.blocks.values():
            for number in range(block.pages):
                place = block.block.name, number
                if last.get(place) == DIFFERENCE:
                    with pytest.raises(LookupError, match=f"page {number} of .* was sent as a difference, or packed"):
                        file.page(*place)
                else:
                    content = file.page(*place)
                    assert (None if content is None else bytes(content)) == last.get(place), place
                kind, _ = block.find(number)
                assert bool(kind & AGAIN) == (sent[place] > 1), place
            for number in (-1, block.pages):
                with pytest.raises(IndexError):
                    file.page(block.block.name, number)
        with pytest.raises(KeyError):
            file.page(b"no such block", 0)
        assert all(number < file.blocks[block].pages for block, number in last)


def test_the_states_have_what_is_to_be_shown() -> None:
    """Pages sent again, differences, packed ones, and such that are missing."""
    kinds = Counter(kind for name in GOOD for kind in all_kinds(name))
    wanted = [0, ZERO, NORMAL, NORMAL | AGAIN, NORMAL | PACKED, NORMAL | AGAIN | PACKED]
    assert all(kinds[kind] for kind in wanted), kinds
    for name, least in (("live-7.2", 3), ("live-10.0", 3), ("xbzrle-7.2", 3)):
        assert max(last_copies(name)[1].values()) >= least
    with opened(packed("live-10.0")) as file:
        assert len(file.blocks) > 3


def all_kinds(name: str) -> list[int]:
    with opened(packed(name)) as file:
        return [kind for block in file.blocks.values() for _, _, kind, _ in block.runs()]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(("runs", "pages"), [(1, 1 << 23), (1 << 18, 1), (20, 100)])
def test_merging_makes_no_difference(name: str, runs: int, pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MOST_RUNS", runs)
    monkeypatch.setattr(index, "MOST_PAGES", pages)
    assert pack(state(name)) == packed(name)


@pytest.mark.parametrize("window", [1, 7, 100])
def test_windows_make_no_difference(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on in the next window is one run, or two that say the same."""
    monkeypatch.setattr(index, "WINDOW", window)
    for name in ("live-7.2", "compress-7.2", "virtio-mem-10.0"):
        with opened(pack(state(name))) as file, opened(packed(name)) as other:
            for key, block in file.blocks.items():
                same = other.blocks[key]
                assert [block.find(n) for n in range(block.pages)] == [same.find(n) for n in range(same.pages)]


def test_it_is_small() -> None:
    for name in ("q35-10.0", "virt-aarch64-7.2"):
        with opened(packed(name)) as file:
            size = sum(len(data) for kind in (vmz.REC_STATE, vmz.REC_BLOCK) for data in file.records[kind])
            assert size < 3000, name
            assert sum(len(block.starts) for block in file.blocks.values()) < 400


# The state as the index has it


@pytest.mark.parametrize("name", GOOD)
def test_the_survey_is_that_of_the_whole_stream(name: str) -> None:
    whole = survey(Pieces(state(name)))
    with opened(packed(name)) as file:
        found = survey_index(file)
        expected, values = whole.everything(), found.everything()
        for block in values["blocks"]:
            assert block.pop("duplicate") is None
        for block in expected["blocks"]:
            assert block.pop("duplicate") is not None
        assert values == expected
        assert found.how() == whole.how()
        # To the last page
        for one, other in zip(found.maps, whole.maps, strict=True):
            assert (one.block.name, one.block.size, one.page) == (other.block.name, other.block.size, other.page)
            assert one.kinds() == other.kinds()
            assert (one.again, one.covered, one.first_unsent()) == (other.again, other.covered, other.first_unsent())
        one, other = found.state, whole.state
        assert {**vars(one), "maps": None} == {**vars(other), "maps": None}


@pytest.mark.parametrize("name", ["live-7.2", "xbzrle-10.0", "virtio-mem-10.0"])
def test_it_needs_few_frames(name: str) -> None:
    """Head and devices, not RAM."""
    with opened(packed(name)) as file:
        read: list[tuple[int, int]] = []
        read_one, file.read = file.read, lambda at, count: (read.append((at, count)), read_one(at, count))[1]  # type: ignore[method-assign]
        state_of(file)
        first, count = file.facts["devices"] if file.facts else (0, 0)
        assert all(at + size <= 200_000 or at >= first for at, size in read), read
        assert sum(size for _, size in read) < 200_000 + file.content - first


@pytest.mark.parametrize("name", ["live-7.2", "compress-7.2", "virtio-mem-10.0", "ignore-shared-10.0"])
def test_a_plain_state_has_the_same_index(name: str) -> None:
    with kept(state(name)) as fd, opened(packed(name)) as other:
        file = RawFile(fd)
        assert (file.facts, file.blocks, file.content) == (other.facts, other.blocks, other.content)
        assert survey_index(file).values() == survey_index(other).values()
        for key, block in file.blocks.items():
            for n in range(block.pages):
                if not block.find(n)[0] & PACKED:
                    assert file.page(key, n) == other.page(key, n)


def test_without_an_index() -> None:
    with opened(pack(state("pc-7.2"), other=True)) as file, pytest.raises(CannotDo, match="this .vmz has no index"):
        survey_index(file)


def test_a_reader_of_a_part() -> None:
    content = state("pc-7.2")
    with opened(packed("pc-7.2")) as file:
        for begin, end in ((0, None), (5, 6), (1000, 300_000), (len(content) - 1, None), (7, 7)):
            reader, found, view = file.reader(begin, end), bytearray(), memoryview(bytearray(50_000))
            while count := reader.readinto(view):
                found += view[:count]
            assert found == content[begin:end]


# Any order in which pages can come

BLOCKS = (Block(b"one", 40 * PAGE), Block(b"two", 64 * PAGE - 100))
Sent = tuple[int, str, list[tuple[int, int]]]


@st.composite
def sendings(draw: st.DrawFn) -> list[Sent]:
    """Of which block, what, and the runs: first page and number of pages."""
    found = []
    for _ in range(draw(st.integers(0, 25))):
        block, what = draw(st.integers(0, 1)), draw(st.sampled_from(["normal", "normal", "zero", "delta"]))
        pages, runs = (40, 64)[block], []
        for _ in range(1 if what == "delta" else draw(st.integers(1, 3))):
            first = draw(st.integers(0, pages - 1))
            runs.append((first, 1 if what == "delta" else draw(st.integers(1, pages - first))))
        found.append((block, what, runs))
    return found


class Model:
    """What is known of each page without any runs."""

    def __init__(self) -> None:
        self.places = Places()
        self.maps = [PageMap(block, PAGE) for block in BLOCKS]
        self.pages: dict[tuple[int, int], tuple[int, int]] = {}
        self.at = 100
        self.places.see(Blocks(0, BLOCKS, offset=10))

    def send(self, number: int, what: str, runs: list[tuple[int, int]]) -> None:
        block, zero = BLOCKS[number], what == "zero"
        if what == "delta":
            first = runs[0][0]
            record = PackedPage(block, layout.RAM_SAVE_FLAG_XBZRLE, False, first * PAGE, b"x", offset=self.at)
            self.places.see(record)
            self.put(number, first, NORMAL | PACKED, self.at)
            self.at += 20
            return
        spans = tuple((first * PAGE, count) for first, count in runs)
        pages = Pages(block, zero, True, spans, PAGE, memoryview(b""), offset=self.at)
        self.places.see(pages)
        place = self.at + pages.first
        for first, count in runs:
            for page in range(first, first + count):
                self.put(number, page, ZERO if zero else NORMAL, 0 if zero else place)
                place += pages.stride
        self.at = place + 7

    def put(self, number: int, page: int, kind: int, place: int) -> None:
        again = AGAIN if (number, page) in self.pages else 0
        self.pages[number, page] = kind | again, place
        self.maps[number].mark(page * PAGE, 1, kind == ZERO)

    def blocks(self) -> list[BlockIndex]:
        made = State(maps={page_map.block.name: page_map for page_map in self.maps})
        records: dict[int, list[bytes]] = {}
        for kind, data in self.places.records(made):
            records.setdefault(kind, []).append(data)
        return list(index.parse_blocks(records, 0).values())


@given(sendings(), st.sampled_from([1, 3, 1 << 18]), st.sampled_from([1, 50, 1 << 23]), st.sampled_from([5, 1 << 20]))
@settings(deadline=None, max_examples=150)
def test_pages_in_any_order(sent: list[Sent], runs: int, pages: int, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MOST_RUNS", runs)
        patch.setattr(index, "MOST_PAGES", pages)
        patch.setattr(index, "WINDOW", window)
        model = Model()
        for one in sent:
            model.send(*one)
        blocks = model.blocks()
    for number, block in enumerate(blocks):
        assert (block.block, block.page, block.again) == (BLOCKS[number], PAGE, model.maps[number].again)
        assert [block.find(n) for n in range(block.pages)] == [
            model.pages.get((number, n), (0, 0)) for n in range(block.pages)
        ]
        assert block.page_map().kinds() == model.maps[number].kinds()
        assert sum(count for _, count, _, _ in block.runs()) == block.pages


def test_neighbours_are_one_run() -> None:
    model = Model()
    for first in range(0, 30, 10):
        runs = ((first * PAGE, 10),)
        model.places.see(Pages(BLOCKS[0], False, first == 0, runs, PAGE, memoryview(b""), offset=model.at))
        model.maps[0].mark(first * PAGE, 10, False)
        model.at += 10 * (8 + PAGE) + (4 if first == 0 else 0)
    one, two = model.blocks()
    assert list(one.runs()) == [(0, 30, NORMAL, 100 + 8 + 4), (30, 10, 0, 0)]
    assert list(two.runs()) == [(0, 64, 0, 0)]


def test_what_lies_over_others_does_not_grow() -> None:
    """A guest that writes to the same pages for hours has an index that is no larger."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "MOST_RUNS", 50)
        model, most = Model(), 0
        for round_ in range(3000):
            model.send(0, "normal", [(round_ % 40, 1)])
            most = max(most, len(model.places._blocks[b"one"]._runs) // 3)
        assert most <= 40 + 2 * 50
        (one, _) = model.blocks()
        assert [one.find(n) for n in range(40)] == [model.pages[0, n] for n in range(40)]
