"""The records of a stream as values; `reader` makes them of bytes, `writer` makes the same bytes of them again.

`offset` counts the bytes from the start of the stream to the record's first.  Names are bytes, as they stand there.
Views of bytes are good until the next record is asked for.
"""

from typing import NamedTuple

from .constants import PAGE_BITS


class Start(NamedTuple):
    """Magic and version (3)."""

    version: int
    offset: int = 0


class Subsection(NamedTuple):
    name: bytes
    version: int
    data: bytes


class Configuration(NamedTuple):
    machine: bytes
    parts: tuple[Subsection, ...]
    offset: int = 0

    def part(self, name: bytes) -> bytes | None:
        """The bytes of the subsection configuration/NAME."""
        return next((part.data for part in self.parts if part.name == b"configuration/" + name), None)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Those that both sides must have."""
        data = self.part(b"capabilities")
        found, at = [], 4
        while data is not None and at < len(data):
            found.append(data[at + 1 : at + 1 + data[at]].decode("utf-8", "backslashreplace"))
            at += 1 + data[at]
        return tuple(found)


class Command(NamedTuple):
    """number: MIG_CMD_*; data: what follows its header; package: what follows the command PACKAGED, else None."""

    number: int
    data: bytes
    package: bytes | None = None
    offset: int = 0


class Section(NamedTuple):
    """The header of a section.  tag: QEMU_VM_SECTION_*; name, instance and version are None in PART and END."""

    tag: int
    number: int
    name: bytes | None = None
    instance: int | None = None
    version: int | None = None
    offset: int = 0


class Footer(NamedTuple):
    number: int
    offset: int = 0


class Block(NamedTuple):
    """A RAM block: bytes used; page_size and address only where the stream has them."""

    name: bytes
    size: int
    page_size: int | None = None
    address: int | None = None

    @property
    def text(self) -> str:
        return self.name.decode("utf-8", "backslashreplace")


class Blocks(NamedTuple):
    """The list of RAM blocks; total bytes."""

    total: int
    blocks: tuple[Block, ...]
    offset: int = 0


class Pages:
    """Pages of one block in the order of the stream.

    zero: all are zero, else their content is in the stream.  named: the first has the block's name before it.
    runs: address of the first and number of pages, of each run of neighbours.  raw: the records; a page's content
    begins at `first` and then every `stride` bytes.
    """

    __slots__ = ("block", "named", "offset", "page", "raw", "runs", "zero")

    def __init__(
        self,
        block: Block,
        zero: bool,
        named: bool,
        runs: tuple[tuple[int, int], ...],
        page: int,
        raw: memoryview,
        offset: int = 0,
    ) -> None:
        self.block, self.zero, self.named = block, zero, named
        self.runs, self.page, self.raw, self.offset = runs, page, raw, offset

    @property
    def count(self) -> int:
        return sum(count for _, count in self.runs)

    @property
    def first(self) -> int:
        return 8 + (1 + len(self.block.name) if self.named else 0)

    @property
    def stride(self) -> int:
        return 8 + (1 if self.zero else self.page)


class Packed(NamedTuple):
    """One page as a difference from what was sent before (flag XBZRLE), or packed by zlib (flag COMPRESS_PAGE)."""

    block: Block
    flag: int
    named: bool
    address: int
    data: bytes
    page: int = 1 << PAGE_BITS
    offset: int = 0


class EndOfBody(NamedTuple):
    """The last record of a RAM section's body."""

    offset: int = 0


class Bitmap(NamedTuple):
    """A record of the section dirty-bitmap: flags DIRTY_BITMAP_*, names where it has them, and what follows them."""

    flags: int
    node: bytes | None = None
    name: bytes | None = None
    data: bytes = b""
    offset: int = 0


class Opaque(NamedTuple):
    """The body of an iterable section whose layout is not known here."""

    data: bytes
    offset: int = 0


class Devices(NamedTuple):
    """Device sections, whose sizes only the description tells; early: those before RAM (virtio-mem)."""

    data: bytes
    early: bool
    offset: int = 0


class EndMark(NamedTuple):
    offset: int = 0


class Description(NamedTuple):
    """The JSON behind the end mark."""

    data: bytes
    offset: int = 0


Record = (
    Start
    | Configuration
    | Command
    | Section
    | Footer
    | Blocks
    | Pages
    | Packed
    | EndOfBody
    | Bitmap
    | Opaque
    | Devices
    | EndMark
    | Description
)
