"""How long a guest stands while its state is saved, by QEMU's events and as one sees it who waits for the guest.

Each round has a guest of its own, which has just booted: a snapshot splits a guest's huge pages, so its first is not as
those behind it.  The second one is measured as well.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lab import Events, Lab
from measure import SINK, Row, pipeline
from vm import Guest

CAT = "cat > /dev/null"
SNAPSHOT, LIVE, STOP = "vm-dump --snapshot", "vm-dump", "vm-dump --stop"
SECOND = "vm-dump --snapshot, once more"
THEIR_LIVE, THEIR_STOP, SAVEVM = "migrate, cont", "stop, migrate, cont", "savevm"
WAYS = (SNAPSHOT, LIVE, STOP, THEIR_LIVE, THEIR_STOP, SAVEVM, SECOND)
# Of a loop in the guest, when nothing happens.
ALONE = 3.0


class Ticks:
    """The largest gap, in seconds, between two signs of life of a guest, while the `with` block runs."""

    def __init__(self, serial: Path) -> None:
        self._serial = serial
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.gap = 0.0

    def _watch(self) -> None:
        size, at = self._serial.stat().st_size, time.monotonic()
        while not self._over.wait(0.001):
            now, has = time.monotonic(), self._serial.stat().st_size
            if has != size:
                self.gap, size, at = max(self.gap, now - at), has, now

    def __enter__(self) -> Ticks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # It has to be seen again.
        time.sleep(0.3)
        self._over.set()
        self._thread.join()


def pause(lab: Lab) -> Iterator[Row]:
    for kind in ("idle", "dirtying"):
        taken, seen, alone = _rounds(lab, kind, WAYS)
        yield from _rows(f"how long it stands, {kind} guest", taken, (20, 3))
        more = {name: [max(1e-3, gap - alone) for gap in gaps] for name, gaps in seen.items()}
        yield from _rows(f"as it is seen, {kind} guest", more, (5, None))

    # Nearly all of its memory is in use; it has no image for a savevm, and counts too slowly to be watched.
    taken, _, _ = _rounds(lab, "cache", (SNAPSHOT, LIVE, STOP, THEIR_LIVE, THEIR_STOP, SECOND))
    yield from _rows(f"how long it stands, {lab.size('cache')} in use", taken, (20, 3))


Times = dict[str, list[float]]


def _rounds(lab: Lab, kind: str, ways: tuple[str, ...]) -> tuple[Times, Times, float]:
    """How long it stood and the largest gap, by way; and the gap of a guest left alone."""
    taken: Times = {name: [] for name in ways}
    seen: Times = {name: [] for name in ways}
    alone: list[float] = []
    for _ in range(lab.rounds):
        guest = lab.guest(kind)
        for name in ways:
            taken[name].append(_runner(lab, guest, name, seen[name])())
        alone.append(_alone(guest))
        lab.drop(kind)
    return taken, seen, statistics.median(alone)


def _rows(what: str, taken: Times, wanted: tuple[float | None, float | None]) -> Iterator[Row]:
    def row(ours: str, theirs: str, target: float | None = None) -> Row:
        return Row("pause", ours, theirs, what, "s", taken[ours], taken[theirs], target)

    yield row(SNAPSHOT, THEIR_STOP, wanted[0])
    yield row(SNAPSHOT, THEIR_LIVE, wanted[1])
    if SAVEVM in taken:
        yield row(SNAPSHOT, SAVEVM)
    yield row(SECOND, THEIR_STOP, wanted[0])
    yield row(SECOND, THEIR_LIVE, wanted[1])
    yield row(LIVE, THEIR_STOP)
    yield row(LIVE, THEIR_LIVE)
    yield row(STOP, THEIR_STOP)


def _runner(lab: Lab, guest: Guest, name: str, seen: list[float]) -> Callable[[], float]:
    ways: dict[str, Callable[[], object]] = {
        SNAPSHOT: lambda: pipeline([*SNAPSHOT.split(), "-q", guest.qmp], SINK),
        LIVE: lambda: pipeline(["vm-dump", "-q", "--after", "running", guest.qmp], SINK),
        SECOND: lambda: ways[SNAPSHOT](),
        STOP: lambda: pipeline(["vm-dump", "-q", "--stop", "--after", "running", guest.qmp], SINK),
        THEIR_LIVE: lambda: _migrate_here(guest, False),
        THEIR_STOP: lambda: _migrate_here(guest, True),
        SAVEVM: lambda: _savevm(guest),
    }

    def measured() -> float:
        lab.stand(guest)
        guest.cmd("cont")
        guest.wait_advance()
        with Events(guest.path("test"), 60) as events, Ticks(guest.path("serial")) as ticks:
            guest.cmd = events.cmd  # type: ignore[method-assign]
            try:
                ways[name]()
                stopped = events.wait_for("STOP")
                stood = events.wait_for("RESUME") - stopped
            finally:
                del guest.cmd
        seen.append(ticks.gap)
        return stood

    return measured


def _alone(guest: Guest) -> float:
    with Ticks(guest.path("serial")) as ticks:
        time.sleep(ALONE)
    return ticks.gap


def _migrate_here(guest: Guest, stop: bool) -> None:
    """QEMU's `migrate` on a connection that is held; asked every millisecond whether it is over."""
    guest.cmd("migrate-set-parameters", **{"max-bandwidth": 0})
    if stop:
        guest.cmd("stop")
    guest.cmd("migrate", uri=f"exec:{CAT}")
    give_up = time.monotonic() + 60
    while guest.cmd("query-migrate")["status"] != "completed":
        if time.monotonic() > give_up:
            raise TimeoutError("QEMU's migrate has not completed within 60 s")
        time.sleep(0.001)
    guest.cmd("cont")


def _savevm(guest: Guest) -> None:
    guest.cmd("human-monitor-command", **{"command-line": "savevm bench"})
    with contextlib.suppress(KeyError):
        guest.cmd("human-monitor-command", **{"command-line": "delvm bench"})
