"""The disks of a checkpoint back to its instant, for a QEMU that is about to be started (`vm-restore --disks`)."""

import contextlib
import json
import os
from collections.abc import Sequence
from itertools import count

from ..errors import CannotDo, Misfit, WrongUsage
from ..stream.identity import identity
from ..stream.validate import State
from . import manifest
from .disks import OVERLAY, stem
from .manifest import Entry
from .qemu_args import put_in_place
from .qemu_img import create_overlay, run_qemu_img


class Revert:
    """`prepare` before QEMU is started, `validate` the state before it is loaded; `undo` where that came to nothing.

    CannotDo, Damaged, Misfit where the disks cannot be had back; `discard`: what an image with an internal snapshot got
    since may be lost.
    """

    def __init__(self, path: str, discard: bool) -> None:
        self._path = path
        self.manifest = manifest.read(path)
        self._discard = discard
        self._made: list[str] = []
        self._times: list[tuple[str, os.stat_result]] = []
        for entry in self.manifest.disks:
            manifest.require_unwritten(entry, self.manifest.mode, discard)

    @property
    def made(self) -> list[str]:
        """The overlays into which the guest is going to write."""
        return self._made

    def prepare(self, command: Sequence[str]) -> Sequence[str]:
        """The command with the disks as they were."""
        for entry in self.manifest.disks:
            # Whether it is there at all comes before anything is made.
            _placed(command, entry, entry.image)
        for entry in self.manifest.disks if self.manifest.mode == OVERLAY else ():
            overlay = _new_overlay(entry, self.manifest.tag)
            self._made.append(overlay)
            command = _placed(command, entry, overlay)
        if self.manifest.mode != OVERLAY:
            self._apply()
        return command

    def _apply(self) -> None:
        for entry in self.manifest.disks:
            names = json.loads(run_qemu_img("info", "-U", "--output=json", entry.image)).get("snapshots", [])
            if self.manifest.tag not in [snapshot["name"] for snapshot in names]:
                raise CannotDo(f"the disk {entry.image} has no snapshot '{self.manifest.tag}' any more")
        for entry in self.manifest.disks:
            before = os.stat(entry.image)
            try:
                run_qemu_img("snapshot", "-q", "-a", self.manifest.tag, entry.image)
            except CannotDo as error:
                raise CannotDo(str(error), *error.hints, "a guest that uses the image must be ended first") from error
            if before.st_mtime == entry.written:
                self._times.append((entry.image, before))

    def validate(self, state: State) -> None:
        if identity(state) != self.manifest.identity:
            raise Misfit(
                f"the state is not the one of {self._path}", f"its state is {self.manifest.state or 'another'}"
            )

    def undo(self) -> None:
        """Nobody has written there."""
        for overlay in self._made:
            with contextlib.suppress(OSError):
                os.unlink(overlay)
        for image, before in self._times:
            with contextlib.suppress(OSError):
                os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
        self._made, self._times = [], []


def _placed(command: Sequence[str], entry: Entry, image: str) -> list[str]:
    """The command with `image` in the place of one of the family of the disk: itself, below it, or over it."""
    family = stem((entry.image, *entry.chain))
    own = {name for name in (entry.image, *entry.chain) if os.path.splitext(name)[0] == family} | {entry.image}

    def meant(path: str) -> bool:
        real = os.path.realpath(path)
        return real in own or (real.startswith(f"{family}.") and _lies_on(real, own))

    try:
        return put_in_place(command, meant, image)
    except WrongUsage as error:
        raise WrongUsage(f"{error}: {entry.image}", *error.hints) from error


def _lies_on(image: str, own: set[str]) -> bool:
    """Whether an image is above one of these."""
    try:
        chain = json.loads(run_qemu_img("info", "-U", "--backing-chain", "--output=json", image))
    except (CannotDo, ValueError):
        return False
    return any(os.path.realpath(layer["filename"]) in own for layer in chain)


def _new_overlay(entry: Entry, tag: str) -> str:
    """The name of one that was made beside the image, and is nobody else's."""
    for number in count(1):
        name = f"{stem((entry.image, *entry.chain))}.{tag}-{number}.qcow2"
        with contextlib.suppress(FileExistsError):
            create_overlay(entry.image, entry.format, entry.size, name)
            return name
    raise AssertionError
