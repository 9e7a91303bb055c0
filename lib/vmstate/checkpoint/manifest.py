"""What belongs to a checkpoint: a state, and its disks at the same instant (JSON; vm-dump(1) has the names)."""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import CannotDo, Damaged, Misfit
from ..io.descriptors import write_all
from ..io.output import Output
from ..qemu.monitor import Monitor
from ..qemu.nics import from_info_network
from . import disks

KIND, VERSION = "vmstate manifest", 1


@dataclass(frozen=True)
class Entry:
    """A disk: `image` was frozen under `overlay`, or has an internal snapshot; format and size of the image.

    chain: the images below it.  bytes, written: of the image's file, as it was left; seconds since 1970.
    """

    device: str
    node: str
    format: str
    size: int
    image: str
    chain: list[str]
    overlay: str
    bytes: int
    written: float


@dataclass(frozen=True)
class Manifest:
    """identity: of the state.  run: whether the guest ran.  command: of its QEMU."""

    tag: str
    mode: str
    identity: str
    run: bool
    machine: str
    qemu: str
    command: list[str]
    nics: list[dict[str, Any]]
    disks: list[Entry]
    state: str | None = None
    made: float = field(default_factory=time.time)


def entries(point: disks.PointInTime, goes_on: bool) -> list[Entry]:
    """The disks of a point in time that was taken; `goes_on`: by a guest that has written since."""
    found = []
    for disk in point.disks:
        stat = point.then[disk.image] if goes_on and point.mode == disks.INTERNAL else os.stat(disk.image)
        names = (disk.device, disk.node, disk.format, disk.size, disk.image, list(disk.chain[1:]), disk.overlay)
        found.append(Entry(*names, stat.st_size, stat.st_mtime))
    return found


def of_guest(monitor: Monitor) -> dict[str, Any]:
    """What a manifest says of a guest and its QEMU."""
    pid = monitor.pid()
    version = monitor.ask("query-version")["qemu"]
    cards = from_info_network(monitor.human("info network"), pid, [])
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    except OSError:
        command = []
    return {
        "qemu": ".".join(str(version[part]) for part in ("major", "minor", "micro")),
        "command": command,
        "nics": [{"mac": card.mac, "iface": card.iface, "addresses": list(card.addresses)} for card in cards],
    }


def write(path: str, manifest: Manifest) -> None:
    """It appears whole, or not at all."""
    output = Output(path, text=True)
    try:
        text = json.dumps({"kind": KIND, "version": VERSION, **asdict(manifest)}, indent=2) + "\n"
        write_all(output.fd, text.encode())
        output.settle()
    except OSError as error:
        output.abandon()
        raise CannotDo(f"cannot write {path}: {error.strerror}") from error


def read(path: str) -> Manifest:
    """CannotDo where it cannot be read, Damaged where it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        kind, version = found.pop("kind"), found.pop("version")
        if kind != KIND:
            raise ValueError(f"its kind is {kind!r}, expected {KIND!r}")
        if version != VERSION:
            raise CannotDo(f"{path} is a manifest of version {version}; this is known up to {VERSION}")
        entries = [Entry(**entry) for entry in found.pop("disks")]
        manifest = Manifest(disks=entries, **found)
    except OSError as error:
        raise CannotDo(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is no manifest of a checkpoint: {error}") from error
    _check(path, manifest)
    return manifest


def _check(path: str, manifest: Manifest) -> None:
    kinds = {name: type_ for name, type_ in Entry.__annotations__.items() if type_ in (str, int)}
    for entry in manifest.disks:
        wrong = [name for name, type_ in kinds.items() if not isinstance(getattr(entry, name), type_)]
        if wrong or not os.path.isabs(entry.image):
            raise Damaged(f"{path} is no manifest of a checkpoint: {wrong or entry.image} of a disk")
    if manifest.mode not in disks.MODES or not isinstance(manifest.tag, str):
        raise Damaged(f"{path} is no manifest of a checkpoint: mode {manifest.mode!r}, tag {manifest.tag!r}")


def require_unwritten(entry: Entry, mode: str, discard: bool) -> None:
    """Misfit where the image is not as it was left; of an internal snapshot with `discard` it need not be."""
    try:
        stat = os.stat(entry.image)
    except OSError as error:
        raise CannotDo(f"cannot read the disk {entry.image}: {error.strerror}") from error
    if (stat.st_size, stat.st_mtime) == (entry.bytes, entry.written) or (mode == disks.INTERNAL and discard):
        return
    text = f"the disk {entry.image} was written since"
    if mode == disks.INTERNAL:
        raise Misfit(text, "to go back to the point in time, and lose that: --discard-writes")
    hint = f"it was merged, perhaps; if it is a copy that has lost its time: touch -d @{entry.written!r} {entry.image}"
    raise Misfit(f"{text}, and it was to stay as it was", hint)
