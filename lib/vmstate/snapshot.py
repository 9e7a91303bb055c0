"""The state of one instant to a sink, while the guest goes on (`vm-dump --snapshot`, QEMU's background-snapshot).

QEMU keeps each page as it was until it has been sent.  There is no return path, and none is needed: whatever becomes of
the sink, the guest runs.
"""

import contextlib
from typing import Any

from . import guest
from .check import State
from .command import no_more_signals, release_signals
from .dump import Dump, sample
from .errors import CannotDo, Refused, VmstateError
from .guard import Guard
from .progress import Progress
from .stage import Stage

WORDS = {
    "not supported by host kernel": "the kernel of this host has no write-protection by userfaultfd",
    "not supported by guest memory": "its RAM is shared, or has pages that cannot be write-protected",
    "userfault": "userfaultfd is for root, or after: sysctl vm.unprivileged_userfaultfd=1",
}
OTHERWISE = "save it with a longer pause: vm-dump --after running, or --snapshot-or-live"


class NoSnapshot(CannotDo):
    """This guest, or this host, cannot; nothing has begun."""


class Snapshot(Dump):
    """As `Dump`; the guest is not given away, and runs (or stands) as before."""

    CAPABILITIES = guest.SNAPSHOT
    _pause: float | None = None

    def run(self) -> dict[str, Any]:
        try:
            state = self._send()
            standing = guest.wait_for(self._plan.path, lambda found: not found.moving, 60, "to complete")
            if standing.migration != "completed":
                raise CannotDo(f"QEMU ended the snapshot as '{standing.migration}': {standing.reason}")
            self._prove()
            no_more_signals()
        except BaseException as error:
            raise self._put_back(error) from error
        with contextlib.suppress(Refused):
            guest.patiently(self._plan.path, self._sending.found.put_back)
        if self._guard:
            self._guard.done()
        after = guest.glance(self._plan.path)
        return {**self._outcome(state, {}, after.run), "downtime_ms": self._pause}

    def _make_guard(self) -> Guard:
        if isinstance(self._sink, Stage):
            return Guard(self._plan.path, self._sink.group, self._sink.fd, snapshot=True)
        return Guard(self._plan.path, snapshot=True)

    def _send(self) -> State:
        assert self._guard
        self._guard.watch()
        try:
            self._pause = self._sending.snapshot(self._theirs.fileno())
        except Refused as error:
            raise _explained(error) from error
        self._theirs.close()
        release_signals()
        with Progress(self._report, self._mode, lambda: sample(self._plan.path)):
            return self._outgoing.run()


def _explained(error: Refused) -> VmstateError:
    """QEMU says so when it is asked for the capability, and has not begun then."""
    if "migrate-set-capabilities" in str(error):
        hints = [hint for words, hint in WORDS.items() if words in error.text.lower()]
        return NoSnapshot(f"no snapshot of this guest: {error.text}", *hints, OTHERWISE)
    return error
