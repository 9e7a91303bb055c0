"""The disks of a checkpoint back to its instant, for a QEMU that is about to be started (`vm-restore --disks`)."""

import contextlib
import os
import re

from . import manifest
from .arguments import put_in_place
from .check import State
from .disks import OVERLAY, create_overlay, run_qemu_img, stem
from .errors import CannotDo, Misfit, WrongUsage
from .identity import identity
from .manifest import Entry


class WayBack:
    """`prepare` before QEMU is started, `judge` the state before it is loaded; `undo` where that came to nothing.

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

    def prepare(self, command: list[str]) -> list[str]:
        """The command with the disks as they were."""
        for entry in self.manifest.disks:
            if self.manifest.mode == OVERLAY:
                overlay = _free(entry, self.manifest.tag)
                command = _placed(command, entry, overlay)
                create_overlay(entry.image, entry.format, entry.size, overlay)
                self._made.append(overlay)
            else:
                _placed(command, entry, entry.image)
        if self.manifest.mode != OVERLAY:
            self._apply()
        return command

    def _apply(self) -> None:
        for entry in self.manifest.disks:
            before = os.stat(entry.image)
            try:
                run_qemu_img("snapshot", "-q", "-a", self.manifest.tag, entry.image)
            except CannotDo as error:
                raise CannotDo(str(error), *error.hints, "a guest that uses the image must be ended first") from error
            if before.st_mtime == entry.written:
                self._times.append((entry.image, before))

    def judge(self, state: State) -> None:
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


def _placed(command: list[str], entry: Entry, image: str) -> list[str]:
    """The command with `image` in the place of one of the family of the disk: itself, below it, or over it."""
    family = stem((entry.image, *entry.chain))
    own = {name for name in (entry.image, *entry.chain) if os.path.splitext(name)[0] == family} | {entry.image}
    over = re.compile(re.escape(family) + r"\.[A-Za-z0-9_.-]+\.qcow2")

    def meant(path: str) -> bool:
        real = os.path.realpath(path)
        return real in own or bool(over.fullmatch(real))

    try:
        return put_in_place(command, meant, image)
    except WrongUsage as error:
        raise WrongUsage(f"{error}: {entry.image}", *error.hints) from error


def _free(entry: Entry, tag: str) -> str:
    """The name of a new overlay, beside the image."""
    number = 1
    while os.path.lexists(name := f"{stem((entry.image, *entry.chain))}.{tag}-{number}.qcow2"):
        number += 1
    return name
