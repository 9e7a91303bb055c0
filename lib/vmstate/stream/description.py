"""The end of a state: the end mark, the JSON description behind it, and the device sections that it describes.

QEMU's device sections have no lengths; the description tells the size of each.  A state has its end when its last bytes
are an end mark and a whole description, and the sections that lie before the mark are those which it describes.

Source of the format: migration/savevm.c (qemu_savevm_state_complete_precopy), migration/vmstate.c
(vmsd_desc_field_start).
"""

import json
import struct
from typing import Any, NamedTuple

from ..errors import Damaged
from ..io.descriptors import HOLD
from . import constants

FULL = bytes((constants.QEMU_VM_SECTION_FULL,))
FOOTER = bytes((constants.QEMU_VM_SECTION_FOOTER,))
# What values of a wrong kind or size lead to, in a description that was damaged or forged
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error)


class End(NamedTuple):
    """The end of a state.  Sizes are bytes; `devices` counts the device sections that were found before the end mark.

    tail: from the first of those sections to the end of the state.  runstate: that of the guest when it was saved.
    """

    tail: int
    description: int
    devices: int
    runstate: str


def description_at_end(data: bytes) -> tuple[int, int] | None:
    """Where `data` ends with an end mark and a description of fitting length: offsets of mark and JSON."""
    if data[-1:] != b"}":
        return None
    # JSON holds no NUL, and the length before it has one in its first byte (under 16 MiB) at the least.
    last_nul = data.rfind(b"\0")
    for start in range(max(last_nul + 1, constants.END.size), last_nul + 5):
        mark = start - constants.END.size
        if start < len(data) and data[start] == 0x7B:
            eof, tag, size = constants.END.unpack_from(data, mark)
            if (eof, tag, size) == (constants.QEMU_VM_EOF, constants.QEMU_VM_VMDESCRIPTION, len(data) - start):
                return mark, start
    return None


def find_end(data: bytes) -> End | None:
    """The end of the state whose last bytes are `data`; None where `data` does not end like a state.

    Raises Damaged where there is an end mark with a description, but sections and description do not fit each other.
    """
    place = description_at_end(data)
    if place is None:
        return None
    mark, start = place
    try:
        devices = json.loads(data[start:])["devices"]
        expected = [(str(device["name"]), int(device["instance_id"]), _size(device), device) for device in devices]
        return _match(data, mark, start, expected)
    except UNREADABLE as error:
        raise Damaged(f"the description at the end cannot be read: {error}") from error


def validate_end(data: bytes) -> End:
    """The end of the state whose last bytes are `data`; Damaged where it has none."""
    end = find_end(data)
    if end is None:
        raise Damaged(
            "the state is not whole: expected an end mark and the whole description of the devices as its last bytes, "
            f"found {data[-16:].hex(' ') or 'nothing'}"
        )
    return end


class Part(NamedTuple):
    """A device section: name, instance and version as in its header, its fields, and its description ({}: none)."""

    name: str
    instance: int
    version: int
    payload: memoryview
    described: dict[str, Any]


def sections(data: bytes, devices: list[dict[str, Any]], offset: int) -> list[Part]:
    """The device sections in `data`, which begins at `offset` of the stream, as `devices` describes them.

    Ends where `data` or `devices` end.  Damaged where a section is not the one described.
    """
    found: list[Part] = []
    at = 0
    try:
        for device in devices:
            if at == len(data):
                break
            part, at = _section(data, at, device, offset)
            found.append(part)
    except UNREADABLE as error:
        raise Damaged(f"the description at the end cannot be read: {error}") from error
    if at < len(data):
        raise Damaged(f"something the description does not have, at offset {offset + at}: found {data[at : at + 16]!r}")
    return found


def name_of(data: bytes) -> str:
    """The name of the device section that `data` begins with."""
    return data[6 : 6 + data[5]].decode("utf-8", "backslashreplace")


def undescribed(data: bytes, offset: int) -> Part:
    """The one device section in `data`, of which the description says nothing; what is in it cannot be told."""
    behind = 6 + data[5]
    name, footer = name_of(data), FOOTER + data[1:5]
    if len(data) < behind + 8 + len(footer) or data[-len(footer) :] != footer:
        text = f"no footer of section {name!r} at offset {offset + len(data) - len(footer)}: expected {footer.hex(' ')}"
        raise Damaged(f"{text}, found {data[-len(footer) :].hex(' ')}")
    instance, version = (int.from_bytes(data[at : at + 4], "big") for at in (behind, behind + 4))
    return Part(name, instance, version, memoryview(data)[behind + 8 : -len(footer)], {})


def _section(data: bytes, at: int, device: dict[str, Any], offset: int) -> tuple[Part, int]:
    """The section at `at`, and where the next one begins."""
    name, instance, size = str(device["name"]), int(device["instance_id"]), _size(device)
    header = bytes([len(name.encode())]) + name.encode() + constants.U32.pack(instance)
    begin = at + 5 + len(header) + 4
    if data[at : at + 1] != FULL or data[at + 5 : at + 5 + len(header)] != header or size < 0:
        found = data[at : at + 5 + len(header)]
        raise Damaged(f"no section {name!r} at offset {offset + at}: the description expects it, found {found!r}")
    footer = FOOTER + data[at + 1 : at + 5]
    if data[begin + size : begin + size + constants.FOOTER.size] != footer:
        found = data[begin + size : begin + size + constants.FOOTER.size]
        text = f"no footer of section {name!r} at offset {offset + begin + size}, where the description has its end: "
        raise Damaged(f"{text}expected {footer.hex(' ')}, found {found.hex(' ') or 'nothing'}")
    version = int.from_bytes(data[begin - 4 : begin], "big")
    if device.get("version", version) != version:
        text = f"section {name!r} at offset {offset + at} has version {version}, where the description has "
        raise Damaged(f"{text}{device['version']!r}"[:200])
    return Part(
        name, instance, version, memoryview(data)[begin : begin + size], device
    ), begin + size + constants.FOOTER.size


def _size(device: dict[str, Any]) -> int:
    """Bytes of a device's fields and subsections."""
    total = sum(int(field["size"]) * int(field.get("array_len", 1)) for field in device["fields"])
    return total + sum(_subsection_size(part) for part in device.get("subsections", ()))


def _subsection_size(part: dict[str, Any]) -> int:
    # tag, length of name, name, version
    return 1 + 1 + len(part["vmsd_name"].encode()) + 4 + _size(part)


def _match(data: bytes, mark: int, start: int, expected: list[tuple[str, int, int, dict[str, Any]]]) -> End:
    at, found, runstate = mark, 0, ""
    for name, instance, size, device in reversed(expected):
        header = bytes([len(name.encode())]) + name.encode() + constants.U32.pack(instance)
        # tag and section id before the name, version behind the instance, footer behind the fields
        first = at - (5 + len(header) + 4 + size + constants.FOOTER.size)
        if first < 0 and runstate and len(data) >= HOLD:
            # A device larger than all that is held (the pictures of a virtio-gpu): what is held is as it should be.
            return End(tail=len(data), description=len(data) - start, devices=found, runstate=runstate)
        if not _is_section(data, first, at, header):
            break
        if name == "globalstate":
            runstate = runstate_of(data[first + 5 + len(header) + 4 : at], device)
        at, found = first, found + 1
    if not runstate or not _begins_here(data, at, len(expected) - found):
        name = expected[-1 - found][0] if found < len(expected) else "globalstate"
        raise Damaged(f"the sections before the end mark are not those of the description: expected {name!r}")
    return End(tail=len(data) - at, description=len(data) - start, devices=found, runstate=runstate)


def _begins_here(data: bytes, at: int, missing: int) -> bool:
    """Whether the device part can begin at `at`: behind the footer of RAM, or of another section with rounds.

    Sections that are missing came before RAM (virtio-mem), so that RAM itself must be what ends here.
    """
    if at < 13 or data[at - 5] != constants.QEMU_VM_SECTION_FOOTER:
        return False
    return not missing or data[at - 13 : at - 5] == constants.U64.pack(constants.RAM_SAVE_FLAG_EOS)


def _is_section(data: bytes, first: int, behind: int, header: bytes) -> bool:
    if first < 0 or data[first] != constants.QEMU_VM_SECTION_FULL:
        return False
    tag, footer_id = constants.FOOTER.unpack_from(data, behind - constants.FOOTER.size)
    return (
        tag == constants.QEMU_VM_SECTION_FOOTER
        and data[first + 1 : first + 5] == constants.U32.pack(footer_id)
        and data[first + 5 : first + 5 + len(header)] == header
    )


def runstate_of(payload: bytes | memoryview, device: dict[str, Any]) -> str:
    """The run state in a globalstate section (migration/global_state.c)."""
    return _name(_field(payload, device, "runstate"))


def asleep(payload: bytes | memoryview, device: dict[str, Any]) -> bool:
    """Whether its guest slept, also where it was paused then (which QEMU tells from 9.0 on)."""
    was = _field(payload, device, "has_vm_was_suspended") + _field(payload, device, "vm_was_suspended")
    return runstate_of(payload, device) == "suspended" or was == b"\1\1"


def _field(payload: bytes | memoryview, device: dict[str, Any], name: str) -> bytes:
    at = 0
    for entry in device["fields"]:
        size = int(entry["size"]) * int(entry.get("array_len", 1))
        if entry["name"] == name:
            return bytes(payload[at : at + size])
        at += size
    return b""


def _name(field: bytes) -> str:
    return field.split(b"\0")[0].decode("ascii", "replace")


# Name, instance 0, version 1; then the size of the run state's name, and 32 letters for it.
GLOBAL_STATE = b"\x0bglobalstate" + bytes(7) + b"\1"


def claimed_runstate(sections: bytes) -> str:
    """The run state in device sections that have not been judged yet; "" where it is not found at once."""
    at = sections.rfind(GLOBAL_STATE)
    begin = at + len(GLOBAL_STATE) + 4
    return _name(sections[begin : begin + 32]) if at >= 0 else ""
