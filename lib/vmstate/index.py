"""Where in a stream the last copy of each guest page lies, as the index of a .vmz has it (docs/vmz.md)."""

import json
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import vmz
from .check import State
from .errors import Damaged
from .pages import AGAIN, NORMAL, PageMap
from .records import Block, Blocks, Description, Devices, Packed, Pages, Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Runs = NDArray[np.int64]

# A page that was sent last as a difference or packed by zlib: what lies there is the record, not the page.
PACKED = 8
# Pages that are looked at at once: 4 GiB of RAM
WINDOW = 1 << 20
# New runs, and pages in them, that are kept before they are laid over the old ones
MOST_RUNS, MOST_PAGES = 1 << 18, 1 << 22
BLOCK_HEAD = struct.Struct("<HQIQI")  # size of the name, of the block, of a page; pages sent again; runs


class Places:
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
        found = [(vmz.REC_STATE, vmz.pack(text))]
        for name, page_map in state.maps.items():
            found.append((vmz.REC_BLOCK, _block_record(page_map, self._blocks[name])))
        return found


# What of a State its index has as it is
FACTS = ("page", "commands", "sections", "rounds", "deltas", "packed", "background", "size", "runstate", "machine")


class _Layers:
    """The pages of one block that were sent with their content: runs of them, newer ones over older ones.

    A run is three numbers: its first page, how many pages, and where the first one's content lies, where a page's is
    `stride` bytes behind that of the one before it.  A packed page's place is negative.
    """

    def __init__(self) -> None:
        self.stride = 0
        self._old: Runs | None = None
        self._new = array("q")
        self._pages = 0

    def add(self, record: Pages) -> None:
        self.stride = record.stride
        place, page, new = record.offset + record.first, record.page, self._new
        for address, count in record.runs:
            new.extend((address // page, count, place))
            place += count * record.stride
        self._pages += record.count
        if len(new) > 3 * MOST_RUNS or self._pages > MOST_PAGES:
            self._settle()

    def add_packed(self, record: Packed) -> None:
        self.stride = self.stride or 8 + record.page
        self._new.extend((record.address // record.page, 1, -record.offset))
        self._pages += 1

    def _settle(self) -> None:
        """Lay the new runs over the old ones."""
        import numpy as np

        runs = self._all()
        pieces = [runs[:0]]
        for first in range(0, int((runs[:, 0] + runs[:, 1]).max(initial=0)), WINDOW):
            places = self._painted(runs, first, WINDOW)
            pieces.append(_runs_of(places, self.stride, first))
        self._old = np.concatenate(pieces)
        self._new, self._pages = array("q"), 0

    def _all(self) -> "Runs":
        import numpy as np

        new = np.frombuffer(self._new, np.int64).reshape(-1, 3)
        return new if self._old is None else np.concatenate((self._old, new))

    def places(self, first: int, count: int) -> "Runs":
        """Where each of `count` pages from `first` on lies; 0 where none was sent."""
        return self._painted(self._all(), first, count)

    def _painted(self, runs: "Runs", first: int, size: int) -> "Runs":
        import numpy as np

        begin = np.maximum(runs[:, 0], first)
        end = np.minimum(runs[:, 0] + runs[:, 1], first + size)
        some = begin < end
        place = (runs[:, 2] + (begin - runs[:, 0]) * self.stride)[some]
        begin, counts = begin[some], (end - begin)[some]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        painted = np.zeros(size, np.int64)
        # Of several copies of a page the last one stays.
        painted[np.repeat(begin - first, counts) + inside] = np.repeat(place, counts) + inside * self.stride
        return painted


def _runs_of(places: "Runs", stride: int, first: int) -> "Runs":
    """The runs of the pages that lie somewhere."""
    import numpy as np

    begins = np.flatnonzero(np.concatenate(([True], np.diff(places) != stride)) | (places <= 0))
    counts = np.diff(np.append(begins, len(places)))
    some = places[begins] != 0
    return np.stack((begins[some] + first, counts[some], places[begins[some]]), axis=1)


def _block_record(page_map: PageMap, layers: _Layers) -> bytes:
    """Name and facts of a block; then, as one frame, columns: length and kind of each run, and a jump for each run of
    pages whose content lies somewhere: how far behind the last one's end."""
    import numpy as np

    counts, kinds, jumps, end = [], [], [], 0
    for first in range(0, page_map.pages, WINDOW):
        kind = np.frombuffer(page_map.kinds(first, WINDOW), np.uint8)
        places = layers.places(first, len(kind))
        there = kind & NORMAL != 0
        kind = kind | np.where(there & (places < 0), PACKED, 0).astype(np.uint8)
        places = np.where(there, np.abs(places), 0)
        goes_on = ~there[1:] | ((np.diff(places) == layers.stride) & (kind[1:] & PACKED == 0))
        begins = np.flatnonzero(np.concatenate(([True], (np.diff(kind) != 0) | ~goes_on)))
        lengths = np.diff(np.append(begins, len(kind)))
        placed = there[begins]
        starts, ends = places[begins[placed]], places[begins[placed]] + lengths[placed] * layers.stride
        jumps.append(starts - np.concatenate(([end], ends[:-1])))
        end = int(ends[-1]) if len(ends) else end
        counts.append(lengths.astype("<u4"))
        kinds.append(kind[begins])
    name = page_map.block.name
    number = sum(map(len, counts))
    head = BLOCK_HEAD.pack(len(name), page_map.block.size, page_map.page, page_map.again, number) + name
    columns = [np.concatenate(column) for column in (counts, kinds, jumps)]
    return head + vmz.pack(b"".join((columns[0].tobytes(), columns[1].tobytes(), columns[2].astype("<i8").tobytes())))


@dataclass(frozen=True)
class BlockIndex:
    """The pages of a block: `page` bytes each, in runs.

    starts: the first page of each run.  kinds: as in `pages`, with PACKED.  places: where the content of a run's first
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
        columns = vmz.unpack(data[behind:], vmz.INDEX_LIMIT, offset)
        counts, kinds = vmz.numbers(columns[: 4 * count]), columns[4 * count : 5 * count]
        jumps = vmz.numbers(columns[5 * count :], "q")
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
    found = [parse_block(data, offset) for data in records.get(vmz.REC_BLOCK, ())]
    return {block.block.name: block for block in found}


def parse_facts(records: dict[int, list[bytes]], offset: int) -> dict[str, Any] | None:
    """What the index says of the state; None where there is no index.  Damaged where it cannot be read."""
    if vmz.REC_STATE not in records:
        return None
    try:
        facts = json.loads(vmz.unpack(records[vmz.REC_STATE][0], vmz.INDEX_LIMIT, offset))
        if not isinstance(facts, dict) or not {*FACTS, "early", "devices", "description"} <= facts.keys():
            raise ValueError("something is missing")
    except ValueError as error:
        raise Damaged(f"end record at offset {offset}: its facts about the state cannot be read: {error}") from error
    return facts
