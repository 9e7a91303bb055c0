"""A guest that runs on pages which nobody brings any more: another server takes up its restore (`--resume`)."""

from ..errors import CannotDo, Misfit
from ..qemu import claim, markers
from ..qemu.control import run_on
from ..qemu.monitor import Monitor, StandsStill
from ..qemu.state import GuestState, query, wait_for, with_retry
from ..report import Report
from ..rollback import Rollback
from ..signals import hold_signals
from . import page_injection
from .lazy_plan import LazyPlan
from .lazy_state import LazyState
from .page_server_thread import Recovered, recover
from .postcopy import have_of
from .served_guest import SEES, ServedGuest


class Resume:
    """The guest at `path` goes on with `state`: `take_up`.  What is begun is noted in `rollback`."""

    def __init__(self, path: str, state: LazyState, plan: LazyPlan, report: Report, rollback: Rollback) -> None:
        self._path = path
        self._state = state
        self._plan = plan
        self._report = report
        self._rollback = rollback

    def take_up(self) -> tuple[ServedGuest, str]:
        """The guest, served again, and its run state.  CannotDo where it has a server, Misfit where it runs on another
        state."""
        try:
            return self._go_on()
        except StandsStill as error:
            wanted = None if self._plan.sure else self._state.identity
            page_injection.fill(error.pid, self._state.file, self._state.opening, wanted)
        lost = wait_for(self._path, lambda s: s.migration != "postcopy-active", SEES, "to see its loss")
        self._report.note(f"its QEMU was given what it lacked, from outside; the guest is '{lost.run}'")
        return self._go_on()

    def _go_on(self) -> tuple[ServedGuest, str]:
        with Monitor(self._path) as monitor:
            claim.take(monitor, self._path, serves=True)
            guest_state, halted = self._require_lost(monitor)
            found = recover(monitor, self._state.opening)
            hold_signals()
            guest = ServedGuest(self._path, self._state, self._plan, found.end)
            self._rollback.add("the channel", guest.close)
            guest.take_up(self._have(found, monitor.pid()), found.path, found.said)
        guest.serve(self._state.opening.part())
        guest.runs()
        return guest, with_retry(self._path, _run_on) if halted else guest_state.run

    def _have(self, found: Recovered, pid: int) -> dict[bytes, bytearray]:
        """What QEMU knows that it has, and what was put there from outside."""
        have = have_of(self._state.opening, found.bitmaps)
        for name, there in page_injection.present(pid, self._state.opening).items():
            known, seen = int.from_bytes(have[name], "big"), int.from_bytes(there, "big")
            have[name] = bytearray((known | seen).to_bytes(len(there), "big"))
        return have

    def _require_lost(self, monitor: Monitor) -> tuple[GuestState, bool]:
        """How it stands, and whether it was stopped because its pages could not be read."""
        path, guest_state, found = self._path, query(monitor), markers.read(monitor)
        if (markers.LAZY not in found and not self._plan.sure) or not guest_state.migration.startswith("postcopy"):
            text = f"the guest at {path} is not being restored lazily ({guest_state.run}, {guest_state.migration})"
            raise CannotDo(text, f"vm-status {path}")
        if guest_state.migration != "postcopy-paused":
            text = f"the guest at {path} has a server that brings its pages ({guest_state.migration})"
            raise CannotDo(text, f"vm-status {path}")
        if markers.LAZY in found and found[markers.LAZY].get("state") != self._state.identity:
            raise Misfit(f"this is not the state that the guest at {path} runs on", "its pages would be wrong")
        return guest_state, markers.HALTED in found


def _run_on(monitor: Monitor) -> str:
    markers.remove(monitor, markers.HALTED)
    return run_on(monitor).run
