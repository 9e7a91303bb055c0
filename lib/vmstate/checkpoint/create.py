"""Create a checkpoint (`vm-dump --disks`): disks of the instant of the RAM, and the manifest of both."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import CannotDo
from ..qemu import claim, state
from ..qemu.monitor import Monitor
from ..stream.identity import identity
from ..stream.validate import State
from . import manifest
from .disks import INTERNAL, PointInTime, drop, merge, over, writable
from .qemu_img import overlays_of


class Wish(NamedTuple):
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

    def undo(self, sure: bool = False) -> None:
        self._point.undo(self._path, sure)

    def overlays(self) -> list[str]:
        """Those that are there."""
        return [disk.overlay for disk in self._point.disks if disk.overlay and os.path.exists(disk.overlay)]

    def settle(self, state: State, ran: bool, out: str | None, goes_on: bool) -> None:
        """Write the manifest; `ran`: whether the guest is to run when it is restored; `out`: where its state is;
        `goes_on`: it has written since the instant."""
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
                disks=manifest.entries(self._point, goes_on),
                state=os.path.realpath(out) if out else None,
                made=time.time(),
                **self._facts,
            ),
        )


def commit(path: str, name: str) -> None:
    """Take the point in time of the manifest `name` away from the disks of a running guest: there is no way back to it
    then.  CannotDo where the guest does not write right above it, or another one was made of it."""
    found = manifest.read(name)
    guest_state = state.query_once(path)
    if guest_state.moving or guest_state.run not in ("running", "suspended"):
        text = (
            f"the guest at {path} does not run ('{guest_state.run}', {guest_state.migration}): its disks are left alone"
        )
        raise CannotDo(text, f"vm-cont {path}")
    with Monitor(path) as monitor:
        claim.take(monitor, path)
    # What was taken away by a call that came to an end too early is not there any more.
    work = [
        _dropping(path, found.tag, disk) if found.mode == INTERNAL else _merging(path, disk) for disk in found.disks
    ]
    for step in work:
        step()


def _merging(path: str, disk: manifest.Entry) -> Callable[[], None]:
    """What merges the overlay above an image; CannotDo where that is not possible."""
    overlay = over(path, disk.image)
    others = [name for name in overlays_of(disk.image) if name != overlay]
    if not overlay and not others:
        return lambda: None
    if not overlay:
        text = f"the guest at {path} does not write right above {disk.image}, but others lie there: {', '.join(others)}"
        raise CannotDo(text, "later checkpoints go first: vm-dump --disks-commit with the manifest of the last one")
    if others:
        text = f"{disk.image} lies below {', '.join(others)}, too, and must not change"
        raise CannotDo(text, "take away what is not needed any more")

    def step() -> None:
        merge(path, overlay, disk.image)
        os.unlink(overlay)

    return step


def _dropping(path: str, tag: str, disk: manifest.Entry) -> Callable[[], None]:
    def step() -> None:
        with Monitor(path) as monitor:
            there = {found.image: found for found in writable(monitor, path)}
        if disk.image not in there:
            raise CannotDo(f"the guest at {path} does not write into {disk.image}")
        if tag in there[disk.image].snapshots:
            state.with_retry(path, lambda monitor: drop(monitor, there[disk.image].name, tag))

    return step
