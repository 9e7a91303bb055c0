"""The state of one instant to a sink, while the guest goes on (`vm-dump --snapshot`, QEMU's background-snapshot).

QEMU keeps each page as it was until it has been sent.  There is no return path, and none is needed; but a snapshot
must come to its end: where QEMU 7.2 cannot send on, or is told to cancel, it leaves the guest's pages protected, and
the guest waits for ever at its next write.  So whatever becomes of the sink, or of us, all that QEMU sends is taken.
"""

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import CannotDo, Refused, Stopped, VmstateError
from ..io.descriptors import BLOCK
from ..progress import Progress
from ..qemu import claim, hugepages, sendable, settings
from ..qemu.migration_progress import sample
from ..qemu.monitor import ANSWER, Monitor
from ..qemu.state import FOR_EVER, query, query_once, wait_for, with_retry
from ..signals import no_more_signals, release_signals
from ..stream.validate import State
from .live import Dump
from .watchdog import Drain

WORDS = {
    "not supported by host kernel": "userfaultfd with write-protection is missing in this kernel, or for root alone: "
    "sysctl vm.unprivileged_userfaultfd=1",
    "not supported by guest memory": "its RAM is shared, or has pages that cannot be write-protected",
}
# Seconds for a QEMU to answer whoever has it begin, and to send the rest of a snapshot that nobody wants any more
TALKS, DRAINS = 5.0, 60.0
OTHERWISE = "save it with a longer pause: vm-dump --after running, or --snapshot-or-live"


class NoSnapshot(CannotDo):
    """This guest, or this host, cannot; nothing has begun."""


def possible(path: str) -> bool:
    """Whether the guest runs: one that stands needs no snapshot, and some QEMU would let it run for one.

    NoSnapshot where it runs, and a snapshot cannot be had.
    """
    saved = settings.SavedSettings()
    with Monitor(path) as monitor:
        if sendable.require_sendable(monitor, path).run not in ("running", "suspended"):
            return False
        claim.take(monitor, path)
        try:
            settings.prepare(monitor, settings.SNAPSHOT, {}, saved)
        except Refused as error:
            hints = [hint for words, hint in WORDS.items() if words in error.text.lower()]
            raise NoSnapshot(f"no snapshot of the guest at {path}: {error.text}", *hints, OTHERWISE) from error
        finally:
            saved.put_back(monitor)
    return True


class Snapshot(Dump):
    """As `Dump`; the guest is not given away, and runs (or stands) as before."""

    CAPABILITIES = settings.SNAPSHOT
    _pause: float | None = None
    _talk: "_Talk | None" = None

    def run(self) -> dict[str, Any]:
        try:
            with Monitor(self._plan.path) as monitor:
                pid = monitor.pid()
            huge = hugepages.find(pid)
            with self._pace(live=False):
                state = self._send()
                self._complete()
                self._prove()
            self._write_down(state)
            no_more_signals()
        except BaseException as error:
            raise self._failed(error) from error
        self._report.settle()
        with contextlib.suppress(Refused):
            with_retry(self._plan.path, self._migration.saved.put_back)
        self._leave_guard()
        after = query_once(self._plan.path)
        outcome = self._outcome(state, self._pause, after.run)
        # All is done; what becomes of this, or of the guest meanwhile, changes nothing.
        hugepages.make_whole(pid, huge)
        return outcome

    def _complete(self) -> None:
        guest_state = wait_for(self._plan.path, lambda found: not found.moving, 60, "to complete")
        if guest_state.migration != "completed":
            raise CannotDo(f"QEMU ended the snapshot as '{guest_state.migration}': {guest_state.reason}")

    @property
    def _drain(self) -> Drain:
        ours = self._ours.fileno()
        return ours, lambda: drain(self._plan.path, ours)

    def _may_ask(self) -> bool:
        # Before it has begun there is the status of the migration before it.
        return self._talk is not None and self._talk.ended.is_set()

    def _failed(self, error: BaseException) -> BaseException:
        no_more_signals()
        if self._talk:
            with discarding(self._ours.fileno()):
                self._end_talk(self._talk)
            if self._talk.error and not isinstance(error, Stopped):
                error = self._talk.error
        # Undone first, but for the sink, which must not take a part for the whole meanwhile.
        self._rollback.keep("the sink")
        self._rollback.add("the snapshot", self._end_snapshot)
        self._rollback.add("the sink", self._let_go_of_the_sink)
        return super()._failed(error)

    def _end_talk(self, talk: "_Talk") -> None:
        if not talk.ended.wait(TALKS):
            self._migration.hang_up()
            talk.ended.wait(TALKS)

    def _end_snapshot(self) -> None:
        self._theirs.close()
        if self._migration.begun:
            # Whether the guest is well after all is seen when it is taken back.
            with contextlib.suppress(VmstateError):
                # What takes longer the watchdog goes on with.
                drain(self._plan.path, self._ours.fileno(), self._migration.saved, DRAINS)

    def _send(self) -> State:
        with_retry(self._plan.path, self._migration.claim)
        self._guard.watch()
        if self._disks:
            self._disks.prepare()
        self._talk = _Talk(self._begin)
        self._talk.start()
        release_signals()
        with Progress(self._report, self._mode, lambda: sample(self._plan.path)):
            state = self._outgoing.run()
        if not self._talk.ended.wait(ANSWER):
            raise CannotDo(f"QEMU has sent its snapshot, and does not answer in {ANSWER:.0f} s")
        if self._talk.error:
            raise self._talk.error
        self._warn_of_waking()
        return state

    def _begin(self) -> None:
        try:
            self._pause = self._migration.snapshot(self._theirs.fileno(), self._disks.take if self._disks else None)
        except BaseException:
            if not self._migration.sent:
                # Nothing comes; QEMU would not survive this where something did.
                self._ours.shutdown(socket.SHUT_RD)
            raise
        finally:
            self._theirs.close()


class _Talk(threading.Thread):
    """The talk with a QEMU whose bytes are taken meanwhile: it may wait for that itself before it answers.

    (Its own thread can write to a page that is kept as it was, and which waits to be sent.)  error: what came of it.
    """

    def __init__(self, talk: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._do = talk
        # Not `join`: a signal that interrupts it makes Python 3.11 take the thread for ended.
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._do()
        except BaseException as error:  # noqa: BLE001 - for the other thread, which raises it
            self.error = error
        finally:
            self.ended.set()


@contextlib.contextmanager
def discarding(fd: int) -> Iterator[None]:
    """Take and throw away what comes from `fd`, while the `with` block runs."""
    over = threading.Event()

    def discard() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not over.is_set():
            if poll.poll(50) and not os.read(fd, BLOCK):
                over.wait()

    thread = threading.Thread(target=discard, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def drain(path: str, fd: int, saved: settings.SavedSettings | None = None, seconds: float = FOR_EVER) -> None:
    """Take what QEMU still sends to the other end of `fd`, as fast as it can, until it has sent all.

    saved: the settings of this command; None: those that one that died has left.  CannotDo where it takes longer.
    """
    with discarding(fd):
        if with_retry(path, lambda monitor: _unlimited(monitor, saved), seconds):
            wait_for(path, lambda guest_state: not guest_state.moving, seconds, "to end its snapshot")


def _unlimited(monitor: Monitor, saved: settings.SavedSettings | None) -> bool:
    """Lift the limit of what QEMU sends; whether it still sends."""
    if not query(monitor).moving:
        return False
    (saved or settings.left_behind(monitor) or settings.SavedSettings()).lift_rate(monitor)
    return True
