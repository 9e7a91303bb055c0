"""A stream as records, in one pass (migration/savevm.c: qemu_loadvm_state, qemu_loadvm_state_main).

The grammar alone: tags, lengths, ids and footers.  Whether the records come in an order that makes a state is for
`validate` to say.
"""

import re
from collections.abc import Callable, Iterator

from ..errors import Damaged
from ..io.readers import Reader
from ..io.window import Window
from . import constants
from .device_part import DevicePart
from .ram import Ram
from .records import (
    Bitmap,
    Command,
    Configuration,
    Footer,
    Opaque,
    Record,
    Section,
    Start,
    Subsection,
)

BODY_LIMIT = 32 << 20
NAME_LIMIT = 255
FULL_TAGS = (constants.QEMU_VM_SECTION_START, constants.QEMU_VM_SECTION_FULL)
SECTION_TAGS = (*FULL_TAGS, constants.QEMU_VM_SECTION_PART, constants.QEMU_VM_SECTION_END)
AFTER_FOOTER = (*SECTION_TAGS, constants.QEMU_VM_COMMAND, constants.QEMU_VM_EOF)


class StateReader:
    """Iterate to get the records, up to the description; then `expect_end()` says whether the input ends there.

    Bytes that have been read and found good go to `window.sink`; of the device sections none do before the description
    has been given out and `window.flush()` is called.  Raises Damaged, with the offset.
    """

    def __init__(self, source: Reader, sink: Callable[[memoryview], object] | None = None) -> None:
        self._source = source
        self.window = Window(source, sink)
        self.ram = Ram(self.window)
        self._devices = DevicePart(self.window)
        self._names: dict[int, bytes] = {}
        self._rounds = False

    def __iter__(self) -> Iterator[Record]:
        yield self._start()
        yield self._configuration()
        while True:
            tag = self._bytes(1, "the tag of a section")[0]
            if tag == constants.QEMU_VM_COMMAND:
                yield self._command()
            elif tag == constants.QEMU_VM_SECTION_FULL and not self._rounds:
                yield self._devices.early(self._names)
            elif tag == constants.QEMU_VM_SECTION_FULL:
                yield from self._devices.to_end()
                return
            elif tag in SECTION_TAGS:
                yield from self._section(tag)
            elif tag == constants.QEMU_VM_EOF:
                yield from self._devices.without_devices()
                return
            else:
                raise Damaged(f"no section at offset {self._at}: found tag {tag:#04x}")

    def expect_end(self) -> None:
        """Damaged where something lies behind the state."""
        ahead = bytes(self.window.have()[:16])
        if not ahead:
            buffer = bytearray(16)
            ahead = bytes(buffer[: self._source.readinto(memoryview(buffer))])
        if ahead:
            text = f"something lies behind the end of the state, at offset {self._at}: expected the end, found "
            raise Damaged(text + ahead.hex(" "))

    @property
    def _at(self) -> int:
        return self.window.offset

    def _bytes(self, count: int, what: str) -> memoryview:
        found = self.window.need(count)
        if found is None:
            raise Damaged(f"truncated at offset {self.window.came}, in {what}")
        return found

    def _name(self, at: int, what: str) -> bytes:
        size = self._bytes(at + 1, what)[at]
        return bytes(self._bytes(at + 1 + size, what)[at + 1 :])

    def _start(self) -> Start:
        found = bytes(self.window.need(4) or self.window.have())
        if not found:
            raise Damaged("the input is empty: expected the state of a guest, found 0 bytes")
        if found != constants.MAGIC[: len(found)]:
            raise Damaged(f"no state of a guest: expected 'QEVM' at offset 0, found {found!r}")
        version = int.from_bytes(self._bytes(8, "the first bytes")[4:], "big")
        if version != constants.VERSION:
            raise Damaged(f"unknown version at offset 4: expected {constants.VERSION}, found {version}")
        self.window.take(8)
        return Start(version)

    def _configuration(self) -> Configuration:
        offset, what = self._at, "the configuration"
        tag = self._bytes(1, what)[0]
        if tag != constants.QEMU_VM_CONFIGURATION:
            raise Damaged(f"no configuration at offset {offset}: expected tag 0x07, found {tag:#04x}")
        size = int.from_bytes(self._bytes(5, what)[1:], "big")
        if size > NAME_LIMIT:
            raise Damaged(f"name of machine at offset {offset + 1}: expected at most 255 bytes, found {size}")
        machine = bytes(self._bytes(5 + size, what)[5:])
        self.window.take(5 + size)
        parts = []
        while self._bytes(1, "the tag of a section")[0] == constants.QEMU_VM_SUBSECTION:
            parts.append(self._part())
        configuration = Configuration(machine, tuple(parts), offset=offset)
        self._obey(configuration)
        return configuration

    def _part(self) -> Subsection:
        offset, what = self._at, "a part of the configuration"
        name = self._name(1, what)
        head = 2 + len(name) + 4
        version = int.from_bytes(self._bytes(head, what)[-4:], "big")
        if name == b"configuration/target-page-bits":
            size = 4
        elif name == b"configuration/uuid":
            size = 16
        elif name == b"configuration/capabilities":
            size = self._capabilities(head)
        else:
            raise Damaged(f"unknown part of the configuration at offset {offset}: {name!r}")
        data = bytes(self._bytes(head + size, what)[head:])
        self.window.take(head + size)
        return Subsection(name, version, data)

    def _capabilities(self, head: int) -> int:
        what = "the capabilities of the configuration"
        count = int.from_bytes(self._bytes(head + 4, what)[-4:], "big")
        if count > NAME_LIMIT:
            raise Damaged(f"capabilities at offset {self._at + head}: expected at most 255, found {count}")
        size = 4
        for _ in range(count):
            size += 1 + len(self._name(head + size, what))
        return size

    def _obey(self, configuration: Configuration) -> None:
        """What the configuration changes in what follows it."""
        bits = configuration.part(b"target-page-bits")
        if bits is not None:
            number = int.from_bytes(bits, "big")
            if not 10 <= number <= 16:
                raise Damaged(f"size of a page in the configuration: expected 10 to 16 bits, found {number}")
            self.ram.page = 1 << number
        if "mapped-ram" in configuration.capabilities:
            hint = "save it without the capability mapped-ram: vm-dump does"
            raise Damaged("this file has its pages at fixed places (mapped-ram): it is no stream", hint)
        self.ram.addresses = "x-ignore-shared" in configuration.capabilities

    def _command(self) -> Command:
        offset, what = self._at, "a command"
        _, number, size = constants.COMMAND.unpack(self._bytes(constants.COMMAND.size, what))
        least, most = constants.COMMAND_SIZES.get(number, (1, 0))
        if not least <= size <= most:
            raise Damaged(f"no command of QEMU at offset {offset}: found number {number} with {size} bytes")
        end = constants.COMMAND.size + size
        data = bytes(self._bytes(end, what)[constants.COMMAND.size :])
        package = None
        if number == constants.MIG_CMD_PACKAGED:
            length = int.from_bytes(data, "big")
            if length > constants.PACKAGE_LIMIT:
                raise Damaged(
                    f"package at offset {offset}: expected at most {constants.PACKAGE_LIMIT} bytes, found {length}"
                )
            package = bytes(self._bytes(end + length, "a package")[end:])
            end += length
        if number == constants.MIG_CMD_POSTCOPY_ADVISE and size:
            self.ram.advised = True
        self.window.take(end)
        return Command(number, data, package, offset=offset)

    def _section(self, tag: int) -> Iterator[Record]:
        header = self._header(tag)
        self._rounds |= tag != constants.QEMU_VM_SECTION_START
        number, name = header.number, self._names.get(header.number)
        if tag == constants.QEMU_VM_SECTION_START:
            assert header.name is not None
            if name is not None:
                raise Damaged(f"section id {number} at offset {header.offset} was given to {_text(name)} before")
            name = self._names[number] = header.name
        if name is None:
            raise Damaged(f"section of unknown id at offset {header.offset}: found {number}")
        yield header
        if name == b"ram":
            yield from self.ram.body(tag == constants.QEMU_VM_SECTION_START)
        elif name == b"dirty-bitmap":
            yield from self._bitmaps()
        else:
            yield self._opaque(number, name)
        yield self._footer(number, name)

    def _header(self, tag: int) -> Section:
        offset, what = self._at, "the header of a section"
        number = int.from_bytes(self._bytes(5, what)[1:], "big")
        if tag not in FULL_TAGS:
            self.window.take(5)
            return Section(tag, number, offset=offset)
        name = self._name(5, what)
        end = 6 + len(name) + 8
        numbers = self._bytes(end, what)[-8:]
        instance, version = int.from_bytes(numbers[:4], "big"), int.from_bytes(numbers[4:], "big")
        self.window.take(end)
        return Section(tag, number, name, instance, version, offset=offset)

    def _footer(self, number: int, name: bytes) -> Footer:
        offset = self._at
        tag, found = constants.FOOTER.unpack(self._bytes(constants.FOOTER.size, f"the footer of {_text(name)}"))
        if (tag, found) != (constants.QEMU_VM_SECTION_FOOTER, number):
            expected = constants.FOOTER.pack(constants.QEMU_VM_SECTION_FOOTER, number).hex(" ")
            text = f"no footer of {_text(name)} at offset {offset}: expected {expected}, found "
            raise Damaged(text + constants.FOOTER.pack(tag, found).hex(" "))
        self.window.take(constants.FOOTER.size)
        return Footer(number, offset=offset)

    def _bitmaps(self) -> Iterator[Record]:
        flags = 0
        while not flags & constants.DIRTY_BITMAP_EOS:
            record = self._bitmap()
            flags = record.flags
            yield record

    def _bitmap(self) -> Bitmap:
        offset, what, at = self._at, "a dirty bitmap", 1
        flags = self._bytes(1, what)[0]
        node = name = None
        if flags & 0x80:
            raise Damaged(f"record of dirty bitmaps at offset {offset}: unknown flags {flags:#x}")
        if flags & constants.DIRTY_BITMAP_NODE:
            node = self._name(at, what)
            at += 1 + len(node)
        if flags & constants.DIRTY_BITMAP_NAME:
            name = self._name(at, what)
            at += 1 + len(name)
        end = at + self._bitmap_size(flags, at, offset)
        data = bytes(self._bytes(end, what)[at:])
        self.window.take(end)
        return Bitmap(flags, node, name, data, offset=offset)

    def _bitmap_size(self, flags: int, at: int, offset: int) -> int:
        if flags & constants.DIRTY_BITMAP_START:
            return 5
        if not flags & constants.DIRTY_BITMAP_BITS:
            return 0
        if flags & constants.DIRTY_BITMAP_ZEROES:
            return 12
        size = int.from_bytes(self._bytes(at + 20, "a dirty bitmap")[-8:], "big")
        if size > BODY_LIMIT:
            raise Damaged(f"bits of a dirty bitmap at offset {offset}: found {size} bytes")
        return 20 + size

    def _opaque(self, number: int, name: bytes) -> Opaque:
        """What its own footer ends, with something behind it that can follow a footer."""
        footer = re.escape(constants.FOOTER.pack(constants.QEMU_VM_SECTION_FOOTER, number))
        end = re.compile(footer + b"[%b]" % bytes(AFTER_FOOTER), re.DOTALL)
        offset, searched = self._at, 0
        while len(view := self.window.have()) <= BODY_LIMIT:
            if place := end.search(view, searched):
                data = bytes(view[: place.start()])
                self.window.take(len(data))
                return Opaque(data, offset=offset)
            searched = max(0, len(view) - constants.FOOTER.size)
            if not self.window.more():
                raise Damaged(f"truncated at offset {self.window.came}, in section {_text(name)}")
        raise Damaged(f"no end of section {_text(name)} within {BODY_LIMIT} bytes from offset {offset}")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
