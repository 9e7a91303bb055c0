"""The file format .vmz (docs/vmz.md), a zstd file that proves its end: its frames, tables and records.

Content goes in groups of frames; a table before each group has the size and a checksum of every frame, so that a
group can be read at once, and its frames packed and unpacked by all processors.  The end record comes only behind a
content that was whole.
"""

import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import Damaged
from . import zstd

VERSION = 1
# Measured on guests' RAM: with less the file grows, with more a page takes longer than half a millisecond.
FRAME = 192 << 10
GROUP = 21 * FRAME
# What a reader takes of others
LEAST_FRAME, MOST_FRAME = 64 << 10, 1 << 20
MOST_GROUP = 4 << 20
MOST_FRAMES = MOST_GROUP // LEAST_FRAME
END_LIMIT = INDEX_LIMIT = 1 << 30
# Frames of bytes that cannot be packed are a little larger than those are.
MOST_PACKED = MOST_GROUP + MOST_GROUP // 32
# A thread has a group and its frames; all together they stay below what a filter may use.
MEMORY = 128 << 20
# Groups that are done, or wait, while all threads work
AHEAD = 2

# Numbers of skippable frames; SEEK is that of zstd's seekable format.
HEAD, TABLE, END, SEEK = 6, 7, 8, 14
FRAME_HEAD = struct.Struct("<II")  # magic, size
HEAD_FORM = struct.Struct("<3sBII")  # "VMZ", version, content of a frame, flags
TABLE_HEAD = struct.Struct("<QI")  # digest of what follows, content of the group
TABLE_ENTRY = struct.Struct("<IQ")  # packed size, digest of the packed bytes
TABLE_LIMIT = TABLE_HEAD.size + MOST_FRAMES * TABLE_ENTRY.size
RECORD_HEAD = struct.Struct("<HHI")  # kind, 0, size
TOTALS = struct.Struct("<QQIQ")  # content, packed bytes before the end record, groups, digest of all before it
SEEK_ENTRY = struct.Struct("<III")  # packed size, content, low half of the content's XXH64
SEEK_END = struct.Struct("<IBI")  # frames, descriptor, magic
SEEK_MAGIC, SEEK_CHECKSUMS = 0x8F92EAB1, 0x80
NO_CONTENT = 0x51D8E999  # of XXH64 of nothing

OTHER_BYTES = 1  # flag: not judged as a state
# Kinds of records; who does not know a mandatory one refuses the file.
MANDATORY = 0x8000
REC_TOTALS = 1 | MANDATORY
REC_GROUPS, REC_STATE, REC_BLOCK = 2, 3, 4
KNOWN = (REC_TOTALS,)


class FileTally:
    """What a file is made of, as far as it has been written or read; enough to write or to check its last two frames.

    contents, packed, digests: of each group its content, its bytes with its table, the digest in its table.
    """

    def __init__(self, size: int = FRAME, flags: int = 0) -> None:
        self.size, self.flags = size, flags
        self.offset = self.content = 0
        self.contents, self.packed, self.digests = array("I"), array("I"), array("Q")
        self.seek = array("I")

    def passed(self, packed: int, content: int = 0, checksum: int = NO_CONTENT) -> None:
        """A frame, of whatever kind, has been written or read."""
        self.offset += packed
        self.seek.extend((packed, content, checksum))

    def group(self, table: bytes, frames: Sequence[bytes | memoryview]) -> None:
        """A group has been written or read; `table` is what is in its table."""
        digest_, content = TABLE_HEAD.unpack_from(table)
        before = self.offset
        self.passed(FRAME_HEAD.size + len(table))
        for number, frame in enumerate(frames):
            size = min(self.size, content - number * self.size)
            self.passed(len(frame), size, int.from_bytes(frame[-4:], "little"))
        self.content += content
        self.contents.append(content)
        self.packed.append(self.offset - before)
        self.digests.append(digest_)

    def head(self) -> bytes:
        """What is in the first frame."""
        return HEAD_FORM.pack(b"VMZ", VERSION, self.size, self.flags)

    def totals(self) -> bytes:
        proof = digest(self.head() + packed(self.digests))
        return TOTALS.pack(self.content, self.offset, len(self.digests), proof)

    def seek_table(self) -> bytes:
        """The last frame, all of it; to be asked for once the end record has `passed`."""
        count = len(self.seek) // 3
        end = SEEK_END.pack(count, SEEK_CHECKSUMS, SEEK_MAGIC)
        return zstd.skippable(SEEK, packed(self.seek) + end)

    def groups(self) -> bytes:
        return b"".join(map(packed, (self.contents, self.packed, self.digests)))


def packed(column: "array[int]") -> bytes:
    """Little-endian, whatever this machine's order."""
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        column = array(column.typecode, column)
        column.byteswap()
    return column.tobytes()


def numbers(data: bytes, code: str = "I") -> "array[int]":
    """What `packed` made bytes of."""
    column = array(code, data)
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        column.byteswap()
    return column


def digest(data: bytes | memoryview) -> int:
    """XXH3, 64 bits: against accidents, not against somebody who wants to deceive."""
    from xxhash import xxh3_64_intdigest

    return xxh3_64_intdigest(data)


def unpack(data: bytes, limit: int, offset: int) -> bytes:
    """The content of a record's frame; Damaged where it would be more than `limit` bytes."""
    size = zstd.content_size(data)
    if not 0 <= size <= limit:
        raise Damaged(f"record at offset {offset}: expected a frame of at most {limit} bytes, found {size}")
    return zstd.unpacker()(data, size, offset)


class Table(NamedTuple):
    """What stands before a group: sizes and digests of its packed frames, and how much they hold."""

    raw: bytes
    content: int
    sizes: tuple[int, ...]
    digests: tuple[int, ...]

    @property
    def digest(self) -> int:
        """Its own."""
        return int.from_bytes(self.raw[:8], "little")


def parse_head(content: bytes) -> FileTally:
    """What the first frame says."""
    if len(content) != HEAD_FORM.size:
        raise Damaged(f"head of a .vmz: expected {HEAD_FORM.size} bytes, found {len(content)}")
    magic, version, size, flags = HEAD_FORM.unpack(content)
    if magic != b"VMZ":
        raise Damaged(f"head of a .vmz: expected 'VMZ', found {magic!r}")
    if version != VERSION or flags & ~OTHER_BYTES:
        hint = "a newer vm-compress can read it; zstd -d gives the content, but proves nothing"
        raise Damaged(f"a .vmz of another version: expected {VERSION}, found {version}, flags {flags:#x}", hint)
    if not LEAST_FRAME <= size <= MOST_FRAME:
        raise Damaged(f"head of a .vmz: frames of {size} bytes")
    return FileTally(size, flags)


def is_state(first: bytes) -> bool:
    """Whether a .vmz with these first bytes says that it holds a state."""
    return not parse_head(first[FRAME_HEAD.size : FRAME_HEAD.size + HEAD_FORM.size]).flags & OTHER_BYTES


def parse_table(raw: bytes, size: int, offset: int) -> Table:
    """A table at `offset`; Damaged unless it is whole and of frames of `size` bytes."""
    count, odd = divmod(len(raw) - TABLE_HEAD.size, TABLE_ENTRY.size)
    if odd or not 1 <= count <= MOST_FRAMES or digest(raw[8:]) != int.from_bytes(raw[:8], "little"):
        raise Damaged(f"corrupt table of frames at offset {offset}")
    content = int.from_bytes(raw[8:12], "little")
    sizes, digests = zip(*TABLE_ENTRY.iter_unpack(raw[TABLE_HEAD.size :]), strict=True)
    sensible = content <= MOST_GROUP and -(-content // size) == count
    sensible = sensible and sum(sizes) <= MOST_PACKED
    if not sensible or not all(8 <= packed <= size + size // 64 for packed in sizes):
        raise Damaged(f"table of frames at offset {offset} makes no sense: {count} frames for {content} bytes")
    return Table(raw, content, sizes, digests)


def parse_end(content: bytes, offset: int) -> dict[int, list[bytes]]:
    """The records of an end record at `offset`, by kind."""
    if len(content) < 8 or digest(content[8:]) != int.from_bytes(content[:8], "little"):
        raise Damaged(f"corrupt end record at offset {offset}")
    records: dict[int, list[bytes]] = {}
    at = 8
    while at < len(content):
        if at + RECORD_HEAD.size > len(content):
            raise Damaged(f"end record at offset {offset}: cut in a record")
        kind, _, size = RECORD_HEAD.unpack_from(content, at)
        at += RECORD_HEAD.size
        if at + size > len(content):
            raise Damaged(f"end record at offset {offset}: cut in a record")
        if kind & MANDATORY and kind not in KNOWN:
            hint = "a newer vm-compress can read it; zstd -d gives the content, but proves nothing"
            raise Damaged(f"end record at offset {offset}: unknown mandatory record {kind:#x}", hint)
        records.setdefault(kind, []).append(content[at : at + size])
        at += size
    if len(records.get(REC_TOTALS, ())) != 1:
        raise Damaged(f"end record at offset {offset}: no totals")
    return records


def check_frame(frame: bytes | memoryview, expected: int, offset: int) -> None:
    if digest(frame) != expected:
        raise Damaged(f"corrupt frame at offset {offset}: its digest is not that of the table before it")


def check_totals(records: dict[int, list[bytes]], tally: FileTally, offset: int) -> None:
    if records[REC_TOTALS][0] != tally.totals():
        raise Damaged(f"end record at offset {offset} is not of the frames before it")
    if (packed := records.get(REC_GROUPS)) and unpack(packed[0], INDEX_LIMIT, offset) != tally.groups():
        raise Damaged(f"end record at offset {offset}: its table of groups is not of the frames before it")
