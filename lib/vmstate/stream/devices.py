"""Every field of every device section, decoded by the JSON description at the end of a state.

A payload is what lies between the header and the footer of a device section.  It has neither names nor lengths; the
description has both.  All that is read here may be forged: work and memory are bounded by the length of the payload.

Source of the format: migration/vmstate.c (vmstate_save_state_v, vmsd_desc_field_start, vmstate_subsection_save),
migration/vmstate-types.c (the encodings; put_tmp, put_qtailq, put_qlist, put_gtree).
"""

import json
import struct
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from ..errors import Damaged
from . import constants
from .description import UNREADABLE, Part, description_at_end, find_end, sections
from .device_values import NULL, Device, Field, Struct

# By the first word of the type, since "int32 le" and "uint8 equal" name a check of the loader; all are big-endian.
NAMES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 timer"
NUMBERS = dict(zip(NAMES.split(), "?bhiqBHIQq", strict=True))
DEPTH = 50  # structs in structs; QEMU has less than ten


def parse_description(text: bytes) -> dict[str, Any]:
    """The description as dicts and lists, with "elements" where QEMU wrote keys of structs flat into a field.

    Those are fields of the types vstruct, tmp, qtailq, qlist, gtree.  A list repeats vmsd_name, version, fields and
    subsections for each of its elements; "elements" has one dict for each.  Raises Damaged.
    """
    try:
        description = json.loads(text, object_pairs_hook=_object)
    except UNREADABLE as error:
        raise Damaged(f"the description at the end cannot be read: {error}") from error
    if not isinstance(description, dict):
        raise Damaged("the description at the end cannot be read: it is no object")
    return description


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if "type" not in plain or "vmsd_name" not in plain:
        return plain
    elements: list[dict[str, Any]] = []
    for key, value in pairs:
        if key == "vmsd_name":
            elements.append({})
        if elements and key in ("vmsd_name", "version", "fields", "subsections"):
            elements[-1][key] = value
    return {**plain, "elements": elements}


def decode(device: dict[str, Any], payload: bytes | memoryview) -> Device:
    """A device section: its entry in the description's "devices", as of parse_description, and its payload.

    Raises Damaged where entry and payload do not fit each other.
    """
    reader = _Reader(bytes(payload))
    try:
        reader.name = _text(device["name"])
        # Old-style devices are one buffer, and have no name of a description.
        shape = {"vmsd_name": device["name"], "version": 0, **device}
        root = reader.struct(shape)
        if reader.at != len(reader.data):
            raise reader.damage(f"{len(reader.data) - reader.at} bytes more than described")
        return Device(reader.name, _count(device["instance_id"]), root.version, reader.at, root, reader.data)
    except UNREADABLE as error:
        raise reader.damage(f"its description cannot be read: {error!r:.200}") from error


def decode_part(part: Part) -> Device:
    """`decode` for a section found in a stream; one without a description is left as bytes."""
    if not part.described:
        return Device(part.name, part.instance, part.version, len(part.payload), None, bytes(part.payload))
    return decode(part.described, part.payload)


def devices_at_end(data: bytes) -> list[Device] | None:
    """The device sections of the state whose last bytes are `data`; None where `data` does not end like a state.

    Raises Damaged where there is an end, but the sections do not fit their description.
    """
    end, place = find_end(data), description_at_end(data)
    if end is None or place is None:
        return None
    mark, start = place
    part = data[len(data) - end.tail : mark]
    described = parse_description(data[start:])["devices"][-end.devices :]
    return [decode_part(found) for found in sections(part, described, 0)]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.50} is no name")
    value.encode()  # JSON can hold halves of surrogate pairs
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{value!r:.50} is no number of anything")
    return value


class _Reader:
    """Goes once through a payload; `at` is where it stands."""

    def __init__(self, data: bytes) -> None:
        self.name, self.data, self.at = "?", data, 0
        # Arrays of structs with empty fields could multiply a small description; bytes in eight structs each cannot.
        self.left = 10_000 + 8 * len(data)

    def damage(self, what: str) -> Damaged:
        return Damaged(f"device {self.name!r:.255}, byte {self.at} of {len(self.data)}: {what}")

    def need(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise self.damage(f"{size} bytes are described, {len(self.data) - self.at} are there")

    def take(self, size: int) -> bytes:
        self.need(size)
        self.at += size
        return self.data[self.at - size : self.at]

    def struct(self, shape: dict[str, Any], depth: int = 0) -> Struct:
        """A struct with its subsections behind it, which come last and are not marked otherwise."""
        if depth > DEPTH:
            raise self.damage("structs in structs without end")
        groups = groupby(shape["fields"], key=lambda entry: _text(entry["name"]))
        fields = tuple(self.group(name, list(entries), depth) for name, entries in groups)
        subsections = tuple(self.subsection(part, depth + 1) for part in shape.get("subsections", ()))
        return Struct(_text(shape["vmsd_name"]), _count(shape["version"]), fields, subsections)

    def subsection(self, shape: dict[str, Any], depth: int) -> Struct:
        name = _text(shape["vmsd_name"])
        expected = bytes([constants.QEMU_VM_SUBSECTION, len(name.encode())]) + name.encode()
        if self.data[self.at : self.at + len(expected)] != expected:
            raise self.damage(f"there is no subsection {name!r:.255}")
        self.take(len(expected))
        (version,) = constants.U32.unpack(self.take(constants.U32.size))
        if version != shape["version"]:
            raise self.damage(f"subsection {name!r} has version {version}, not {shape['version']!r:.50}")
        return self.struct(shape, depth)

    def group(self, name: str, entries: list[dict[str, Any]], depth: int) -> Field:
        """Entries with one name are elements of one array: QEMU makes the names of other fields unique.

        There is one entry for each element, or one for each run of null pointers and of others.
        """
        start = self.at
        read = [self.entry(entry, depth) for entry in entries]
        kinds = [_text(entry["type"]) for entry in entries]
        kind = next((kind for kind in kinds if kind != "nullptr"), kinds[0])
        if len(entries) == 1 and not {"array_len", "index"} & entries[0].keys():
            return Field(name, kind, start, self.at - start, read[0][0])
        return Field(name, kind, start, self.at - start, [value for values in read for value in values])

    def entry(self, entry: dict[str, Any], depth: int) -> list[Any]:
        """The values of an entry of the description: "array_len" of them, of "size" bytes each."""
        size, number = _count(entry["size"]), _count(entry.get("array_len", 1))
        self.need(size * number)
        self.left -= 1
        if self.left < 0:
            raise self.damage("more fields are described than it can hold")
        code = NUMBERS.get(entry["type"].split(" ")[0])
        if code and size == struct.calcsize(f">{code}"):
            return list(struct.unpack(f">{number}{code}", self.take(size * number)))
        return [self.value(entry, size, depth + 1) for _ in range(number if size else min(number, 1))]

    def value(self, entry: dict[str, Any], size: int, depth: int) -> Any:
        """Anything but a number, exactly `size` bytes of it."""
        end = self.at + size
        value = self.parts(entry, depth)
        if value is None:
            taken = self.take(size)
            # "struct": {} until QEMU 9.1
            null = taken == NULL and (entry["type"] == "nullptr" or "struct" in entry)
            return None if null else taken
        if self.at != end:
            raise self.damage(f"{entry['name']!r:.255} has {size} bytes, its parts have {size + self.at - end}")
        return value

    def parts(self, entry: dict[str, Any], depth: int) -> Struct | list[Any] | None:
        """What has fields of its own; None for all else."""
        kind, elements = entry["type"], entry.get("elements", ())
        if kind == "struct" and entry["struct"]:
            return self.struct(entry["struct"], depth)
        if kind in ("vstruct", "tmp") and elements:
            return self.struct(elements[0], depth)
        if kind in ("qtailq", "qlist"):
            return list(self.chain(elements, depth))
        if kind == "gtree":
            return list(self.tree(elements, depth))
        if kind == "bitmap" and entry["size"] % 8 == 0:
            return list(struct.unpack(f">{entry['size'] // 8}Q", self.take(entry["size"])))
        return None

    def chain(self, elements: list[dict[str, Any]], depth: int) -> Iterator[Struct]:
        """A one before each element, a zero behind the last."""
        for shape in elements:
            self.mark(1)
            yield self.struct(shape, depth)
        self.mark(0)

    def tree(self, elements: list[dict[str, Any]], depth: int) -> Iterator[Any]:
        """Keys and values in turn, behind their number.  A key is a struct, or a word that nothing describes."""
        (number,) = constants.U32.unpack(self.take(constants.U32.size))
        bare = len(elements) == number
        if not bare and len(elements) != 2 * number:
            raise self.damage(f"a tree of {number} has {len(elements)} structs")
        for i, shape in enumerate(elements):
            if bare or i % 2 == 0:
                self.mark(1)
            if bare:
                yield constants.U64.unpack(self.take(constants.U64.size))[0]
            yield self.struct(shape, depth)
        self.mark(0)

    def mark(self, expected: int) -> None:
        if self.take(1)[0] != expected:
            self.at -= 1
            raise self.damage("a list has more or fewer elements than described")
