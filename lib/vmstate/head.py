"""The head of a state: magic, configuration, first commands and the list of RAM blocks, from its first kilobytes.

Source of the format: migration/savevm.c (qemu_savevm_state_header, vmstate_configuration), migration/ram.c
(ram_save_setup).
"""

from dataclasses import dataclass, field

from . import layout
from .errors import Damaged

# The block list of a guest with hundreds of devices has some 10 KiB.
ENOUGH = 256 << 10


class MoreNeeded(Exception):
    """The bytes given do not hold the whole head yet."""


@dataclass(frozen=True)
class Command:
    """A command of the stream, at `offset`, `size` bytes with its header."""

    number: int
    offset: int
    size: int


@dataclass(frozen=True)
class Head:
    """What the first bytes say.

    machine: the machine type's name.  capabilities: those that both sides must have.  commands: those before the first
    section.  blocks: name and size in bytes of each RAM block; empty where the list does not come first (early device
    sections of virtio-mem).  end: the offset behind the last command.
    """

    machine: str
    capabilities: tuple[str, ...]
    commands: tuple[Command, ...]
    blocks: tuple[tuple[str, int], ...] = field(default=())
    end: int = 0


class _Cursor:
    """Reads values from the first bytes; MoreNeeded where they end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise MoreNeeded
        self.at += count
        return piece

    def peek(self) -> int:
        if self.at >= len(self.data):
            raise MoreNeeded
        return self.data[self.at]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def name(self) -> str:
        return self.take(self.take(1)[0]).decode("utf-8", "backslashreplace")


def parse(data: bytes) -> Head:
    """The head at the start of `data`.

    Raises MoreNeeded when `data` is too short to tell, Damaged when it is not the start of a state.
    """
    cursor = _Cursor(data)
    _magic(cursor)
    machine, capabilities = _configuration(cursor)
    commands = _commands(cursor)
    end = cursor.at
    return Head(machine, capabilities, commands, _blocks(cursor), end)


def foreign(data: bytes) -> bool:
    """True where `data` cannot be the start of a state."""
    return data[:4] != layout.MAGIC[: len(data)]


def _magic(cursor: _Cursor) -> None:
    if foreign(cursor.data):
        raise Damaged(f"no state of a guest: expected 'QEVM' at offset 0, found {cursor.data[:4]!r}"[:200])
    cursor.take(4)
    version = cursor.u32()
    if version != layout.VERSION:
        raise Damaged(f"unknown version at offset 4: expected {layout.VERSION}, found {version}")


def _configuration(cursor: _Cursor) -> tuple[str, tuple[str, ...]]:
    if cursor.peek() != layout.QEMU_VM_CONFIGURATION:
        raise Damaged(f"no configuration at offset {cursor.at}: expected tag 0x07, found {cursor.peek():#04x}")
    cursor.take(1)
    size = cursor.u32()
    if size > 255:
        raise Damaged(f"name of machine at offset {cursor.at - 4}: expected at most 255 bytes, found {size}")
    machine = cursor.take(size).decode("utf-8", "backslashreplace")
    capabilities: tuple[str, ...] = ()
    while cursor.peek() == layout.QEMU_VM_SUBSECTION:
        capabilities += _configuration_subsection(cursor)
    return machine, capabilities


def _configuration_subsection(cursor: _Cursor) -> tuple[str, ...]:
    at = cursor.at
    cursor.take(1)
    name = cursor.name()
    cursor.u32()
    if name == "configuration/target-page-bits":
        cursor.u32()
    elif name == "configuration/uuid":
        cursor.take(16)
    elif name == "configuration/capabilities":
        return tuple(cursor.name() for _ in range(cursor.u32()))
    else:
        raise Damaged(f"unknown part of the configuration at offset {at}: {name!r}")
    return ()


def _commands(cursor: _Cursor) -> tuple[Command, ...]:
    found = []
    while cursor.peek() == layout.QEMU_VM_COMMAND:
        at = cursor.at
        _, number, size = layout.COMMAND.unpack(cursor.take(layout.COMMAND.size))
        cursor.take(size)
        found.append(Command(number, at, cursor.at - at))
    return tuple(found)


def _blocks(cursor: _Cursor) -> tuple[tuple[str, int], ...]:
    at = cursor.at
    tag = cursor.take(1)[0]
    if tag not in (layout.QEMU_VM_SECTION_START, layout.QEMU_VM_SECTION_FULL):
        raise Damaged(f"no section at offset {at}: expected tag 0x01 or 0x04, found {tag:#04x}")
    cursor.u32()
    if tag != layout.QEMU_VM_SECTION_START or cursor.name() != "ram":
        return ()
    cursor.take(8)
    total = cursor.u64()
    if total & layout.RAM_FLAGS != layout.RAM_SAVE_FLAG_MEM_SIZE:
        raise Damaged(f"no list of RAM blocks at offset {cursor.at - 8}: found {total:#x}")
    return _block_list(cursor, total & ~layout.RAM_FLAGS)


def _block_list(cursor: _Cursor, total: int) -> tuple[tuple[str, int], ...]:
    found = []
    while total > 0:
        at = cursor.at
        name, size = cursor.name(), cursor.u64()
        found.append((name, size))
        total -= size
        if total < 0 or not size:
            raise Damaged(f"list of RAM blocks at offset {at}: {name!r} of {size} bytes does not fit the total")
    return tuple(found)
