"""A number of 64 bits for the content of each page, by which pages are found to be the same.

The numbers are of no use against whoever wants two pages to look the same; two that differ by chance do so here with
one chance in 2 to the 64.
"""

import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Damaged
from ..stream import constants, page_map
from ..stream.page_map import AGAIN, CHUNK, PageMap
from ..stream.records import Packed, Pages, Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.uint64]

SEED = 0x766D7374
# How a page is drawn and counted
UNSENT, ZERO, PLAIN, DUPLICATE, REWRITTEN = range(5)
# By the values of PageMap.kinds
_KINDS = np.zeros(256, np.uint8)
_KINDS[[page_map.ZERO, page_map.ZERO | AGAIN]] = ZERO
_KINDS[[page_map.NORMAL, page_map.NORMAL | AGAIN]] = PLAIN


class Fingerprints:
    """`see` every record of a state; then numbers by block and page, 0 for a page that is zero or was not sent."""

    def __init__(self) -> None:
        self._chunks: dict[bytes, dict[int, Numbers]] = {}
        self._factors: dict[int, Numbers] = {}

    def see(self, record: Record) -> None:
        if isinstance(record, Pages):
            numbers = None if record.zero else self._numbers(_content(record))
            at = 0
            for address, count in record.runs:
                part = None if numbers is None else numbers[at : at + count]
                self._put(record.block.name, address // record.page, count, part)
                at += count
        elif isinstance(record, Packed):
            self._see_packed(record)

    def of(self, page_map: PageMap) -> "Numbers":
        """The numbers of all pages of a block."""
        chunks = self._chunks.get(page_map.block.name, {})
        empty = np.zeros(CHUNK, np.uint64)
        pieces = [chunks.get(number, empty) for number in range(-(-page_map.pages // CHUNK))]
        return np.concatenate(pieces)[: page_map.pages] if pieces else empty[:0]

    def pieces(self) -> Iterator[tuple[bytes, "NDArray[np.uint32]", "Numbers"]]:
        """Block, page numbers and fingerprints of the pages that are not zero, in the order of blocks and addresses."""
        for name, chunks in self._chunks.items():
            for number in sorted(chunks):
                places = np.flatnonzero(chunks[number])
                yield name, (places + number * CHUNK).astype(np.uint32), chunks[number][places]

    def _see_packed(self, record: Packed) -> None:
        page = record.page
        index = record.address // page
        if record.flag == constants.RAM_SAVE_FLAG_COMPRESS_PAGE:
            content = np.frombuffer(_inflated(record, page), np.uint64)[None, :]
        else:
            # What it was and what changed stand for what it is.
            before = self._chunks.get(record.block.name, {}).get(index // CHUNK)
            old = 0 if before is None else int(before[index % CHUNK])
            data = old.to_bytes(8, "little") + record.data
            content = np.frombuffer(data + b"\0" * (-len(data) % 8), np.uint64)[None, :]
        self._put(record.block.name, index, 1, self._numbers(content.copy()))

    def _put(self, name: bytes, index: int, count: int, numbers: "Numbers | None") -> None:
        chunks = self._chunks.setdefault(name, {})
        done = 0
        while done < count:
            number, at = divmod(index + done, CHUNK)
            size = min(count - done, CHUNK - at)
            if number not in chunks and numbers is not None:
                chunks[number] = np.zeros(CHUNK, np.uint64)
            if number in chunks:
                chunks[number][at : at + size] = 0 if numbers is None else numbers[done : done + size]
            done += size

    def _numbers(self, content: "Numbers") -> "Numbers":
        """Of each row of words; the words are used up."""
        width = content.shape[1]
        if width not in self._factors:
            random = np.random.Generator(np.random.PCG64(SEED + width))
            self._factors[width] = random.integers(0, 1 << 63, width, np.uint64) * np.uint64(2) + np.uint64(1)
        content ^= content >> np.uint64(29)
        content *= self._factors[width]
        content ^= content >> np.uint64(32)
        numbers: Numbers = content.sum(axis=1, dtype=np.uint64)
        numbers[numbers == 0] = 1
        return numbers


def _content(record: Pages) -> "Numbers":
    """The content of the pages, a row each."""
    rows = np.ndarray(
        (record.count, record.page), np.uint8, record.raw, offset=record.first, strides=(record.stride, 1)
    )
    return np.ascontiguousarray(rows).view(np.uint64)


def _inflated(record: Packed, page: int) -> bytes:
    try:
        data = zlib.decompressobj().decompress(record.data, page)
    except zlib.error as error:
        raise Damaged(f"packed page at offset {record.offset}: {error}") from error
    if len(data) != page:
        raise Damaged(f"packed page at offset {record.offset}: expected {page} bytes, found {len(data)}")
    return data


def kinds(maps: list[PageMap], prints: Fingerprints | None) -> dict[bytes, "NDArray[np.uint8]"]:
    """For each block what each page is: UNSENT, ZERO, PLAIN, DUPLICATE (an earlier page is the same), REWRITTEN.

    Without fingerprints none is a duplicate.
    """
    sent = {page_map.block.name: np.frombuffer(page_map.kinds(), np.uint8) for page_map in maps}
    found = {name: _KINDS[values] for name, values in sent.items()}
    pieces = list(prints.pieces()) if prints else []
    same = _repeated([numbers for _, _, numbers in pieces])
    for name, places, numbers in pieces:
        found[name][places[same[: len(numbers)]]] = DUPLICATE
        same = same[len(numbers) :]
    for name, values in sent.items():
        found[name][values & AGAIN != 0] = REWRITTEN
    return found


def _repeated(pieces: "list[Numbers]") -> "NDArray[np.bool_]":
    """Which of all numbers have come before."""
    joined = np.concatenate(pieces) if pieces else np.zeros(0, np.uint64)
    order = np.argsort(joined, kind="stable")
    joined = joined[order]
    same = np.zeros(len(order), bool)
    same[order[1:][joined[1:] == joined[:-1]]] = True
    return same


def differing(one: "Numbers", other: "Numbers") -> list[tuple[int, int]]:
    """First page and number of pages, of each run of pages that differ."""
    size = max(len(one), len(other))
    padded = [
        np.concatenate((part, np.full(size - len(part), fill, np.uint64))) for part, fill in ((one, 2), (other, 3))
    ]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], padded[0] != padded[1], [False])).astype(np.int8)))
    return [(int(begin), int(end - begin)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
