"""What belongs to a checkpoint: a state, and its disks at the same instant (JSON; vm-dump(1) has the names)."""

import json
import os
from typing import Any, NamedTuple

from ..errors import CannotDo, Damaged, Misfit
from ..fields import Fields
from ..io.descriptors import write_all
from ..io.output import Output
from ..qemu import answers
from ..qemu.monitor import Monitor
from ..qemu.nics import from_info_network
from . import disks

KIND, VERSION = "vmstate manifest", 1
# Of the text
LONGEST = 4 << 20
ABSOLUTE = "/[^\\0]*"


class Entry(NamedTuple):
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


class Manifest(NamedTuple):
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
    made: float = 0.0

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "disks": [disk._asdict() for disk in self.disks]}


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
    cards = from_info_network(answers.human(monitor, "info network"), pid, [])
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    except OSError:
        command = []
    return {
        "qemu": ".".join(map(str, answers.version(monitor))),
        "command": command,
        "nics": [{"mac": card.mac, "iface": card.iface, "addresses": list(card.addresses)} for card in cards],
    }


def write(path: str, manifest: Manifest) -> None:
    """It appears whole, or not at all."""
    output = Output(path, text=True)
    try:
        text = json.dumps({"kind": KIND, "version": VERSION, **manifest.values()}, indent=2) + "\n"
        write_all(output.fd, text.encode())
        output.settle()
    except OSError as error:
        output.abandon()
        raise CannotDo(f"cannot write {path}: {error.strerror}") from error


def read(path: str) -> Manifest:
    """CannotDo where it cannot be read, Damaged where it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise ValueError(f"it has more than {LONGEST} letters")
        values = json.loads(text)
    except OSError as error:
        raise CannotDo(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is no manifest of a checkpoint: {error}") from error
    return _manifest(Fields(values, f"{path} is no manifest of a checkpoint", Damaged), path)


def _manifest(found: Fields, path: str) -> Manifest:
    found.choice("kind", (KIND,))
    if (version := found.whole("version")) != VERSION:
        raise CannotDo(f"{path} is a manifest of version {version}; this is known up to {VERSION}")
    found.only(("kind", "version", *Manifest.__annotations__))
    return Manifest(
        tag=found.text("tag", pattern=disks.TAG),
        mode=found.choice("mode", disks.MODES),
        identity=found.text("identity"),
        run=found.flag("run"),
        machine=found.text("machine"),
        qemu=found.text("qemu"),
        command=found.texts("command", longest=LONGEST),
        nics=[entry.raw() for entry in found.objects("nics")],
        disks=[_entry(entry) for entry in found.objects("disks")],
        state=None if found.get("state") is None else found.text("state"),
        made=found.number("made", 0.0),
    )


def _entry(found: Fields) -> Entry:
    found.only(tuple(Entry.__annotations__))
    chain = found.texts("chain")
    if not all(os.path.isabs(name) for name in chain):
        raise found.error("chain", "absolute paths")
    return Entry(
        device=found.text("device"),
        node=found.text("node"),
        format=found.choice("format", ("raw", "qcow2")),
        size=found.whole("size"),
        image=found.text("image", pattern=ABSOLUTE),
        chain=chain,
        overlay=found.text("overlay", pattern=f"|{ABSOLUTE}"),
        bytes=found.whole("bytes"),
        written=found.number("written"),
    )


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
