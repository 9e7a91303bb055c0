"""The fields of a device as values: found by their path, and as JSON."""

from typing import Any, NamedTuple

NULL = b"0"  # in place of what a null pointer of an array would point to


class Field(NamedTuple):
    """One field: `size` bytes at `offset` of the payload, all elements together.

    type: QEMU's own name, such as "uint32", "struct", "buffer", "pci config".
    value: an int, bool, Struct; bytes for buffers and for types with an encoding of their own; None for a null pointer
    in an array; a list of those for arrays and lists.
    """

    name: str
    type: str
    offset: int
    size: int
    value: Any


class Struct(NamedTuple):
    """A description of QEMU (vmsd) and the fields that it wrote, in the order of the stream."""

    name: str
    version: int
    fields: tuple[Field, ...]
    subsections: tuple["Struct", ...]

    @property
    def size(self) -> int:
        """Bytes in the stream, without the header that a subsection has."""
        # before a subsection: tag, length of name, name, version
        below = sum(2 + len(part.name.encode()) + 4 + part.size for part in self.subsections)
        return sum(field.size for field in self.fields) + below


class Device(NamedTuple):
    """One device section; `size` is that of its payload `raw`, in bytes.

    version: 0 where the description does not tell, which is so for old-style devices.
    root: None where the payload is not decoded.
    """

    name: str
    instance: int
    version: int
    size: int
    root: Struct | None
    raw: bytes


def find_field(device: Device, path: str) -> Field:
    """The field at `path`, such as "env.cr[0]", "parent_obj.config[0]", "cpu/xsave.env.xcr0", "ports[2].regs.cmd".

    Names may have dots and brackets of their own.  Subsections have their full names.  An element of an array is a
    Field of its own.  Raises LookupError.
    """
    found = _find(device.root, path) if device.root else None
    if found is None:
        raise LookupError(f"no field {path!r} in {device.name!r}")
    return found


def to_json(device: Device) -> dict[str, Any]:
    """Everything in types of JSON: bytes are hexadecimal, structs have name, version, fields, subsections."""
    plain = {"name": device.name, "instance": device.instance, "version": device.version, "size": device.size}
    if device.root is None:
        return {**plain, "raw": device.raw.hex()}
    return {**plain, "fields": _plain(device.root)["fields"], "subsections": _plain(device.root)["subsections"]}


def _plain(value: Any) -> Any:
    match value:
        case Struct():
            fields = [
                {"name": f.name, "type": f.type, "offset": f.offset, "size": f.size, "value": _plain(f.value)}
                for f in value.fields
            ]
            parts = [_plain(part) for part in value.subsections]
            return {"name": value.name, "version": value.version, "fields": fields, "subsections": parts}
        case bytes():
            return value.hex()
        case list():
            return [_plain(element) for element in value]
    return value


def _find(where: Struct, path: str) -> Field | None:
    """The longest name that leads to something wins: "mac_reg[0]" may be a field of its own."""
    parts: list[Field | Struct] = [*where.fields, *where.subsections]
    begun = [part for part in parts if path.startswith(part.name) and path[len(part.name) :][:1] in ("", ".", "[")]
    for part in sorted(begun, key=lambda part: len(part.name), reverse=True):
        rest = path[len(part.name) :]
        found = _below(part, rest) if isinstance(part, Field) else _find(part, rest[1:])
        if found:
            return found
    return None


def _below(field: Field, rest: str) -> Field | None:
    if not rest:
        return field
    if rest[0] == ".":
        return _find(field.value, rest[1:]) if isinstance(field.value, Struct) else None
    index, bracket, rest = rest[1:].partition("]")
    if not (bracket and index.isdecimal() and isinstance(field.value, list)) or len(index) > 9:
        return None
    return _below(_element(field, int(index)), rest) if int(index) < len(field.value) else None


def _element(field: Field, index: int) -> Field:
    """Between elements there may be marks; where they are, elements have fields, which know their place."""
    nulls = field.value.count(None)
    even = (field.size - nulls) // max(1, len(field.value) - nulls)
    sizes = [v.size if isinstance(v, Struct) else len(NULL) if v is None else even for v in field.value[: index + 1]]
    value, offset = field.value[index], field.offset + sum(sizes[:-1])
    if isinstance(value, Struct) and value.fields:
        offset = value.fields[0].offset
    return Field(f"{field.name}[{index}]", field.type, offset, sizes[-1], value)
