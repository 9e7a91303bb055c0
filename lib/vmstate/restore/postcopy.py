"""What a QEMU is told that loads in postcopy, and what it asks (QEMU's migration/savevm.c, ram.c, migration.c).

We play the source of a move that has crossed over: the state's own head and devices, and pages when they are asked for.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ..errors import CannotDo, WrongUsage
from ..stream import constants
from ..stream.records import Blocks, Configuration, Section
from ..vmz.state_file import StateFile

PAGE = 1 << constants.PAGE_BITS
STRIDE = 8 + PAGE
BITMAP_END = 0x0123456789ABCDEF
# Of 16 TiB
BITMAP_LIMIT = 1 << 29


class NotLazy(CannotDo):
    """It can only be restored as a whole, before the guest runs; the hint says why or what to do."""


class NoIndex(WrongUsage):
    """The input does not tell where its pages are, or cannot be read there."""


# Of the ping, as QEMU's own source numbers the one in this place.
LOADED = 3


class Opening(NamedTuple):
    """The parts of a state that come before its pages: as bytes, but for the number of RAM's section.

    head: up to the end of the configuration.  start: RAM's START, with its footer.  early: sections of virtio-mem.
    """

    head: bytes
    start: bytes
    early: bytes
    devices: bytes
    number: int
    blocks: dict[bytes, int]
    switchover: bool

    def stream(self) -> bytes:
        """Everything up to the moment in which the guest runs, and the header of a section that stays open."""
        advise = constants.U64.pack(PAGE) + constants.U64.pack(PAGE)
        parts = [
            self.head,
            command(constants.MIG_CMD_OPEN_RETURN_PATH),
            command(constants.MIG_CMD_POSTCOPY_ADVISE, advise),
        ]
        parts += [self.start, self.early]
        # Without any QEMU would write pages into RAM behind the back of its fault handler, and hang.
        parts += [_discard(name, size) for name, size in self.blocks.items()]
        if self.switchover:
            parts.append(command(constants.MIG_CMD_SWITCHOVER_START))
        # QEMU answers it once it has loaded the devices.
        ping = command(constants.MIG_CMD_PING, constants.U32.pack(LOADED))
        run = command(constants.MIG_CMD_POSTCOPY_RUN)
        package = command(constants.MIG_CMD_POSTCOPY_LISTEN) + self.devices + ping + run
        parts += [command(constants.MIG_CMD_PACKAGED, constants.U32.pack(len(package))), package, self.part()]
        return b"".join(parts)

    def part(self) -> bytes:
        """The header of a section with pages."""
        return constants.SECTION.pack(constants.QEMU_VM_SECTION_PART, self.number)

    def closing(self) -> bytes:
        """The end of that section, and of all."""
        end = constants.U64.pack(constants.RAM_SAVE_FLAG_EOS) + constants.FOOTER.pack(
            constants.QEMU_VM_SECTION_FOOTER, self.number
        )
        return (
            end
            + constants.SECTION.pack(constants.QEMU_VM_SECTION_END, self.number)
            + end
            + bytes((constants.QEMU_VM_EOF,))
        )

    def ask_bitmaps(self) -> bytes:
        """To a QEMU that takes up a lost channel: which pages has it?"""
        asks = [command(constants.MIG_CMD_RECV_BITMAP, _counted(name)) for name in self.blocks]
        return b"".join(asks)


def opening_of(file: StateFile) -> Opening:
    """What comes first of a state; NotLazy where it holds what postcopy cannot take."""
    facts = file.facts
    if facts is None:
        raise NoIndex("this .vmz has no index: it was packed with --any", "pack it anew: vm-compress")
    _require_simple(facts)
    records = file.head_records
    configuration = next(record for record in records if isinstance(record, Configuration))
    if "x-ignore-shared" in configuration.capabilities:
        raise NotLazy("the RAM of this state is not in it (x-ignore-shared)")
    blocks = next(record for record in records if isinstance(record, Blocks))
    if any(block.page_size for block in blocks.blocks) or facts["page"] != PAGE:
        raise NotLazy("the guest's RAM has pages of another size than 4 KiB")
    section = next(record for record in records if isinstance(record, Section))
    end = records[-1].offset + constants.FOOTER.size
    offset, size = facts["devices"]
    if size > constants.PACKAGE_LIMIT - 64:
        raise NotLazy(f"the devices of this state take {size} bytes, more than QEMU takes in one package")
    return Opening(
        head=bytes(file.read(0, records[records.index(configuration) + 1].offset)),
        start=bytes(file.read(section.offset, end - section.offset)),
        early=b"".join(bytes(file.read(*span)) for span in facts["early"]),
        devices=bytes(file.read(offset, size)),
        number=section.number,
        blocks={block.name: block.size for block in blocks.blocks},
        switchover=constants.MIG_CMD_SWITCHOVER_START in facts["commands"],
    )


def _require_simple(facts: dict[str, object]) -> None:
    if facts["sections"] != ["ram"]:
        raise NotLazy(f"the state holds more than RAM and devices: {facts['sections']}")
    if facts["deltas"] or facts["packed"]:
        raise NotLazy("pages of this state were sent as differences (xbzrle) or packed", "vm-dump saves without these")


def command(number: int, data: bytes = b"") -> bytes:
    return constants.COMMAND.pack(constants.QEMU_VM_COMMAND, number, len(data)) + data


def _counted(name: bytes) -> bytes:
    return bytes((len(name),)) + name


def _discard(name: bytes, size: int) -> bytes:
    data = b"\0" + _counted(name) + b"\0" + constants.U64.pack(0) + constants.U64.pack(size)
    return command(constants.MIG_CMD_POSTCOPY_RAM_DISCARD, data)


class Said(NamedTuple):
    """A message of QEMU.  kind: MIG_RP_MSG_*; start and size in bytes; bitmap: a bit a page, the lowest first."""

    kind: int
    block: bytes = b""
    start: int = 0
    size: int = 0
    value: int = 0
    bitmap: bytes = b""


class ReturnPath:
    """What QEMU says, out of its bytes as they come.  CannotDo where they make no sense."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._block = b""

    def feed(self, data: bytes) -> Iterator[Said]:
        self._data += data
        while (found := self._next()) is not None:
            yield found

    def _next(self) -> Said | None:
        data = self._data
        if len(data) < 4:
            return None
        kind, size = int.from_bytes(data[:2], "big"), int.from_bytes(data[2:4], "big")
        if size > 512:
            raise CannotDo(f"QEMU said something strange: message {kind} of {size} bytes")
        if len(data) < 4 + size:
            return None
        if kind == constants.MIG_RP_MSG_RECV_BITMAP:
            return self._bitmap(4 + size)
        payload = bytes(data[4 : 4 + size])
        del data[: 4 + size]
        return self._message(kind, payload)

    def _message(self, kind: int, payload: bytes) -> Said:
        if kind in (constants.MIG_RP_MSG_REQ_PAGES_ID, constants.MIG_RP_MSG_REQ_PAGES):
            if kind == constants.MIG_RP_MSG_REQ_PAGES_ID:
                self._block = payload[13:]
            start, size = int.from_bytes(payload[:8], "big"), int.from_bytes(payload[8:12], "big")
            return Said(kind, self._block, start, size)
        return Said(kind, value=int.from_bytes(payload[:4], "big"))

    def _bitmap(self, behind: int) -> Said | None:
        data = self._data
        if len(data) < behind + 8:
            return None
        size = int.from_bytes(data[behind : behind + 8], "big")
        if size > BITMAP_LIMIT:
            raise CannotDo(f"QEMU said something strange: a bitmap of {size} bytes")
        end = behind + 8 + size
        if len(data) < end + 8:
            return None
        if int.from_bytes(data[end : end + 8], "big") != BITMAP_END:
            raise CannotDo("QEMU said something strange: a bitmap without its end")
        found = Said(constants.MIG_RP_MSG_RECV_BITMAP, bytes(data[5:behind]), bitmap=bytes(data[behind + 8 : end]))
        del data[: end + 8]
        return found


def have_of(opening: Opening, bitmaps: dict[bytes, bytes]) -> dict[bytes, bytearray]:
    """A byte for each page, of QEMU's bitmaps: 1 where it has the page."""
    spread = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]
    found = {}
    for name, size in opening.blocks.items():
        pages = -(-size // PAGE)
        have = bytearray(b"".join(map(spread.__getitem__, bitmaps[name])))[:pages]
        found[name] = have + bytes(pages - len(have))
    return found
