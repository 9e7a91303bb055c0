"""The writable disks of a running guest: a point in time of all of them at once, and back (QMP, qapi/transaction.json).

An overlay lies beside the image that it freezes, as STEM.TAG.qcow2; an internal snapshot has the tag as its name.
"""

import contextlib
import json
import os
import re
import time
from functools import partial
from typing import Any, NamedTuple

from ..errors import CannotDo, Refused, WrongUsage
from ..qemu.blocks import Image, block_devices, block_jobs, opened_files
from ..qemu.inventory import RAW, innermost
from ..qemu.monitor import Monitor
from ..qemu.state import wait_for, with_retry
from ..rollback import Rollback
from .qemu_img import create_overlay, run_qemu_img

OVERLAY, INTERNAL = "overlay", "internal"
MODES = (OVERLAY, INTERNAL)
TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
ANOTHER = "choose another tag, or take that one away"


class Disk(NamedTuple):
    """device, node: QEMU's names of it ('' where it has none).  chain: its image, and all below; format: of the image.
    overlay: the file of the point in time, in that mode.  size: in bytes, as the guest has it.  snapshots: those within
    the image, by name.  known: the image as QEMU calls it."""

    device: str
    node: str
    format: str
    size: int
    chain: tuple[str, ...]
    overlay: str = ""
    snapshots: tuple[str, ...] = ()
    known: str = ""

    @property
    def image(self) -> str:
        return self.chain[0]

    @property
    def name(self) -> str:
        return self.device or self.node


def check_tag(tag: str) -> str:
    """The tag; WrongUsage where it cannot be a part of a file's name and the name of a snapshot."""
    if not re.fullmatch(TAG, tag):
        raise WrongUsage(f"--disks: '{tag}' cannot be a tag", "letters, digits, '_', '.' and '-'")
    return tag


def writable(monitor: Monitor, path: str) -> list[Disk]:
    """The disks into which the guest can write; CannotDo where one is no file."""
    found: list[Disk] = []
    for entry in block_devices(monitor):
        medium = entry.writable
        if not medium:
            continue
        name, image = entry.device or entry.qdev or medium.node, medium.image
        chain = tuple(_file(monitor, layer, path, name) for layer in _layers(image))
        if re.fullmatch(r"vl\.\w{6}", os.path.basename(chain[0])):
            text = f"the disk '{name}' of the guest at {path} was opened with -snapshot: its writes are in no file"
            raise CannotDo(text, "start the guest without -snapshot")
        kind = "raw" if medium.driver in RAW else medium.driver
        if kind not in ("raw", "qcow2"):
            text = f"the disk '{name}' of the guest at {path} is {kind}: no way back to it is known"
            raise CannotDo(text, "raw and qcow2 images can be frozen")
        known = innermost(image.name)
        found.append(Disk(entry.device, medium.node, kind, image.size, chain, snapshots=image.snapshots, known=known))
    return found


def _layers(image: Image) -> list[str]:
    return [innermost(name) for name in (image.name, *image.below)]


def _is_file(name: str) -> bool:
    return not (name.startswith("{") or ":" in name.removeprefix("file:").split("/")[0])


def _file(monitor: Monitor, name: str, path: str, disk: str) -> str:
    """The whole path of a layer."""
    if not _is_file(name):
        text = f"the disk '{disk}' of the guest at {path} is no file, but {name}"
        raise CannotDo(text, "take a point in time by its own means, while the guest stands: vm-dump --stop")
    name = name.removeprefix("file:")
    with contextlib.suppress(OSError):
        return os.path.realpath(os.path.join(os.readlink(f"/proc/{monitor.pid()}/cwd"), name))
    return os.path.realpath(name)


def stem(chain: tuple[str, ...]) -> str:
    """The path of an image without its suffix, and without the tags of the points in time that it lies on."""
    found = os.path.splitext(chain[0])[0]
    for below in chain[1:]:
        parts = os.path.splitext(below)[0]
        if chain[0].startswith(parts + "."):
            found = parts
    return found


class PointInTime:
    """One of some disks: `prepare` while the guest runs, `take` while it stands, `undo` what was done of it.

    `undo` goes by what it finds, and can be called by another process, and again.  CannotDo where something of that tag
    is there already.
    """

    def __init__(self, disks: list[Disk], tag: str, mode: str) -> None:
        self.tag, self.mode = tag, mode
        self._prepared = self._taken = False
        # The files as they were at the instant
        self.then: dict[str, os.stat_result] = {}
        self.disks = disks
        if mode == OVERLAY:
            self.disks = [disk._replace(overlay=f"{stem(disk.chain)}.{tag}.qcow2") for disk in disks]
        names = [disk.overlay for disk in self.disks if disk.overlay]
        for disk in self.disks:
            _require_possible(disk, mode, tag)
            if names.count(disk.overlay) > 1:
                raise CannotDo(f"two disks would get the same overlay, {disk.overlay}", "rename one of their images")

    def prepare(self) -> None:
        """Make empty overlays; CannotDo where one cannot be made: what was made before is taken away."""
        rollback = Rollback("take it away by hand: nothing is in it")
        try:
            for disk in self.disks if self.mode == OVERLAY else ():
                # Under another name QEMU tells of them at greater length than it has room for.
                below = disk.known if os.path.isabs(disk.known) else disk.image
                create_overlay(below, disk.format, disk.size, disk.overlay)
                rollback.add(disk.overlay, partial(os.unlink, disk.overlay))
        except FileExistsError as error:
            raise rollback.run(CannotDo(f"{error.filename} is there already", ANOTHER)) from error
        except BaseException as error:
            raise rollback.run(error) from error
        self._prepared = True

    def take(self, monitor: Monitor) -> None:
        """All or none; Refused with QEMU's words."""
        self._taken = True
        if self.disks:
            monitor.ask("transaction", actions=[self._action(number, disk) for number, disk in enumerate(self.disks)])
        self.then = {disk.image: os.stat(disk.image) for disk in self.disks}

    def _action(self, number: int, disk: Disk) -> dict[str, Any]:
        if self.mode == INTERNAL:
            return {
                "type": "blockdev-snapshot-internal-sync",
                "data": {"device": disk.name, "name": self.tag},
            }
        data = {"snapshot-file": disk.overlay, "format": "qcow2", "mode": "existing"}
        # Names of nodes are unique in a QEMU, and have at most 31 letters.
        named = {"node-name": disk.node, "snapshot-node-name": f"vmstate{time.time_ns():x}-{number}"}
        return {
            "type": "blockdev-snapshot-sync",
            "data": {**data, **({"device": disk.device} if disk.device else named)},
        }

    def undo(self, path: str, sure: bool = False) -> None:
        """The disks are as if it had not been; what the guest has written since stays.

        sure: it was `prepare`d and `take`n by the process that is gone now.  CannotDo where the guest is gone, or has
        given its disks away.
        """
        if not (self._taken or sure or (self._prepared and self.mode == OVERLAY)):
            return
        guest_state = wait_for(path, lambda s: s.at_rest, 60, "to have its disks")
        if guest_state.given_away:
            raise CannotDo(f"the disks of the guest at {path} stay as they are: it was given away")
        for disk in self.disks:
            if self.mode == INTERNAL:
                with contextlib.suppress(Refused):
                    with_retry(path, partial(drop, name=disk.name, tag=self.tag))
            elif os.path.lexists(disk.overlay):
                if not merge(path, disk.overlay, disk.image):
                    _require_unused(path, disk.overlay)
                os.unlink(disk.overlay)


def _require_unused(path: str, overlay: str) -> None:
    """CannotDo where the overlay holds something, or the guest has it open: it is all that has what was written."""
    opened = any(os.path.basename(overlay) in name for name in with_retry(path, opened_files))
    alone = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": overlay}}
    found = "" if opened else run_qemu_img("map", "--output=json", f"json:{json.dumps(alone)}")
    if opened or any(part.get("present") for part in json.loads(found)):
        raise CannotDo(f"{overlay} is not taken away: the guest has written into it", "start the guest with it")


def drop(monitor: Monitor, name: str, tag: str) -> None:
    """Take an internal snapshot out of its image."""
    monitor.ask("blockdev-snapshot-delete-internal-sync", device=name, name=tag)


def _require_possible(disk: Disk, mode: str, tag: str) -> None:
    if mode == INTERNAL and tag in disk.snapshots:
        raise CannotDo(f"the disk '{disk.name}' has a snapshot '{tag}' already, within {disk.image}", ANOTHER)
    if mode == INTERNAL and disk.format != "qcow2":
        text = f"the disk '{disk.name}' is {disk.format}, which has no internal snapshots"
        raise CannotDo(text, "--disks-mode overlay freezes its image, and has the guest write into a new one")
    if mode == OVERLAY and not os.path.isfile(disk.image):
        text = f"the disk '{disk.name}' is {disk.image}, which is no plain file: an overlay cannot lie beside it"
        internal = "--disks-mode internal, since it is a qcow2" if disk.format == "qcow2" else "or lvcreate --snapshot"
        raise CannotDo(text, f"{internal}; while the guest stands: vm-dump --stop")
    if mode == OVERLAY and os.path.lexists(disk.overlay):
        raise CannotDo(f"{disk.overlay} is there already", ANOTHER)


def merge(path: str, overlay: str, image: str) -> bool:
    """Have the guest at `path` that writes into `overlay` write into `image` again, with all that it has written.

    False where it does not write there.  Refused, CannotDo.
    """
    import hashlib

    # One that was begun before, by somebody who is gone, is gone on with.
    job = "vmstate" + hashlib.sha256(overlay.encode()).hexdigest()[:16]
    if not with_retry(path, lambda monitor: _begin(monitor, overlay, image, job)):
        return False
    while with_retry(path, lambda monitor: _advance(monitor, job)):
        time.sleep(0.02)
    if with_retry(path, lambda monitor: _over(monitor, overlay, image)):
        raise CannotDo(f"QEMU has not merged {overlay} into {image}", "the guest's own log, or QEMU's words, say why")
    return True


def over(path: str, image: str) -> str:
    """The overlay into which the guest at `path` writes right above an image; '' where it does not."""
    found = with_retry(path, lambda monitor: _over(monitor, "", image))
    return found.overlay if found else ""


class _Upper(NamedTuple):
    """A disk that is written into `overlay`, right above an image that QEMU calls `below`; name: QEMU's of the disk."""

    name: str
    overlay: str
    below: str


def _over(monitor: Monitor, overlay: str, image: str) -> _Upper | None:
    """The disk that is written into `overlay` (where that is '': whatever it is), over `image`."""
    for entry in block_devices(monitor):
        if medium := entry.writable:
            files = [_file(monitor, name, "", "") for name in _layers(medium.image)[:2] if _is_file(name)]
            if len(files) == 2 and files[1] == image and overlay in ("", files[0]):
                return _Upper(entry.device or medium.node, files[0], medium.image.below[0])
    return None


def _begin(monitor: Monitor, overlay: str, image: str, job: str) -> bool:
    found = _over(monitor, overlay, image)
    if found and job not in block_jobs(monitor):
        monitor.ask("block-commit", job_id=job, device=found.name, base=found.below)
    return found is not None


def _advance(monitor: Monitor, job: str) -> bool:
    """Whether the job is there; one that has copied everything is told to end."""
    status = block_jobs(monitor).get(job)
    if status == "ready":
        try:
            monitor.ask("block-job-complete", device=job)
        except Refused:
            # Told before, it can have ended between the look and this.
            if job in block_jobs(monitor):
                raise
    return status is not None
