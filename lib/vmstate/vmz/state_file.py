"""A whole state in a file that can seek: any page, any bytes of the stream, and what is in it without its pages."""

import os
from abc import ABC, abstractmethod
from array import array
from functools import cached_property
from typing import Any

from ..errors import CannotDo, Damaged
from ..io.readers import FdReader, Reader
from ..stream.description import UNREADABLE
from ..stream.page_map import NORMAL
from ..stream.reader import StateReader
from ..stream.records import Blocks, Description, Devices, Footer, Packed, Pages, Record
from ..stream.validate import State, Validator, take_devices, validate
from . import page_index

# What a file that is not packed is read by
PIECE = 192 << 10


class _Head:
    """`see` records from the first one on; `records` are those up to the footer of RAM's START, but for pages."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.whole = False
        self._listed = False

    def see(self, record: Record) -> None:
        if self.whole or isinstance(record, Pages | Packed):
            return
        self.records.append(record)
        self._listed |= isinstance(record, Blocks)
        self.whole = self._listed and isinstance(record, Footer)


class StateFile(ABC):
    """blocks: where the pages of each RAM block lie.  content: bytes of the stream.  facts: of the state; None where
    there is no index.  pieces: where in the stream each piece begins that is read, or unpacked, at once."""

    blocks: dict[bytes, page_index.BlockIndex]
    content: int
    facts: dict[str, Any] | None
    pieces: "array[int]"
    _zero = memoryview(bytes(64 << 10))

    def read(self, offset: int, count: int) -> memoryview:
        """`count` bytes of the stream; IndexError where there are not so many, Damaged."""
        if offset < 0 or offset + count > self.content:
            raise IndexError(f"bytes {offset} to {offset + count} of {self.content}")
        return self._read(offset, count)

    @abstractmethod
    def _read(self, offset: int, count: int) -> memoryview:
        """The same, of bytes that are there."""

    def page(self, name: bytes, number: int) -> memoryview | None:
        """Page `number` of the RAM block `name` as it was last; None where it was never sent.

        Raises KeyError and IndexError where there is none, LookupError where it was sent as a difference only, Damaged.
        """
        block = self.blocks[name]
        kind, place = block.find(number)
        if kind & page_index.PACKED:
            raise LookupError(f"page {number} of {block.block.text!r} was sent as a difference, or packed")
        if kind & NORMAL:
            return self.read(place, block.page)
        return self._zero[: block.page] if kind else None

    @cached_property
    def head_records(self) -> list[Record]:
        """The records of a state up to the footer of RAM's START, but for pages; read once.  Damaged."""
        head = _Head()
        for record in StateReader(self.reader(0)):
            head.see(record)
            if head.whole:
                return head.records
        raise Damaged("no section of RAM in the state")

    def reader(self, offset: int, end: int | None = None) -> Reader:
        """The content from `offset` on, up to `end`, as a `Reader`."""
        return _Part(self, offset, self.content if end is None else end)


class RawFile(StateFile):
    """A plain state in the file that `fd` stands at the beginning of; it is read once, and judged, for its index."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._base = os.lseek(fd, 0, os.SEEK_CUR)
        builder, head = page_index.PageIndexBuilder(), _Head()

        def see(record: Record) -> None:
            builder.see(record)
            if not head.whole:
                head.see(record)

        state = validate(FdReader(fd), see=see)
        self.head_records = head.records
        # Whoever reads it as a whole after all begins at its beginning.
        os.lseek(fd, self._base, os.SEEK_SET)
        records: dict[int, list[bytes]] = {}
        for kind, data in builder.records(state):
            records.setdefault(kind, []).append(data)
        self.facts = page_index.parse_facts(records, 0)
        self.blocks = page_index.parse_blocks(records, 0)
        self.content = state.size
        self.pieces = array("Q", range(0, self.content, PIECE))

    def _read(self, offset: int, count: int) -> memoryview:
        data = os.pread(self._fd, count, self._base + offset)
        if len(data) < count:
            raise Damaged(f"truncated at offset {offset + len(data)}: the file has become shorter")
        return memoryview(data)


class _Part:
    def __init__(self, file: StateFile, at: int, end: int) -> None:
        self._file = file
        self._at, self._end = at, end

    def readinto(self, view: memoryview, /) -> int:
        count = min(len(view), self._end - self._at, PIECE)
        if count > 0:
            view[:count] = self._file.read(self._at, count)
            self._at += count
        return max(0, count)


def state_of(file: StateFile) -> State:
    """The state as its index has it; of its content only head and devices are read.  CannotDo without an index."""
    facts = file.facts
    if facts is None:
        raise CannotDo("this .vmz has no index: it was packed with --any", "unpack it: vm-compress -d --any")
    validator = Validator()
    for record in file.head_records:
        validator.see(record)
    state = validator.state
    try:
        for name in page_index.FACTS:
            setattr(state, name, facts[name])
        state.maps = {name: block.page_map() for name, block in file.blocks.items()}
        devices = [_devices(file, span, True) for span in facts["early"]] + [_devices(file, facts["devices"], False)]
        offset, size = facts["description"]
        description = Description(bytes(file.read(offset + 5, size)), offset=offset)
        take_devices(state, devices, description)
    except (*UNREADABLE, IndexError) as error:
        raise Damaged(f"the index does not fit the state: {error}") from error
    return state


def _devices(file: StateFile, span: tuple[int, int], early: bool) -> Devices:
    offset, size = span
    return Devices(bytes(file.read(offset, size)), early, offset=offset)
