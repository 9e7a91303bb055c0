"""Where in a stream the last copy of each guest page lies, as the index of a .vmz has it (docs/vmz.md)."""

import json
import re
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import Damaged
from ..stream.page_map import AGAIN, NORMAL, PageMap
from ..stream.records import Block, Blocks, Description, Devices, Packed, Pages, Record
from ..stream.validate import State
from . import file_format, writer

# A page that was sent last as a difference or packed by zlib: what lies there is the record, not the page.
PACKED = 8
# Pages that are looked at at once: 4 GiB of RAM
WINDOW = 1 << 20
# Pages of one kind, one behind the other; written out it is twenty times as fast as (.)\1*.
SAME = re.compile(rb"\x00+|\x01+|\x02+|\x05+|\x06+|.", re.DOTALL)
# Runs, and pages in them, that are kept before those are thrown away over which others lie
MOST_RUNS, MOST_PAGES = 1 << 18, 1 << 23
BLOCK_HEAD = struct.Struct("<HQIQI")  # size of the name, of the block, of a page; pages sent again; runs


class PageIndexBuilder:
    """`see` every record of a state; then `records` are those of the index."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, _Layers] = {}
        self._spans: dict[str, Any] = {"early": [], "devices": None, "description": None}

    def see(self, record: Record) -> None:
        if isinstance(record, Pages):
            if not record.zero:
                self._blocks[record.block.name].add(record)
        elif isinstance(record, Packed):
            self._blocks[record.block.name].add_packed(record)
        elif isinstance(record, Blocks):
            self._blocks = {block.name: _Layers() for block in record.blocks}
        elif isinstance(record, Devices):
            span = [record.offset, len(record.data)]
            if record.early:
                self._spans["early"].append(span)
            else:
                self._spans["devices"] = span
        elif isinstance(record, Description):
            self._spans["description"] = [record.offset, len(record.data)]

    def records(self, state: State) -> list[tuple[int, bytes]]:
        """The records of the index, kind and content of each."""
        facts = {name: getattr(state, name) for name in FACTS}
        text = json.dumps({**facts, **self._spans}, separators=(",", ":")).encode()
        found = [(file_format.REC_STATE, writer.pack(text))]
        for name, page_map in state.maps.items():
            found.append((file_format.REC_BLOCK, _block_record(page_map, self._blocks[name])))
        return found


# What of a State its index has as it is
FACTS = ("page", "commands", "sections", "rounds", "deltas", "packed", "background", "size", "runstate", "machine")


class _Layers:
    """The pages of one block that were sent with their content: runs of them, newer ones over older ones.

    A run is three numbers: its first page, how many pages, and where the first one's content lies, where a page's is
    `stride` bytes behind that of the one before it.  A packed page's place is negative.
    """

    def __init__(self) -> None:
        self._runs = array("q")
        # Runs and pages that may lie over others
        self._loose = self._pages = 0

    def add(self, record: Pages) -> None:
        place, page, runs = record.offset + record.first, record.page, self._runs
        for address, count in record.runs:
            runs.extend((address // page, count, place))
            place += count * record.stride
        self._grown(len(record.runs), record.count, 8 + page)

    def add_packed(self, record: Packed) -> None:
        self._runs.extend((record.address // record.page, 1, -record.offset))
        self._grown(1, 1, 8 + record.page)

    def _grown(self, runs: int, pages: int, stride: int) -> None:
        self._loose += runs
        self._pages += pages
        if self._loose > MOST_RUNS or self._pages > MOST_PAGES:
            last = self.last(stride)
            self._runs = array("q")
            for run in last:
                self._runs.extend(run)
            # Twice as many as there were, so that this is not done again and again.
            self._loose, self._pages = -len(last), -sum(count for _, count, _ in last)

    def last(self, stride: int) -> list[tuple[int, int, int]]:
        """Where the last copy of each page lies: runs that do not lie over each other, by their first pages."""
        runs, covered, found = self._runs, bytearray(), []
        for at in range(len(runs) - 3, -3, -3):
            start, count, place = runs[at : at + 3]
            end = start + count
            if end > len(covered):
                covered.extend(bytes(end - len(covered)))
            while (start := covered.find(0, start, end)) >= 0:
                behind = covered.find(1, start, end)
                behind = end if behind < 0 else behind
                found.append((start, behind - start, place + (start - end + count) * stride if place > 0 else place))
                covered[start:behind] = b"\1" * (behind - start)
                start = behind
        found.sort()
        return found


def _block_record(page_map: PageMap, layers: _Layers) -> bytes:
    """Name and facts of a block; then, as one frame, columns: length and kind of each run, and a jump for each run of
    pages whose content lies somewhere: how far behind the last one's end."""
    stride = 8 + page_map.page
    counts, kinds, jumps, end = array("I"), bytearray(), array("q"), 0
    for count, kind, place in _runs(page_map, layers.last(stride)):
        # Neighbours that lie one behind the other are one run.
        if kind & NORMAL and kinds and kinds[-1] == kind and place == end and not kind & PACKED:
            counts[-1] += count
        else:
            counts.append(count)
            kinds.append(kind)
            if kind & NORMAL:
                jumps.append(place - end)
        if kind & NORMAL:
            end = place + count * stride
    name = page_map.block.name
    head = BLOCK_HEAD.pack(len(name), page_map.block.size, page_map.page, page_map.again, len(counts)) + name
    return head + writer.pack(file_format.packed(counts) + bytes(kinds) + file_format.packed(jumps))


def _runs(page_map: PageMap, last: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Length, kind and place of runs that cover the block; place 0 for pages that have no content."""
    stride, number = 8 + page_map.page, 0
    for first in range(0, page_map.pages, WINDOW):
        for same in SAME.finditer(page_map.kinds(first, WINDOW)):
            at, end, kind = first + same.start(), first + same.end(), same[0][0]
            if not kind & NORMAL:
                yield end - at, kind, 0
                continue
            while at < end:
                while last[number][0] + last[number][1] <= at:
                    number += 1
                start, count, place = last[number]
                behind = min(end, start + count)
                yield behind - at, kind | (PACKED if place < 0 else 0), abs(place) + (at - start) * stride
                at = behind


class BlockIndex(NamedTuple):
    """The pages of a block: `page` bytes each, in runs.

    starts: the first page of each run.  kinds: `page_map`'s, and PACKED.  places: where the content of a run's first
    page lies, 0 where it has none.
    """

    block: Block
    page: int
    again: int
    starts: "array[int]"
    kinds: bytes
    places: "array[int]"

    @property
    def pages(self) -> int:
        return -(-self.block.size // self.page)

    def find(self, number: int) -> tuple[int, int]:
        """What page `number` is, and where its content lies."""
        if not 0 <= number < self.pages:
            raise IndexError(f"page {number} of {self.pages}")
        run = bisect_right(self.starts, number) - 1
        kind = self.kinds[run]
        return kind, self.places[run] + (number - self.starts[run]) * (8 + self.page) if kind & NORMAL else 0

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """First page, number of pages, kind and place of each run."""
        for number, start in enumerate(self.starts):
            end = self.starts[number + 1] if number + 1 < len(self.starts) else self.pages
            yield start, end - start, self.kinds[number], self.places[number]

    def page_map(self) -> PageMap:
        found = PageMap(self.block, self.page)
        for start, count, kind, _ in self.runs():
            if kind:
                found.mark(start * self.page, count, not kind & NORMAL)
                if kind & AGAIN:
                    found.mark(start * self.page, count, not kind & NORMAL)
        found.again = self.again
        return found


def parse_block(data: bytes, offset: int) -> BlockIndex:
    """A block's record; `offset` is that of the end record, for messages."""
    try:
        length, size, page, again, count = BLOCK_HEAD.unpack_from(data)
        behind = BLOCK_HEAD.size + length
        columns = file_format.unpack(data[behind:], file_format.INDEX_LIMIT, offset)
        counts, kinds = file_format.numbers(columns[: 4 * count]), columns[4 * count : 5 * count]
        jumps = file_format.numbers(columns[5 * count :], "q")
        if not page or sum(counts) != -(-size // page) or len(jumps) != sum(kind & NORMAL != 0 for kind in kinds):
            raise ValueError("its runs do not cover the block")
        starts, places = array("Q"), array("Q")
        start = end = at = 0
        for length, kind in zip(counts, kinds, strict=True):
            place = 0
            if kind & NORMAL:
                place = end + jumps[at]
                at, end = at + 1, place + length * (8 + page)
            starts.append(start)
            places.append(place)
            start += length
    except (struct.error, ValueError, OverflowError) as error:
        raise Damaged(f"end record at offset {offset}: its index cannot be read: {error}") from error
    name = data[BLOCK_HEAD.size : behind]
    return BlockIndex(Block(name, size), page, again, starts, kinds, places)


def parse_blocks(records: dict[int, list[bytes]], offset: int) -> dict[bytes, BlockIndex]:
    """The RAM blocks of an end record at `offset`, by name."""
    found = [parse_block(data, offset) for data in records.get(file_format.REC_BLOCK, ())]
    return {block.block.name: block for block in found}


def parse(
    tally: file_format.FileTally, records: dict[int, list[bytes]]
) -> tuple[dict[str, Any] | None, dict[bytes, BlockIndex]]:
    """The facts about the state, and its blocks, of a file whose end record is known; (None, {}) where it has no index.

    Damaged where it has none, though it is said to hold a state.
    """
    facts, blocks = parse_facts(records, tally.offset), parse_blocks(records, tally.offset)
    if not tally.flags & file_format.OTHER_BYTES and not (facts and blocks):
        raise Damaged(f"end record at offset {tally.offset}: the index of the state is missing")
    return facts, blocks


def parse_facts(records: dict[int, list[bytes]], offset: int) -> dict[str, Any] | None:
    """What the index says of the state; None where there is no index.  Damaged where it cannot be read."""
    if file_format.REC_STATE not in records:
        return None
    try:
        facts = json.loads(file_format.unpack(records[file_format.REC_STATE][0], file_format.INDEX_LIMIT, offset))
        if not isinstance(facts, dict) or not {*FACTS, "early", "devices", "description"} <= facts.keys():
            raise ValueError("something is missing")
    except ValueError as error:
        raise Damaged(f"end record at offset {offset}: its facts about the state cannot be read: {error}") from error
    return facts
