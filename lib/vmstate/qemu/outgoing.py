"""A migration out of a QEMU: begin to send a guest's state, complete it, or have the guest run on."""

import contextlib
from collections.abc import Callable
from typing import Any

from ..errors import CannotDo, InDoubt, Refused, VmstateError
from . import answers, claim, markers
from .control import run_on
from .monitor import Monitor
from .run_states import RUNS
from .sendable import asleep_error, require_sendable, wakes
from .settings import DEFAULT_BANDWIDTH, ON, SNAPSHOT, SavedSettings, prepare, ran
from .snapshot_pause import run_on_once_kept, stood_for
from .state import (
    SOON,
    GuestState,
    keeps_sleep,
    look_until,
    loses_pages,
    query,
    version_words,
    wait_for,
    with_retry,
)

# The name under which QEMU keeps our descriptor; one left over by a killed command is replaced by the next.
NAME = "vmstate"


class OutgoingMigration:
    """The state of a guest on its way to our end of a socket pair.

    QEMU has `return-path` on: after the last byte it waits, the guest stopped, for our word on the socket.  `give_away`
    is the point of no return; when instead our end closes, also by our death, the guest runs on by itself.
    """

    def __init__(
        self,
        path: str,
        *,
        rate: int | None = None,
        downtime: int | None = None,
        on: tuple[str, ...] = ON,
        mark: dict[str, Any] | None = None,
        live_anyway: bool = False,
        ends: bool = False,
    ) -> None:
        """mark: facts about the move, to be left in the guest; None where its state goes into a file.

        live_anyway: do not pause the guest first where a live migration may lose pages.  ends: its QEMU is to end then.
        """
        self.path = path
        self._mark = mark
        self._rate = rate
        self._downtime = downtime
        self._on = on
        self._live_anyway = live_anyway
        self._may_sleep = ends or on == SNAPSHOT
        # It has shut down, which its QEMU does not show any more.
        self.off = False
        # The QEMU that lets a guest run that slept, in words; None where it did not sleep, or that QEMU does not.
        self.wakes: str | None = None
        # The QEMU that made it necessary to pause the guest first, in words; None where it was not.
        self.paused_first: str | None = None
        self.saved = SavedSettings()
        self._stopped = False
        # It was given away for its state alone, and is to go on here; it does, and how its migration had ended.
        self._runs_on = False
        self.ran_on: GuestState | None = None
        # The process that puts things back
        self.watchdog: int | None = None
        self.begun = False
        self._talk: Monitor | None = None
        # QEMU has begun to send.
        self.sent = False

    def claim(self, monitor: Monitor) -> None:
        """Also before, by one who changes something of the guest before its state is sent."""
        claim.take(monitor, self.path, watchdog=self.watchdog, move=str((self._mark or {}).get("move", "")))

    def start(self, fd: int, *, stopped: bool, take: Callable[[Monitor], None] | None = None) -> None:
        """Send to the socket `fd`; with `stopped` the guest is stopped first.

        It is stopped as well where a live migration may lose pages.  take: what belongs to the instant in which it
        stands.  Once `begun` is true there is something for `take_back` to undo, also where this raises.
        """

        def send(monitor: Monitor) -> None:
            if self.saved.ran and not (stopped or take or self._live_anyway) and loses_pages(monitor):
                self.paused_first = version_words(monitor)
            if (stopped or take or self.paused_first) and self.saved.ran:
                self._stopped = True
                self.saved.pause(monitor)
            if take:
                take(monitor)
            monitor.send_fd(NAME, fd)
            monitor.ask("migrate", uri=f"fd:{NAME}")

        self._begin(send)

    def snapshot(self, fd: int, take: Callable[[Monitor], None] | None = None) -> float | None:
        """Send the state of an instant to the socket `fd`, while the guest goes on; how long it stood, in ms.

        None where it stood before.  take: what belongs to that instant, the guest being stopped for it.  CannotDo where
        this guest, or this host, cannot do that.
        """
        paused: list[float] = []

        def send(monitor: Monitor) -> None:
            monitor.send_fd(NAME, fd)
            if take:
                self._stopped = self.saved.ran
                if self.saved.ran:
                    self.saved.pause(monitor)
                take(monitor)
            # Before the word is given: where no answer comes, it may be sending.
            self.sent = True
            try:
                monitor.ask("migrate", uri=f"fd:{NAME}")
            except Refused:
                self.sent = False
                raise
            if take and self.saved.ran:
                run_on_once_kept(monitor)
                self.saved.resumed(monitor)
            if self.saved.ran and (pause := stood_for(monitor)) is not None:
                paused.append(pause)

        self._begin(send)
        return paused[0] if paused else None

    def move(self, uri: str, fd: int | None = None) -> None:
        """Send to another QEMU: at `uri`, or behind the descriptor `fd`."""

        def send(monitor: Monitor) -> None:
            if fd is not None:
                monitor.send_fd(NAME, fd)
            monitor.ask("migrate", uri=uri if fd is None else f"fd:{NAME}")

        self._begin(send)

    def _begin(self, send: Callable[[Monitor], None]) -> None:
        with Monitor(self.path) as monitor:
            self._talk = monitor
            self.claim(monitor)
            guest_state = require_sendable(monitor, self.path)
            markers.refuse(markers.read(monitor), guest_state, self.path)
            if guest_state.run == "suspended":
                self.wakes = wakes(monitor, self.path, self._may_sleep)
            self.saved.found = guest_state.run
            self.saved.ran = ran(monitor, guest_state)
            self._stopped = self.saved.stopped = self.saved.ran and guest_state.run not in RUNS
            self.begun = True
            try:
                markers.clear(monitor)
                if self._mark is not None:
                    markers.put(monitor, markers.MOVED, ran=self.saved.ran, found=guest_state.run, **self._mark)
                prepare(monitor, self._on, self._parameters(monitor), self.saved)
                send(monitor)
            except Refused as error:
                raise _explained(error, self.path) from error

    def require_resumable(self, saved: str, asleep: bool) -> None:
        """CannotDo where the guest whose state has come whole could not go on, here or there.

        saved: the run state in it.  asleep: it sleeps.
        """
        if saved == "shutdown":
            raise self.shut_down()
        if asleep and not self._may_sleep and with_retry(self.path, keeps_sleep):
            raise asleep_error(self.path)

    def shut_down(self) -> CannotDo:
        """The error for a guest that has shut down meanwhile: it may not run on, which QEMU can forget."""
        self.off, self.saved.ran = True, False
        return CannotDo(f"the guest at {self.path} has shut down while its state was being sent")

    def hang_up(self) -> None:
        """From another thread: the conversation in which it is begun ends, wherever it is."""
        if self._talk:
            self._talk.hang_up()

    def _parameters(self, monitor: Monitor) -> dict[str, Any]:
        wanted: dict[str, Any] = {}
        if self._rate is not None:
            wanted["max-bandwidth"] = self._rate
        elif answers.parameters(monitor).get("max-bandwidth") == DEFAULT_BANDWIDTH:
            wanted["max-bandwidth"] = 0
        if self._downtime is not None:
            wanted["downtime-limit"] = self._downtime
        return wanted

    def completed(self) -> GuestState:
        """After the given-away word: wait for QEMU's `completed` and put back what was found."""
        if self.ran_on:
            # It goes on here, and what has become of it since is not ours.
            with contextlib.suppress(VmstateError):
                with_retry(self.path, self.saved.put_back)
            return self.ran_on
        guest_state = with_retry(self.path, self._over_soon)
        if guest_state.moving:
            guest_state = wait_for(self.path, lambda s: not s.moving, 60, "to complete")
            with contextlib.suppress(Refused):
                with_retry(self.path, self.saved.put_back)
        if guest_state.migration != "completed":
            self.take_back()
            raise _not_completed(guest_state)
        return guest_state

    def _over_soon(self, monitor: Monitor) -> GuestState:
        """Where it stands, and if it is over, with what was found put back."""
        guest_state = look_until(monitor, lambda found: not found.moving, SOON)
        if guest_state.migration == "completed":
            with contextlib.suppress(Refused):
                self.saved.put_back(monitor)
        return guest_state

    def run_on(self, give_away: Callable[[], None]) -> None:
        """Have QEMU complete, and its guest run on at once; `give_away` gives the word for it.

        What was found is put back later.  Busy where another client holds the monitor: then nothing was done.
        """
        with Monitor(self.path) as monitor:
            give_away()
            self._runs_on = True
            guest_state = look_until(monitor, lambda found: not found.moving, 60)
            if guest_state.migration != "completed":
                if not guest_state.moving:
                    self.taken_back(monitor)
                raise _not_completed(guest_state)
            run_on(monitor)
            # From here on it is nobody's, and another command may send it away.
            self.ran_on, self._runs_on, self._stopped = guest_state, False, False
            self.saved.resumed(monitor)

    def take_back(self) -> GuestState:
        """After our end was closed: wait until QEMU has noticed, put back what was found, see the guest run again."""
        if self.ran_on:
            return with_retry(self.path, self._left_running)
        wait_for(self.path, lambda s: s.at_rest, 60, "to run on")
        return with_retry(self.path, self.taken_back)

    def _left_running(self, monitor: Monitor) -> GuestState:
        with contextlib.suppress(Refused):
            self.saved.put_back(monitor)
        return query(monitor)

    def taken_back(self, monitor: Monitor) -> GuestState:
        """The same within a conversation, once QEMU has noticed."""
        guest_state = query(monitor)
        if guest_state.moving or (guest_state.given_away and not self._runs_on):
            words = f"another migration of the guest at {self.path} has begun meanwhile ({guest_state.migration})"
            raise InDoubt(words, f"vm-status {self.path}")
        markers.keep(monitor, (self._mark or {}).get("move"))
        if self.off:
            markers.put(monitor, markers.OFF)
        with contextlib.suppress(Refused):
            # Not there any more, where QEMU got as far as using it.
            monitor.ask("closefd", fdname=NAME)
        # QEMU itself has had a guest run on that ran when it was to take its last step.
        ours = (guest_state.run in ("paused", "postmigrate") and self._stopped) or guest_state.given_away
        after = run_on(monitor) if self.saved.ran and ours else query(monitor)
        with contextlib.suppress(Refused):
            self.saved.put_back(monitor)
        return after


def _not_completed(guest_state: GuestState) -> CannotDo:
    return CannotDo(f"QEMU ended the migration as '{guest_state.migration}': {guest_state.reason or 'no reason given'}")


def _explained(error: Refused, path: str) -> CannotDo:
    if "non-migratable" in error.text or "block" in error.text.lower():
        return CannotDo(f"the guest at {path} cannot be saved: {error.text}", "QEMU names the device in its way")
    return error
