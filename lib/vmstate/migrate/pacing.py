"""What is done beside a move that is under way: its pause is kept short, and it does not last for ever.

QEMU stops a guest for the last part as soon as that takes no longer than its downtime-limit, however much shorter it
would be a round later.  So the limit begins low, and rises round by round to what is set in QEMU; one that was asked
for stays as it is.
"""

import contextlib
import threading
import time
from collections.abc import Callable

from ..errors import CannotDo, VmstateError
from ..qemu import state
from ..qemu.monitor import Monitor
from ..qemu.outgoing import OutgoingMigration
from ..qemu.state import GuestState
from .direct import MigratePlan, too_long
from .filters import FilteredStream
from .postcopy_link import PostcopyBridge

LOOK = 0.15
# The lowest downtime-limit, in ms: with a lower one also a guest at rest takes several rounds.
FIRST_PAUSE = 20
PAUSE = "downtime-limit"
# How long a link may stand still while the guest runs, in seconds
STALLS = 120.0


class Watch:
    """While this context lasts: a thread that looks at the guest now and then.

    interrupt: called with the error of a move that takes too long, or stands still with its guest.  switch: called
    instead at the limits of the plan, where it is set.
    """

    def __init__(
        self,
        plan: MigratePlan,
        outgoing: FilteredStream | PostcopyBridge,
        migration: OutgoingMigration,
        interrupt: Callable[[VmstateError], object],
    ) -> None:
        saved = migration.saved
        self._shut_down = migration.shut_down
        self.switch: Callable[[], object] | None = None
        self._plan = plan
        self._outgoing = outgoing
        self._interrupt = interrupt
        self._most = saved.parameters.get(PAUSE, FIRST_PAUSE) if plan.downtime is None else 0
        self._pause, self._round = FIRST_PAUSE, 0
        # In postcopy a link that stands still is better waited for than lost.
        self._crossing = False
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        # Not to wait for it: the guest stands still.
        self._over.set()

    def _work(self) -> None:
        sent, since = -1, time.monotonic()
        while not self._over.wait(LOOK):
            now = time.monotonic()
            if self._outgoing.sent != sent:
                sent, since = self._outgoing.sent, now
            stalled = now - since > self._plan.handover
            if now - since > max(STALLS, self._plan.handover) and not self._crossing:
                return self._stalled(now - since)
            try:
                with Monitor(self._plan.path, 0.5) as monitor:
                    guest_state = state.query(monitor)
                    self._raise_pause(monitor, guest_state)
            except VmstateError:
                # Others have it; the next look will do.
                continue
            if not self._over.is_set() and guest_state.run == "shutdown" and guest_state.moving:
                self._interrupt(self._shut_down())
                return None
            if not self._over.is_set():
                self._check_limits(guest_state, stalled)
        return None

    def _stalled(self, seconds: float) -> None:
        self._interrupt(CannotDo(f"nothing has passed over the link for {seconds:.0f} s"))

    def _raise_pause(self, monitor: Monitor, guest_state: GuestState) -> None:
        """Twice as long for each round that it did not suffice for."""
        now = guest_state.ram.round if guest_state.ram else 0
        # The first round has all of the memory, and says nothing.
        if not guest_state.moving or self._pause >= self._most or now <= max(self._round, 2):
            return
        self._round, self._pause = now, min(self._most, 2 * self._pause)
        monitor.ask("migrate-set-parameters", **{PAUSE: self._pause})

    def _check_limits(self, guest_state: GuestState, stalled: bool) -> None:
        reason = too_long(self._plan, guest_state, self._started)
        if reason and self.switch:
            if guest_state.migration == "active":
                self._crossing = True
                with contextlib.suppress(VmstateError):
                    self.switch()
        elif reason:
            self._interrupt(CannotDo(reason, "a higher --downtime, --auto-converge, --postcopy or vm-speed may help"))
        if stalled and guest_state.run == "finish-migrate":
            text = f"nothing has passed over the link for {self._plan.handover:.0f} s, with the guest standing still"
            self._interrupt(CannotDo(text))
