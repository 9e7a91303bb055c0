"""What is done beside a dump, so that it ends: its limits, and a guest that writes faster than it is sent."""

import contextlib
import threading
import time

from ..errors import CannotDo, VmstateError
from ..qemu.limits import Convergence, Limits
from ..qemu.monitor import Monitor
from ..qemu.outgoing import OutgoingMigration
from ..qemu.state import GuestState, query
from ..report import Report, size_words
from ..signals import hear_interruptions, interrupt

LOOK = 0.15
HINT = "a faster sink, a higher --downtime, --stop or --snapshot may help"


class Pace:
    """While this context lasts; a limit that passes is raised in the main thread, as a signal is.

    live: the guest runs meanwhile.  Where no limit was set, one that does not converge is paused for the rest.
    """

    def __init__(self, path: str, limits: Limits, live: bool, migration: OutgoingMigration, report: Report) -> None:
        self._path = path
        self._migration = migration
        self._limits = limits
        self._report = report
        self._watched = live
        self._convergence: Convergence | None = Convergence() if limits == Limits() else None
        self._started = time.monotonic()
        self._over = threading.Event()
        self._changing, self._interrupting = threading.Lock(), threading.Lock()
        self._timer = threading.Timer(limits.timeout or 0, self._time_is_over)
        self._timer.daemon = True
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Pace":
        hear_interruptions()
        if self._limits.timeout is not None:
            self._timer.start()
        if self._watched:
            self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self._timer.cancel()
            # What is changed in QEMU is known before it is put back, and what interrupts has come.
            with self._interrupting, self._changing:
                self._over.set()
        finally:
            self._over.set()

    def _time_is_over(self) -> None:
        self._interrupt(CannotDo(f"the dump was not over in {self._limits.timeout:g} s", HINT))

    def _interrupt(self, error: CannotDo) -> None:
        with self._interrupting:
            if not self._over.is_set():
                interrupt(error)

    def _work(self) -> None:
        while not self._over.wait(LOOK):
            with contextlib.suppress(VmstateError), Monitor(self._path, 0.5) as monitor:
                # Others may have it; the next look will do.
                self._look(monitor, query(monitor))

    def _look(self, monitor: Monitor, guest_state: GuestState) -> None:
        if guest_state.run == "shutdown" and not self._over.is_set():
            self._interrupt(self._migration.shut_down())
        if not guest_state.moving or guest_state.run == "finish-migrate":
            return
        if reason := self._limits.passed("the dump", guest_state, self._started):
            self._interrupt(CannotDo(reason, HINT))
        elif self._convergence and self._convergence.stalls(guest_state):
            self._convergence = None
            self._pause(monitor, guest_state)

    def _pause(self, monitor: Monitor, guest_state: GuestState) -> None:
        """Have QEMU take its last step now: the state says that the guest ran, and a failure has it run on."""
        with self._changing:
            if self._over.is_set():
                return
            self._migration.saved.lift_downtime(monitor)
        left = size_words(guest_state.ram.remaining) if guest_state.ram else "the rest"
        why = "it writes its memory as fast as that is sent, and two rounds did not bring it nearer to its end"
        self._report.warning(f"the guest is paused while {left} are sent: {why} (--snapshot saves it without)")
