"""What QEMU says of a guest and of its migration, read into one type."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ..deadline import Deadline
from ..errors import CannotDo
from ..fields import MOST, Fields
from . import answers, userfault
from .monitor import PATIENCE, Busy, Monitor
from .run_states import RUNS

T = TypeVar("T")
# The QEMU from which on, under TCG, a live migration sends every page that the guest writes (upstream 03bfc2188f).
COHERENT = (9, 0)
# Upstream b4e9ddccd1
KEEPS_SLEEP = (9, 0)
# Longer than any migration: the wait ends with the QEMU.
FOR_EVER = 1e9
# How long a conversation may wait for what is about to be so, in seconds
SOON = 1.0
PAGE = 4096
# migration.json, MigrationStatus: those in which QEMU is not done
BUSY = frozenset(("setup", "active", "device", "pre-switchover", "wait-unplug", "cancelling", "colo")) | frozenset(
    ("postcopy-active", "postcopy-device", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup")
)


class Ram(NamedTuple):
    """How far the memory has been sent, in bytes.  pages: that were sent.  rate, dirty_rate: in bytes a second.

    round: how often what was written meanwhile has been collected.
    """

    total: int
    remaining: int
    transferred: int
    pages: int
    rate: float
    dirty_rate: int
    round: int


class GuestState(NamedTuple):
    """Where a guest stands: QEMU's run state, and the status of its migration ('none' where there was none).

    reason: why it failed, as QEMU says.  blocked: why none can begin.  downtime, expected_downtime: in ms.
    """

    run: str
    migration: str
    reason: str = ""
    blocked: tuple[str, ...] = ()
    ram: Ram | None = None
    downtime: int | None = None
    expected_downtime: int | None = None

    @property
    def moving(self) -> bool:
        return self.migration in BUSY

    @property
    def at_rest(self) -> bool:
        """No migration is under way, nor in its last step."""
        return not self.moving and self.run != "finish-migrate"

    @property
    def given_away(self) -> bool:
        """Its state is whole elsewhere.  (A stopped guest is 'postmigrate' after a migration that failed, too.)"""
        return self.run == "postmigrate" and self.migration == "completed"

    @property
    def reset(self) -> bool:
        """It may be one that was given away, and was reset since; whether it was, a marker tells."""
        return self.run == "prelaunch" and self.migration == "completed"


def query(monitor: Monitor) -> GuestState:
    info = answers.fields(monitor, "query-migrate")
    ram = info.inner("ram", None)
    return GuestState(
        answers.fields(monitor, "query-status").text("status"),
        info.text("status", "none"),
        info.text("error-desc", "", most=answers.LONGEST),
        tuple(info.texts("blocked-reasons", longest=answers.LONGEST)),
        _ram(ram) if ram is not None else None,
        info.whole("downtime", None, low=-MOST),
        info.whole("expected-downtime", None, low=-MOST),
    )


def _ram(ram: Fields) -> Ram:
    def count(name: str, otherwise: int = 0) -> int:
        # Counters of 64 bits; one below zero tells how far it is wrongly, and keeps nobody from putting a guest back.
        return max(0, ram.whole(name, otherwise, low=-MOST - 1, high=2 * MOST + 1))

    return Ram(
        count("total"),
        count("remaining"),
        count("transferred"),
        count("normal") + count("duplicate"),
        # Below zero until QEMU knows it.
        max(0.0, ram.number("mbps", 0.0)) * 1e6 / 8,
        count("dirty-pages-rate") * count("page-size", PAGE),
        count("dirty-sync-count"),
    )


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
    found: GuestState | Busy | None = None
    for _ in Deadline(seconds).tries(0.005, slowest):
        try:
            found = query_once(path)
            if done(found):
                return found
        except Busy as error:
            found = error
    if isinstance(found, Busy):
        raise found
    where = f"'{found.run}', migration '{found.migration}'" if found else "not known"
    raise CannotDo(f"waited {seconds:.0f} s for {path} {what}: its state is {where}")


def look_until(monitor: Monitor, done: Callable[[GuestState], bool], seconds: float) -> GuestState:
    """Look within one conversation until `done`, or until that has lasted so long, for what is about to be so."""
    for _ in Deadline(seconds).tries(0.0005, 0.001):
        guest_state = query(monitor)
        if done(guest_state):
            break
    return guest_state


def with_retry(path: str, do: Callable[[Monitor], T], seconds: float = 60) -> T:
    """What `do` gives in a conversation of its own; while another client holds the monitor, it is tried again."""
    trouble: Busy | None = None
    for _ in Deadline(seconds).tries(0.05):
        try:
            with Monitor(path) as monitor:
                return do(monitor)
        except Busy as error:
            trouble = error
    assert trouble
    raise trouble


def loses_pages(monitor: Monitor) -> bool:
    """Whether a live migration of the guest may leave out pages that it writes meanwhile: QEMU before 9.0 under TCG."""
    return answers.version(monitor)[:2] < COHERENT and not answers.kvm(monitor)


def keeps_sleep(monitor: Monitor) -> bool:
    """Whether a guest that sleeps goes on to sleep behind a migration: QEMU from 9.0 on, which ends over its `cont`."""
    return answers.version(monitor)[:2] >= KEEPS_SLEEP


def version_words(monitor: Monitor) -> str:
    major, minor, _ = answers.version(monitor)
    return f"QEMU {major}.{minor}"


def ram_blocks(monitor: Monitor) -> dict[str, tuple[int, int]]:
    """Name to used and greatest size, in bytes, of each RAM block of a guest."""
    return {name: (block.used, block.most) for name, block in answers.ram_blocks(monitor).items()}


def odd_pages(monitor: Monitor) -> list[str]:
    """The RAM blocks of a guest whose pages are not of 4 KiB."""
    return [name for name, block in answers.ram_blocks(monitor).items() if block.page != "4 KiB"]


def lost_its_snapshot(guest_state: GuestState, pid: int) -> bool:
    """Whether a guest waits for ever at a page that it may not write into."""
    runs = guest_state.run in RUNS and not guest_state.moving
    return runs and userfault.waits(pid) and userfault.protected(pid)
