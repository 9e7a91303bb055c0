"""A state as a page for a person: what `vm-inspect` prints."""

from collections.abc import Iterator
from typing import Any

from ..report import size_words
from ..stream.device_values import Device, Struct
from .summary import Difference, Survey, label

WIDTH = 64
BYTES = 16
SHOWN = 8


def page(survey: Survey) -> Iterator[str]:
    """The lines of the page."""
    values = survey.values()
    yield f"{values['machine']}, saved while {_words_of_run(values['runstate'])}"
    ram = sum(block["bytes"] for block in values["blocks"])
    yield f"  {size_words(ram)} of RAM in {values['bytes']:,} bytes of stream; {values['how']}"
    yield f"  written by QEMU {values['qemu']}; a machine type of {_words_of_machine(values['machine'])}"
    extras = {name: ", ".join(values[name]) for name in ("capabilities", "commands") if values[name]}
    extras |= {name: values[name] for name in ("uuid", "deltas", "packed") if values[name]}
    yield from (f"  {name}: {text}" for name, text in extras.items())
    yield ""
    yield from _table(_blocks(values["blocks"]), "<>>>>>>")
    for head, rows, align in (("vCPU", _vcpus(values["vcpus"]), "><<<"), ("NIC", _nics(values["nics"]), "<<<<")):
        if rows:
            yield ""
            yield from _table([[head, *rows[0]], *rows[1:]], align)
    yield ""
    yield from _table(_devices(survey), "<>>>")


def _words_of_run(runstate: str) -> str:
    return {"running": "it ran", "paused": "it stood paused"}.get(runstate, f"'{runstate}'")


def _words_of_machine(machine: str) -> str:
    version = machine.rpartition("-")[2]
    return f"QEMU {version}" if version[:1].isdigit() else "any QEMU (no version in its name)"


def _blocks(blocks: list[dict[str, Any]]) -> list[list[str]]:
    names = ("normal", "duplicate", "zero", "rewritten", "unsent")
    rows = [["RAM block", "size", *names]]
    cells = [["-" if b[name] is None else f"{b[name]:,}" for name in names] for b in blocks]
    return rows + [[b["name"], size_words(b["bytes"]), *row] for b, row in zip(blocks, cells, strict=True)]


def _vcpus(found: list[dict[str, Any]]) -> list[list[str]]:
    if not found:
        return []
    names = [name for name in ("mode", "rip", "pc", "cr3", "sp") if any(name in cpu for cpu in found)]
    rows = [[name.upper() if name != "mode" else name for name in names]]
    return rows + [[str(cpu["index"]), *(_register(cpu.get(name)) for name in names)] for cpu in found]


def _register(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else f"{value:#x}"


def _nics(found: list[dict[str, Any]]) -> list[list[str]]:
    rows = [[card["mac"] or "MAC not known", card["model"], card["pci"], card["name"]] for card in found]
    return [["model", "PCI", "section"], *rows] if rows else []


def _devices(survey: Survey) -> list[list[str]]:
    rows = [["device", "instance", "version", "bytes"]]
    for part, device in zip(survey.state.parts, survey.devices, strict=True):
        rows.append([part.name, str(part.instance), str(part.version), f"{device.size:,}"])
    return rows


def _table(rows: list[list[str]], align: str) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=False)]
        yield "  ".join(cells).rstrip()


def fields(device: Device, version: int) -> Iterator[str]:
    """Every field of one device."""
    yield f"{label(device.name, device.instance)}, version {version}, {device.size:,} bytes"
    if device.root is None:
        yield from _dump(device.raw, "  ")
    else:
        yield from _struct(device.root, "  ")


def _struct(struct: Struct, indent: str) -> Iterator[str]:
    for field in struct.fields:
        yield from _value(field.name, field.type, field.value, indent)
    for part in struct.subsections:
        yield f"{indent}subsection {part.name}, version {part.version}"
        yield from _struct(part, indent + "  ")


def _value(name: str, kind: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, Struct):
        yield f"{indent}{name} ({value.name})"
        yield from _struct(value, indent + "  ")
    elif isinstance(value, list) and any(isinstance(element, Struct) for element in value):
        for number, element in enumerate(value):
            yield from _value(f"{name}[{number}]", kind, element, indent)
    elif isinstance(value, bytes) and len(value) > BYTES:
        yield f"{indent}{name} ({kind}, {len(value):,} bytes)"
        yield from _dump(value, indent + "  ")
    else:
        yield f"{indent}{name} ({kind}) = {short(value)}"


def _dump(data: bytes, indent: str) -> Iterator[str]:
    """Bytes in lines of 16; lines that repeat the one before are left out."""
    last = None
    for at in range(0, len(data), BYTES):
        line = data[at : at + BYTES]
        if line != last:
            yield f"{indent}{at:#06x}  {line.hex(' ')}"
        elif at + BYTES >= len(data):
            yield f"{indent}{at:#06x}  the same up to {len(data):#x}"
        last = line


def short(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, bytes):
        text = value[:BYTES].hex(" ") + (f" ... ({len(value)} bytes)" if len(value) > BYTES else "")
        return text or "nothing"
    if isinstance(value, list):
        words = ", ".join(short(element) for element in value[:BYTES])
        return f"[{words}{f', ... ({len(value)})' if len(value) > BYTES else ''}]"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 9:
        return f"{value} ({value:#x})"
    return "nothing" if value is None else str(value)


def differences(found: Difference, size: int) -> Iterator[str]:
    """What differs between two states; pages have `size` bytes."""
    for name, runs in found.pages.items():
        if runs is None:
            yield f"RAM block {name}: only one of the states has it"
        elif runs:
            count = sum(pages for _, pages in runs)
            yield f"RAM block {name}: {count:,} pages differ ({size_words(count * size)}), in {len(runs):,} places"
            yield from (f"  {begin * size:#x} to {(begin + pages) * size:#x}" for begin, pages in runs[:SHOWN])
            if len(runs) > SHOWN:
                yield f"  and {len(runs) - SHOWN:,} more (--json has all)"
    device = None
    for name, path, before, after in found.fields:
        if name != device:
            yield f"device {name}:"
            device = name
        yield f"  {path or 'bytes'}: {short(before)} -> {short(after)}"
