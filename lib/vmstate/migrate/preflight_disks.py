"""Whether the disks of both sides are the same."""

from collections.abc import Callable, Iterator
from typing import Any

from ..qemu.incoming import DEVICES
from ..qemu.inventory import Facts as Facts
from .finding import THERE, Finding, new_error, new_warning

KINDS: dict[str, Callable[[Any], str]] = {
    "format": lambda name: f"format {name}",
    "size": lambda size: f"{size} bytes",
    "ro": lambda ro: "read-only" if ro else "writable",
}
ONE_IMAGE = "both must have one image open: on shared storage, or the same device"


def compare_disks(source: Facts, there: Facts) -> Iterator[Finding]:
    one_host = bool(source.get("host")) and source.get("host") == there.get("host")
    left = list(there["disks"])
    for disk, other in _pairs(source["disks"], left):
        if other is not None:
            left.remove(other)
            yield from _disk(disk, other, one_host)
        elif disk["medium"]:
            yield new_error(f"{_name(disk)} is not there", f"{THERE} -drive or -blockdev, and the same -device")
    for disk in left:
        if disk["medium"] or not disk.get("removable"):
            yield new_error(
                f"{_name(disk)} is there, and the guest has no such disk", "start the QEMU there without it"
            )


def _pairs(disks: list[Facts], there: list[Facts]) -> list[tuple[Facts, Facts | None]]:
    """Each disk of the guest with the one there at the same place or, failing that, of the same name."""
    left = list(there)
    found: dict[int, Facts] = {}
    for key in ("at", "device", "node"):
        for number, disk in enumerate(disks):
            same = next((other for other in left if disk.get(key) and other.get(key) == disk[key]), None)
            if number not in found and same is not None:
                found[number] = same
                left.remove(same)
    return [(disk, found.get(number)) for number, disk in enumerate(disks)]


def _name(disk: Facts) -> str:
    name = f"disk '{disk.get('device') or disk.get('node') or disk.get('at') or 'without a name'}'"
    return f"{name} ({disk['medium']['name']})" if disk.get("medium") else name


def _disk(disk: Facts, other: Facts, one_host: bool) -> Iterator[Finding]:
    for key in ("device", "node"):
        if disk.get(key) != other.get(key):
            text = f"{_name(disk)} has another name there: expected '{disk.get(key)}', found '{other.get(key)}'"
            yield new_warning(text, f"{THERE} id and node-name in -drive and -blockdev")
    # Where a PCI device is, has been compared.
    if disk.get("at") and other.get("at") and disk["at"] != other["at"] and " " in disk["at"] + other["at"]:
        text = f"{_name(disk)} is elsewhere there: expected at {disk['at']}, found at {other['at']}"
        yield new_error(text, DEVICES)
    medium, found = disk["medium"], other["medium"]
    if medium and found:
        yield from _media(disk, medium, found, one_host)
    elif medium:
        yield new_error(f"{_name(disk)} has no medium there", "insert it there: blockdev-change-medium")
    elif found:
        yield new_warning(f"{_name(other)} has a medium there only", "eject it there, or the guest finds it inserted")


def _media(disk: Facts, ours: Facts, theirs: Facts, one_host: bool) -> Iterator[Finding]:
    name = _name(disk)
    if ours.get("temporary"):
        text = f"{name}: what the guest writes is in a temporary file, which nobody else can open"
        yield new_error(text, "start the guest without -snapshot, or copy the disk to where both see it (drive-mirror)")
    if theirs.get("temporary"):
        text = f"{name}: what the guest would write there is in a temporary file, and lost with its end"
        yield new_error(text, "start the QEMU there without -snapshot")
    if ours.get("temporary") or theirs.get("temporary"):
        return
    for key, words in KINDS.items():
        if key in ours and key in theirs and ours[key] != theirs[key]:
            text = f"{name} differs there: expected {words(ours[key])}, found {words(theirs[key])}"
            yield new_error(text, ONE_IMAGE if key == "size" else f"{THERE} -drive or -blockdev")
    # What is in a flash of firmware travels with the guest.
    if ours.get("size") == theirs.get("size") and not str(disk.get("type")).startswith("cfi.pflash"):
        yield from _images(name, ours, theirs, one_host)


def _images(name: str, ours: Facts, theirs: Facts, one_host: bool) -> Iterator[Finding]:
    same = _same(ours, theirs, one_host)
    if same is False:
        yield new_error(f"{name}: expected the same image there, found another one, {theirs['name']}", ONE_IMAGE)
    elif same is None:
        text = f"{name}: cannot tell whether {theirs['name']} there is the same image"
        yield new_warning(text, f"{ONE_IMAGE}; a copy is out of date as soon as the guest writes")


def _same(ours: Facts, theirs: Facts, one_host: bool) -> bool | None:
    """Whether two media are one; None where it cannot be told."""
    file, other = ours.get("file"), theirs.get("file")
    if not file or not other:
        both_remote = not file and not other and ours.get("name") == theirs.get("name") and ":" in str(ours.get("name"))
        return True if both_remote else None
    heads = (file.get("head"), other.get("head"))
    alike = heads[0] == heads[1] if all(heads) else None
    if file.get("world") and other.get("world"):
        return bool(file["world"] == other["world"])
    if one_host and file["id"] == other["id"]:
        return True
    if alike and ours.get("ro") and theirs.get("ro"):
        return True
    # On another host, and in another mount of a network file system, a file has the same number, if on another device.
    number = not file["block"] and file["id"][1] == other["id"][1]
    if one_host:
        return None if number and alike is not False else False
    if number and alike:
        return True
    return False if alike is False and not number and not file["block"] else None
