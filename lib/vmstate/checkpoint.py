"""The disks of a dump: a point in time that belongs to the RAM, and the manifest of both (`vm-dump --disks`)."""

import os
from dataclasses import dataclass
from typing import Any

from . import manifest
from .check import State
from .disks import INTERNAL, PointInTime, drop, merge, writable
from .errors import CannotDo, Refused
from .guest import patiently
from .identity import identity
from .monitor import Monitor


@dataclass(frozen=True)
class Wish:
    """tag, mode: of the point in time.  manifest: the file to write, or None."""

    tag: str
    mode: str
    manifest: str | None = None


class Checkpoint:
    """Of the guest at `path`: `prepare`, then `take` while it stands, `settle` once its state is whole; or `undo`."""

    def __init__(self, path: str, wish: Wish) -> None:
        self._path, self._wish = path, wish
        with Monitor(path) as monitor:
            self._point = PointInTime(writable(monitor, path), wish.tag, wish.mode)
            self._facts: dict[str, Any] = manifest.of_guest(monitor)
        self.prepare, self.take = self._point.prepare, self._point.take

    def undo(self) -> None:
        self._point.undo(self._path)

    def settle(self, state: State, ran: bool, out: str | None) -> None:
        """Write the manifest; `ran`: whether the guest is to run when it is restored; `out`: where its state is."""
        if not self._wish.manifest:
            return
        manifest.write(
            self._wish.manifest,
            manifest.Manifest(
                tag=self._wish.tag,
                mode=self._wish.mode,
                identity=identity(state),
                run=ran,
                machine=state.machine,
                disks=manifest.entries(self._point),
                state=os.path.realpath(out) if out else None,
                **self._facts,
            ),
        )


def commit(path: str, name: str) -> None:
    """Take the point in time of the manifest `name` away from the disks of a running guest: there is no way back to it
    then.  CannotDo where the guest does not write right above it."""
    found = manifest.read(name)
    for disk in found.disks:
        if found.mode == INTERNAL:
            _drop(path, disk, found.tag)
        elif merge(path, disk.overlay, disk.image):
            os.unlink(disk.overlay)
        else:
            text = f"the guest at {path} does not write into {disk.overlay}, over {disk.image}"
            raise CannotDo(text, "later checkpoints go first: vm-dump --disks-commit with the manifest of the last one")


def _drop(path: str, disk: manifest.Entry, tag: str) -> None:
    try:
        patiently(path, lambda monitor: drop(monitor, disk.device or disk.node, tag))
    except Refused as error:
        raise CannotDo(f"the snapshot '{tag}' of {disk.image} is not taken away: {error.text}") from error
