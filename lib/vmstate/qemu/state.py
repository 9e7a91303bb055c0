"""What QEMU says of a guest and of its migration, read into one type."""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..errors import CannotDo, GuestGone, InDoubt, Refused
from . import userfault
from .monitor import PATIENCE, Monitor

T = TypeVar("T")
# The QEMU from which on, under TCG, a live migration sends every page that the guest writes (upstream 03bfc2188f).
COHERENT = (9, 0)
# Longer than any migration: the wait ends with the QEMU.
FOR_EVER = 1e9
# Run states of a guest that runs
RUNS = ("running", "suspended")
# migration.json, MigrationStatus: those in which QEMU is not done
BUSY = frozenset(("setup", "active", "device", "pre-switchover", "wait-unplug", "cancelling", "colo")) | frozenset(
    ("postcopy-active", "postcopy-device", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup")
)


class GuestState(NamedTuple):
    """Where a guest stands: QEMU's run state, the status of its migration ('none' where there was none), its answer."""

    run: str
    migration: str
    info: dict[str, Any]

    @property
    def moving(self) -> bool:
        return self.migration in BUSY

    @property
    def given_away(self) -> bool:
        """Its state is whole elsewhere.  (A stopped guest is 'postmigrate' after a migration that failed, too.)"""
        return self.run == "postmigrate" and self.migration == "completed"

    @property
    def reason(self) -> str:
        return str(self.info.get("error-desc", ""))


def query(monitor: Monitor) -> GuestState:
    info = monitor.ask("query-migrate")
    return GuestState(monitor.ask("query-status")["status"], info.get("status", "none"), info)


def query_once(path: str, patience: float = PATIENCE) -> GuestState:
    """`query` in a conversation of its own."""
    with Monitor(path, patience) as monitor:
        return query(monitor)


def wait_for(
    path: str, done: Callable[[GuestState], bool], seconds: float, what: str, *, slowest: float = 0.1
) -> GuestState:
    """Look until `done`; CannotDo after `seconds`.  A monitor that is busy meanwhile is asked again.

    slowest: seconds between two looks, once it lasts.
    """
    give_up = time.monotonic() + seconds
    pause = 0.005
    while True:
        guest_state = None
        try:
            guest_state = query_once(path)
            if done(guest_state):
                return guest_state
        except GuestGone:
            raise
        except CannotDo:
            if time.monotonic() > give_up:
                raise
        if time.monotonic() > give_up:
            where = f"'{guest_state.run}', migration '{guest_state.migration}'" if guest_state else "not known"
            raise CannotDo(f"waited {seconds:.0f} s for {path} {what}: its state is {where}")
        time.sleep(pause)
        pause = min(slowest, pause * 1.5)


def with_retry(path: str, do: Callable[[Monitor], T], seconds: float = 60) -> T:
    """What `do` gives in a conversation of its own; while another client holds the monitor, it is tried again."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            with Monitor(path) as monitor:
                return do(monitor)
        except (GuestGone, Refused, InDoubt):
            raise
        except CannotDo:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def loses_pages(monitor: Monitor) -> bool:
    """Whether a live migration of the guest may leave out pages that it writes meanwhile: QEMU before 9.0 under TCG."""
    version = monitor.ask("query-version")["qemu"]
    return (version["major"], version["minor"]) < COHERENT and not monitor.ask("query-kvm")["enabled"]


def version_words(monitor: Monitor) -> str:
    version = monitor.ask("query-version")["qemu"]
    return f"QEMU {version['major']}.{version['minor']}"


def ram_blocks(monitor: Monitor) -> dict[str, tuple[int, int]]:
    """Name to used and greatest size, in bytes, of each RAM block of a guest."""
    text = monitor.ask("x-query-ramblock")["human-readable-text"]
    row = re.compile(r"^\s*(\S.*?)\s+\d+ [KMG]iB\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)", re.M)
    return {name: (int(used, 16), int(total, 16)) for name, used, total in row.findall(text)}


def odd_pages(monitor: Monitor) -> list[str]:
    """The RAM blocks of a guest whose pages are not of 4 KiB."""
    text = monitor.ask("x-query-ramblock")["human-readable-text"]
    rows = re.findall(r"^\s*(\S.*?)\s+(\d+ [KMG]iB)\s+0x", text, re.M)
    return [name for name, size in rows if size != "4 KiB"]


def lost_its_snapshot(guest_state: GuestState, pid: int) -> bool:
    """Whether a guest waits for ever at a page that it may not write into."""
    runs = guest_state.run in RUNS and not guest_state.moving
    return runs and userfault.waits(pid) and userfault.protected(pid)
