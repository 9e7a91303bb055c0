"""Records as the bytes that they were read from: the exact inverse of `reader`."""

from functools import singledispatch

from . import layout
from .records import (
    Bitmap,
    Block,
    Blocks,
    Command,
    Configuration,
    Description,
    Devices,
    EndMark,
    EndOfBody,
    Footer,
    Opaque,
    Packed,
    Pages,
    Record,
    Section,
    Start,
)


@singledispatch
def encode(record: Record) -> bytes:
    """The bytes of a record."""
    raise TypeError(f"no record of a stream: {record!r}")


def _name(name: bytes) -> bytes:
    return bytes((len(name),)) + name


@encode.register
def _start(record: Start) -> bytes:
    return layout.MAGIC + layout.U32.pack(record.version)


@encode.register
def _configuration(record: Configuration) -> bytes:
    head = bytes((layout.QEMU_VM_CONFIGURATION,)) + layout.U32.pack(len(record.machine)) + record.machine
    for part in record.parts:
        head += bytes((layout.QEMU_VM_SUBSECTION,)) + _name(part.name) + layout.U32.pack(part.version) + part.data
    return head


@encode.register
def _command(record: Command) -> bytes:
    head = layout.COMMAND.pack(layout.QEMU_VM_COMMAND, record.number, len(record.data))
    return head + record.data + (record.package or b"")


@encode.register
def _section(record: Section) -> bytes:
    head = layout.SECTION.pack(record.tag, record.number)
    if record.name is None or record.instance is None or record.version is None:
        return head
    return head + _name(record.name) + layout.U32.pack(record.instance) + layout.U32.pack(record.version)


@encode.register
def _footer(record: Footer) -> bytes:
    return layout.FOOTER.pack(layout.QEMU_VM_SECTION_FOOTER, record.number)


@encode.register
def _blocks(record: Blocks) -> bytes:
    head = layout.U64.pack(record.total | layout.RAM_SAVE_FLAG_MEM_SIZE)
    return head + b"".join(_block(block) for block in record.blocks)


def _block(block: Block) -> bytes:
    numbers = (block.size, block.page_size, block.address)
    return _name(block.name) + b"".join(layout.U64.pack(number) for number in numbers if number is not None)


@encode.register
def _pages(record: Pages) -> bytes:
    flags = layout.RAM_SAVE_FLAG_ZERO if record.zero else layout.RAM_SAVE_FLAG_PAGE
    size = 1 if record.zero else record.page
    pieces, at = [], record.first
    named = record.named
    for begin, count in record.runs:
        for address in range(begin, begin + count * record.page, record.page):
            word = address | flags | (0 if named else layout.RAM_SAVE_FLAG_CONTINUE)
            pieces.append(layout.U64.pack(word) + (_name(record.block.name) if named else b""))
            pieces.append(bytes(record.raw[at : at + size]))
            named = False
            at += record.stride
    return b"".join(pieces)


@encode.register
def _packed(record: Packed) -> bytes:
    word = record.address | record.flag | (0 if record.named else layout.RAM_SAVE_FLAG_CONTINUE)
    head = layout.U64.pack(word) + (_name(record.block.name) if record.named else b"")
    if record.flag == layout.RAM_SAVE_FLAG_XBZRLE:
        return head + bytes((layout.ENCODING_FLAG_XBZRLE,)) + layout.U16.pack(len(record.data)) + record.data
    return head + layout.U32.pack(len(record.data)) + record.data


@encode.register
def _end_of_body(_record: EndOfBody) -> bytes:
    return layout.U64.pack(layout.RAM_SAVE_FLAG_EOS)


@encode.register
def _bitmap(record: Bitmap) -> bytes:
    names = (_name(record.node) if record.node is not None else b"") + (
        _name(record.name) if record.name is not None else b""
    )
    return bytes((record.flags,)) + names + record.data


@encode.register
def _opaque(record: Opaque) -> bytes:
    return record.data


@encode.register
def _devices(record: Devices) -> bytes:
    return record.data


@encode.register
def _end_mark(_record: EndMark) -> bytes:
    return bytes((layout.QEMU_VM_EOF,))


@encode.register
def _description(record: Description) -> bytes:
    return bytes((layout.QEMU_VM_VMDESCRIPTION,)) + layout.U32.pack(len(record.data)) + record.data
