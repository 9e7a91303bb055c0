"""A .vmz in a file that can seek: its end record first, then any page or any bytes of its content."""

import os
import struct
from array import array
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from threading import Lock, local

from ..errors import Damaged
from . import decompress, file_format, page_index, zstd
from .state_file import StateFile

# Of frames that have been unpacked
CACHE = 32 << 20


class VmzFile(StateFile):
    """The file that begins `ahead` bytes before where `fd` stands.

    Damaged where its end record is not there or not its own.

    Frames are checked when they are first needed.  `cache` bounds the unpacked frames that are kept, in bytes.  Several
    threads may read it.
    """

    def __init__(self, fd: int, ahead: int = 0, cache: int = CACHE) -> None:
        self._fd = fd
        self._base = os.lseek(fd, 0, os.SEEK_CUR) - ahead
        self.size = os.fstat(fd).st_size - self._base
        magic, size = self._header(0, "the head")
        if magic != zstd.SKIPPABLE + file_format.HEAD:
            raise Damaged(f"no .vmz: found a frame {magic:#x} at offset 0")
        self.tally = file_format.parse_head(self._pread(size, file_format.FRAME_HEAD.size, "the head"))
        self.head = file_format.FRAME_HEAD.size + size
        self.end = self._find_end()
        self.records = self._read_end()
        self._read_groups()
        self._frames: OrderedDict[int, bytes] = OrderedDict()
        self._keep = max(2, cache // self.tally.size)
        self._tables: dict[int, tuple[list[int], file_format.Table]] = {}
        self._lock = Lock()
        self._own = local()
        self.facts, self.blocks = page_index.parse(self.tally, self.records)
        size = self.tally.size
        starts = zip(self._starts, self.tally.contents, strict=True)
        self.pieces = array("Q", (at for start, count in starts for at in range(start, start + count, size)))

    # the end of the file

    def _pread(self, count: int, offset: int, what: str) -> bytes:
        data = os.pread(self._fd, count, self._base + offset)
        while 0 < len(data) < count:
            more = os.pread(self._fd, count - len(data), self._base + offset + len(data))
            if not more:
                break
            data += more
        if len(data) < count:
            raise Damaged(f"truncated at offset {offset + len(data)}, in {what}")
        return data

    def _header(self, offset: int, what: str) -> tuple[int, int]:
        magic, size = file_format.FRAME_HEAD.unpack(self._pread(file_format.FRAME_HEAD.size, offset, what))
        return int(magic), int(size)

    def _find_end(self) -> int:
        """The offset of the end record, by way of the seek table, which is the last thing in the file."""
        no_end = f"truncated at offset {self.size}: the file does not end with a seek table, as every whole .vmz does"
        if self.size < self.head + file_format.SEEK_END.size:
            raise Damaged(no_end)
        last = self._pread(file_format.SEEK_END.size, self.size - file_format.SEEK_END.size, "the seek table")
        count, descriptor, magic = file_format.SEEK_END.unpack(last)
        seek = self.size - file_format.FRAME_HEAD.size - count * file_format.SEEK_ENTRY.size - file_format.SEEK_END.size
        if magic != file_format.SEEK_MAGIC or descriptor != file_format.SEEK_CHECKSUMS or not count or seek < self.head:
            raise Damaged(no_end)
        entry = self._pread(
            file_format.SEEK_ENTRY.size,
            self.size - file_format.SEEK_END.size - file_format.SEEK_ENTRY.size,
            "the seek table",
        )
        end: int = seek - file_format.SEEK_ENTRY.unpack(entry)[0]
        expected = (zstd.SKIPPABLE + file_format.SEEK, self.size - seek - file_format.FRAME_HEAD.size)
        if end < self.head or self._header(seek, "the seek table") != expected:
            raise Damaged(f"corrupt seek table at the end of the file, offset {seek}")
        if self._header(end, "the end record") != (
            zstd.SKIPPABLE + file_format.END,
            seek - end - file_format.FRAME_HEAD.size,
        ):
            raise Damaged(f"no end record at offset {end}, where the seek table has it")
        self._seek = seek
        return end

    def _read_end(self) -> dict[int, list[bytes]]:
        size = self._seek - self.end - file_format.FRAME_HEAD.size
        if size > file_format.END_LIMIT:
            raise Damaged(f"end record at offset {self.end}: found {size} bytes")
        return file_format.parse_end(
            self._pread(size, self.end + file_format.FRAME_HEAD.size, "the end record"), self.end
        )

    def _read_groups(self) -> None:
        tally = self.tally
        try:
            content, packed, count, _ = file_format.TOTALS.unpack(self.records[file_format.REC_TOTALS][0])
            data = file_format.unpack(self.records[file_format.REC_GROUPS][0], file_format.INDEX_LIMIT, self.end)
            if len(data) != 16 * count:
                raise ValueError("it has not one entry for each group")
        except (KeyError, ValueError, struct.error) as error:
            raise Damaged(f"end record at offset {self.end}: no table of groups that can be read: {error}") from error
        tally.contents, tally.packed = (file_format.numbers(data[at : at + 4 * count]) for at in (0, 4 * count))
        tally.digests = file_format.numbers(data[8 * count :], "Q")
        self._starts = list(accumulate(tally.contents, initial=0))
        self._offsets = list(accumulate(tally.packed, initial=self.head))
        tally.content, tally.offset = self._starts.pop(), self._offsets.pop()
        self.content = tally.content
        same = (content, packed, tally.offset) == (tally.content, self.end, self.end)
        if not same or tally.totals() != self.records[file_format.REC_TOTALS][0]:
            raise Damaged(f"end record at offset {self.end} is not that of this file")

    # what is in it

    def _read(self, offset: int, count: int) -> memoryview:
        group = bisect_right(self._starts, offset) - 1
        number, at = divmod(offset - self._starts[group], self.tally.size)
        frame = self.frame(group, number)
        if at + count <= len(frame):
            return memoryview(frame)[at : at + count]
        found = bytearray()
        while len(found) < count:
            found += frame[at : at + count - len(found)]
            at, number = 0, number + 1
            if number * self.tally.size >= self.tally.contents[group]:
                group, number = group + 1, 0
            if len(found) < count:
                frame = self.frame(group, number)
        return memoryview(found)

    def frame(self, group: int, number: int) -> bytes:
        """The content of a frame, proven by its two checksums."""
        key = group * file_format.MOST_FRAMES + number
        with self._lock:
            if (found := self._frames.get(key)) is not None:
                self._frames.move_to_end(key)
                return found
        found = self._read_frame(group, number)
        with self._lock:
            self._frames[key] = found
            if len(self._frames) > self._keep:
                self._frames.popitem(last=False)
        return found

    def _read_frame(self, group: int, number: int) -> bytes:
        offsets, table = self._table(group)
        packed = self._pread(table.sizes[number], offsets[number], "a frame")
        file_format.check_frame(packed, table.digests[number], offsets[number])
        if not hasattr(self._own, "unpack"):
            self._own.unpack = zstd.unpacker()
        size = min(self.tally.size, table.content - number * self.tally.size)
        content: bytes = self._own.unpack(packed, size, offsets[number])
        return content

    def _table(self, group: int) -> tuple[list[int], file_format.Table]:
        """Where the frames of a group lie, and the table before them."""
        if group not in self._tables:
            offset = self._offsets[group]
            magic, size = self._header(offset, "a table of frames")
            if magic != zstd.SKIPPABLE + file_format.TABLE or size > file_format.TABLE_LIMIT:
                raise Damaged(f"no table of frames at offset {offset}")
            raw = self._pread(size, offset + file_format.FRAME_HEAD.size, "a table of frames")
            table = file_format.parse_table(raw, self.tally.size, offset)
            facts = (table.digest, table.content, file_format.FRAME_HEAD.size + size + sum(table.sizes))
            if facts != (self.tally.digests[group], self.tally.contents[group], self.tally.packed[group]):
                raise Damaged(f"table of frames at offset {offset} is not the one that the end record knows")
            offsets = list(accumulate(table.sizes, initial=offset + file_format.FRAME_HEAD.size + size))
            self._tables[group] = (offsets, table)
        return self._tables[group]


def vmz_file(fd: int, ahead: int = 0) -> VmzFile | None:
    """The .vmz that begins `ahead` bytes before where `fd` stands; None where it cannot seek, or is no .vmz."""
    try:
        at = os.lseek(fd, 0, os.SEEK_CUR) - ahead
        first = os.pread(fd, decompress.FIRST, at)
    except OSError:
        return None
    return VmzFile(fd, ahead) if decompress.recognise(first) == "vmz" else None
