"""Records as the bytes that they were read from: the exact inverse of `reader`."""

from functools import singledispatch

from . import constants
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
    return constants.MAGIC + constants.U32.pack(record.version)


@encode.register
def _configuration(record: Configuration) -> bytes:
    head = bytes((constants.QEMU_VM_CONFIGURATION,)) + constants.U32.pack(len(record.machine)) + record.machine
    for part in record.parts:
        head += bytes((constants.QEMU_VM_SUBSECTION,)) + _name(part.name) + constants.U32.pack(part.version) + part.data
    return head


@encode.register
def _command(record: Command) -> bytes:
    head = constants.COMMAND.pack(constants.QEMU_VM_COMMAND, record.number, len(record.data))
    return head + record.data + (record.package or b"")


@encode.register
def _section(record: Section) -> bytes:
    head = constants.SECTION.pack(record.tag, record.number)
    if record.name is None or record.instance is None or record.version is None:
        return head
    return head + _name(record.name) + constants.U32.pack(record.instance) + constants.U32.pack(record.version)


@encode.register
def _footer(record: Footer) -> bytes:
    return constants.FOOTER.pack(constants.QEMU_VM_SECTION_FOOTER, record.number)


@encode.register
def _blocks(record: Blocks) -> bytes:
    head = constants.U64.pack(record.total | constants.RAM_SAVE_FLAG_MEM_SIZE)
    return head + b"".join(_block(block) for block in record.blocks)


def _block(block: Block) -> bytes:
    numbers = (block.size, block.page_size, block.address)
    return _name(block.name) + b"".join(constants.U64.pack(number) for number in numbers if number is not None)


@encode.register
def _pages(record: Pages) -> bytes:
    flags = constants.RAM_SAVE_FLAG_ZERO if record.zero else constants.RAM_SAVE_FLAG_PAGE
    size = 1 if record.zero else record.page
    pieces, at = [], record.first
    named = record.named
    for begin, count in record.runs:
        for address in range(begin, begin + count * record.page, record.page):
            word = address | flags | (0 if named else constants.RAM_SAVE_FLAG_CONTINUE)
            pieces.append(constants.U64.pack(word) + (_name(record.block.name) if named else b""))
            pieces.append(bytes(record.raw[at : at + size]))
            named = False
            at += record.stride
    return b"".join(pieces)


@encode.register
def _packed(record: Packed) -> bytes:
    word = record.address | record.flag | (0 if record.named else constants.RAM_SAVE_FLAG_CONTINUE)
    head = constants.U64.pack(word) + (_name(record.block.name) if record.named else b"")
    if record.flag == constants.RAM_SAVE_FLAG_XBZRLE:
        return head + bytes((constants.ENCODING_FLAG_XBZRLE,)) + constants.U16.pack(len(record.data)) + record.data
    return head + constants.U32.pack(len(record.data)) + record.data


@encode.register
def _end_of_body(_record: EndOfBody) -> bytes:
    return constants.U64.pack(constants.RAM_SAVE_FLAG_EOS)


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
    return bytes((constants.QEMU_VM_EOF,))


@encode.register
def _description(record: Description) -> bytes:
    return bytes((constants.QEMU_VM_VMDESCRIPTION,)) + constants.U32.pack(len(record.data)) + record.data
