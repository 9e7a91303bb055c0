"""The validator: whether records come in an order that makes a whole state, and what that state is.

The reader has proven the grammar; here are the rules that span records: each section's rounds, every page of every
block, the device sections against the description, nothing behind the end.
"""

import json
from collections.abc import Callable
from typing import Any

from ..errors import Damaged
from ..io.readers import Reader
from . import constants
from .description import UNREADABLE, Part, asleep, name_of, runstate_of, sections, undescribed
from .devices import parse_description
from .page_map import PageMap
from .reader import StateReader
from .records import Blocks, Command, Configuration, Description, Devices, EndMark, Packed, Pages, Record, Section

# Sections that tell that pages may be missing: unplugged memory, pages that the guest said are free
GAPS = ("virtio-mem", "virtio-balloon-device/free-page-report")
# The one device with a section before the rounds of RAM, which the description may leave out
EARLY = "virtio-mem-device-early"
# The commands of a state that is whole; the others belong to a move that goes on in postcopy, or to COLO.
WHOLE = (
    constants.MIG_CMD_OPEN_RETURN_PATH,
    constants.MIG_CMD_PING,
    constants.MIG_CMD_POSTCOPY_ADVISE,
    constants.MIG_CMD_SWITCHOVER_START,
)
# Forged states could scatter a page a chunk over any size of RAM.
SPARSE_LIMIT = 128 << 20
RESUME = "this is the channel of a postcopy move: no whole state is in it"


class State:
    """What a stream holds.

    size: bytes.  maps: of each RAM block.  parts: the device sections.  rounds: RAM sections with pages.
    background: saved by background-snapshot.
    """

    def __init__(self) -> None:
        self.machine = ""
        self.capabilities: tuple[str, ...] = ()
        self.uuid: bytes | None = None
        self.page = 1 << constants.PAGE_BITS
        self.commands: list[int] = []
        self.maps: dict[bytes, PageMap] = {}
        self.sections: list[str] = []
        self.rounds = self.deltas = self.packed = 0
        self.background = False
        self.parts: list[Part] = []
        self.description: dict[str, Any] = {}
        self.runstate = ""
        self.asleep = False
        self.size = 0


class Validator:
    """`see` each record in its turn; `state` is what they make, once the last one has been seen.  Raises Damaged."""

    def __init__(self) -> None:
        self.state = State()
        self.ended = False
        self._open: dict[int, str] = {}
        self._devices: list[Devices] = []
        self._looks: dict[type[Record], Callable[[Any], None]] = {
            Pages: self._see_pages,
            Packed: self._see_packed,
            Section: self._see_section,
            Blocks: self._see_blocks,
            Configuration: self._see_configuration,
            Command: self._see_command,
            Devices: self._see_devices,
            EndMark: self._see_end,
            Description: self._see_description,
        }

    def see(self, record: Record) -> None:
        if look := self._looks.get(type(record)):
            look(record)

    def _see_pages(self, record: Pages) -> None:
        page_map = self.state.maps[record.block.name]
        for address, count in record.runs:
            page_map.mark(address, count, record.zero)
        if page_map.held > SPARSE_LIMIT and page_map.covered < page_map.held // 8:
            where = f"RAM block {page_map.block.text!r}, at offset {record.offset}"
            raise Damaged(f"pages are scattered all over {where}: {page_map.covered} of {page_map.pages}")

    def _see_blocks(self, record: Blocks) -> None:
        self.state.maps = {block.name: PageMap(block, self.state.page) for block in record.blocks}

    def _see_packed(self, record: Packed) -> None:
        page_map = self.state.maps[record.block.name]
        if record.flag == constants.RAM_SAVE_FLAG_XBZRLE:
            if not page_map.sent(record.address):
                where = f"{record.address:#x} of {record.block.text!r}"
                raise Damaged(f"delta at offset {record.offset} of a page that was not sent before: {where}")
            self.state.deltas += 1
        else:
            self.state.packed += 1
        page_map.mark(record.address, 1, False)

    def _see_configuration(self, record: Configuration) -> None:
        self.state.machine = record.machine.decode("utf-8", "backslashreplace")
        self.state.capabilities = record.capabilities
        self.state.uuid = record.part(b"uuid")
        if (bits := record.part(b"target-page-bits")) is not None:
            self.state.page = 1 << int.from_bytes(bits, "big")

    def _see_command(self, record: Command) -> None:
        self.state.commands.append(record.number)
        if record.number not in WHOLE:
            hint = "only the QEMU at the other end could resume it; save the guest with vm-dump"
            raise Damaged(f"{RESUME}: found command {record.number} at offset {record.offset}", hint)

    def _see_section(self, record: Section) -> None:
        if record.tag == constants.QEMU_VM_SECTION_START:
            assert record.name is not None
            name = record.name.decode("utf-8", "backslashreplace")
            if record.name == b"ram" and (record.instance, record.version) != (0, 4):
                found = f"instance {record.instance}, version {record.version}"
                raise Damaged(
                    f"section of RAM at offset {record.offset}: expected instance 0, version 4, found {found}"
                )
            self._open[record.number] = name
            self.state.sections.append(name)
            return
        open_name = self._open.get(record.number)
        if open_name is None:
            raise Damaged(f"section {record.number} at offset {record.offset} goes on behind its end")
        if record.tag == constants.QEMU_VM_SECTION_END:
            del self._open[record.number]
        self.state.rounds += open_name == "ram"

    def _see_devices(self, record: Devices) -> None:
        self._devices.append(record)
        if record.early:
            return
        if "ram" not in self.state.sections:
            raise Damaged(f"device sections at offset {record.offset}, but no section of RAM before them")
        still = set(self._open.values())
        # What a background snapshot looks like: its RAM has no end of its own.
        self.state.background = still == {"ram"} and self.state.sections == ["ram"]
        if still and not self.state.background:
            raise Damaged(f"device sections at offset {record.offset}, but section {sorted(still)[0]!r} has not ended")

    def _see_end(self, record: EndMark) -> None:
        if not self._devices or self._devices[-1].early:
            raise Damaged(f"end mark at offset {record.offset}, but no device sections before it")

    def _see_description(self, record: Description) -> None:
        state = self.state
        state.size = record.offset + 5 + len(record.data)
        try:
            take_devices(state, self._devices, record)
            self._validate_pages()
        except UNREADABLE as error:
            raise Damaged(f"the description at offset {record.offset} cannot be read: {error}") from error
        self.ended = True

    def _validate_pages(self) -> None:
        if "x-ignore-shared" in self.state.capabilities or any(
            gap in json.dumps(self.state.description) for gap in GAPS
        ):
            return
        for page_map in self.state.maps.values():
            if page_map.covered < page_map.pages:
                missing = page_map.pages - page_map.covered
                where = f"RAM block {page_map.block.text!r}, the first at {page_map.first_unsent():#x}"
                text = f"{missing} of {page_map.pages} pages are not in the state: {where}"
                raise Damaged(text, "a state saved with multifd has its pages elsewhere; vm-dump saves without it")


def take_devices(state: State, records: list[Devices], description: Description) -> None:
    """Description, parts and run state of `state`, from the device sections; Damaged where they do not fit each other.

    Raises `UNREADABLE` where the description cannot be read.
    """
    state.description = parse_description(description.data)
    devices = list(state.description["devices"])
    names = {str(device["name"]) for device in devices}
    rest = devices
    for record in records:
        if record.early and (name := name_of(record.data)).endswith(EARLY) and name not in names:
            state.parts.append(undescribed(record.data, record.offset))
            continue
        found = sections(record.data, rest, record.offset)
        state.parts, rest = state.parts + found, rest[len(found) :]
    if rest:
        name = rest[0].get("name")
        raise Damaged(f"end mark at offset {description.offset - 1}, but the description expects section {name!r}")
    for part in state.parts:
        if part.name == "globalstate":
            state.runstate = runstate_of(part.payload, part.described)
            state.asleep = asleep(part.payload, part.described)
    if not state.runstate:
        raise Damaged("no section 'globalstate' with a run state before the end mark")


def validate(
    source: Reader,
    sink: Callable[[memoryview], object] | None = None,
    see: Callable[[Record], object] | None = None,
    settle: Callable[[State], object] | None = None,
) -> State:
    """Read a whole state, to the end of the input; Damaged where it is none.

    What has been found good goes to `sink`, the device sections and all behind them only once the input has proven its
    end and `settle` has been called.  `see` is shown every record.
    """
    reader, validator = StateReader(source, sink), Validator()
    for record in reader:
        validator.see(record)
        if see:
            see(record)
    if not validator.ended:
        raise Damaged(f"the state ends at offset {reader.window.offset} without a description of its devices")
    reader.expect_end()
    if settle:
        settle(validator.state)
    reader.window.flush()
    return validator.state
