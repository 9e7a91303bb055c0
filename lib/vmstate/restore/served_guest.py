"""A guest whose pages are brought while it runs: who watches over their server, until QEMU has all of them."""

import contextlib
import socket
from enum import Enum

from ..errors import CannotDo, Damaged, GuestGone, InDoubt, Refused, VmstateError
from ..phases import Phases
from ..qemu import markers
from ..qemu.monitor import Monitor
from ..qemu.run_states import RUNS
from ..qemu.settings import SavedSettings, clear_leftovers
from ..qemu.state import query, wait_for, with_retry
from .lazy_plan import LazyPlan
from .lazy_state import LazyState
from .page_queue import ServedPages
from .page_server import Lost, PageServer
from .page_server_thread import Serving
from .postcopy import ReturnPath, Said

# How long QEMU may take to see that its restore has ended, in seconds.
COMPLETES, SEES = 60.0, 20.0


class Phase(Enum):
    LOADING = "QEMU has not got as far as to let it run"
    SERVED = "it runs, or stands as it is to"
    PAUSED = "it stands, though it is to run: QEMU could not take its disks"
    HALTED = "it was stopped, since the rest of its pages cannot be read"


NEXT = {
    Phase.LOADING: frozenset({Phase.SERVED, Phase.PAUSED}),
    Phase.SERVED: frozenset({Phase.HALTED}),
    Phase.PAUSED: frozenset({Phase.HALTED}),
}


class ServedGuest:
    """The guest at `path`: `serve`, say what it `is` once that is known, then `wait`.

    end: our end of the channel, which `wait` closes.  saved: the settings of its QEMU that are put back then.
    """

    def __init__(self, path: str, state: LazyState, plan: LazyPlan, end: socket.socket) -> None:
        self.path = path
        self.saved = SavedSettings()
        # Bytes of the state
        self.total = state.file.content
        self._plan = plan
        self._end = end
        self._phase = Phases(Phase.LOADING, NEXT)
        number = end.fileno()
        self._server = PageServer(state.file, state.opening, number, number, on_demand=plan.on_demand, first=plan.first)
        self._serving = Serving(self._server, self._hang_up)

    @property
    def tally(self) -> ServedPages:
        return self._server.tally

    @property
    def error(self) -> BaseException | None:
        """What the server has ended with already."""
        return self._serving.error

    def take_up(self, have: dict[bytes, bytearray], path: ReturnPath, said: list[Said]) -> None:
        """As that of `PageServer`."""
        self._server.take_up(have, path, said)

    def serve(self, first: bytes) -> None:
        """From now on the guest may run: until `wait` a signal is to have all of its memory be brought."""
        self._serving.start(first)

    def runs(self) -> None:
        """Or stands, as it is to."""
        self._phase.go(Phase.SERVED)

    def stands(self) -> None:
        """It is served nevertheless, and `wait` says so when that is done."""
        self._phase.go(Phase.PAUSED)

    def close(self) -> None:
        """Its channel ends, and before it the server: the number of a closed one may be another's."""
        self._hang_up()
        self._serving.join()
        self._end.close()

    def wait(self) -> None:
        """Until QEMU has everything, or the guest is gone that was to be served as long as it lives.

        A signal has all that is left be sent first.  Damaged where the file is, InDoubt where the guest runs on and
        lacks pages, or stands though it is to run.
        """
        error = self._serving.wait(self._halt)
        self._end.close()
        if isinstance(error, Damaged):
            raise self._damaged(error) from error
        if error is not None:
            self._check_loss(error)
            return
        wait_for(self.path, lambda guest_state: not guest_state.moving, COMPLETES, "to complete")
        with_retry(self.path, self._afterwards)
        if self._phase.now is Phase.PAUSED:
            words = f"the guest at {self.path} is loaded, but stands paused: QEMU could not take its disks"
            raise InDoubt(words, f"once their other user is gone: vm-cont {self.path}")

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def _halt(self) -> None:
        """A page that nobody has asked for cannot be read: stop the guest while all that is asked for can be."""
        self._phase.go(Phase.HALTED)
        with contextlib.suppress(VmstateError), Monitor(self.path) as monitor:
            if query(monitor).run in RUNS:
                # Before it stands: that can take until it is served again, where it waits for a page.
                markers.put(monitor, markers.HALTED)
                monitor.ask("stop")
        self._server.give_up()

    def _damaged(self, error: Damaged) -> Damaged:
        halted = self._phase.now is Phase.HALTED
        stands = "was stopped" if halted else "stands still as soon as it needs a page that it lacks"
        hint = f"with a good copy of this state: {self._resume()}"
        return Damaged(f"{error}; the guest at {self.path} {stands}", hint)

    def _check_loss(self, error: BaseException) -> None:
        if not isinstance(error, Lost):
            raise error
        try:
            guest_state = wait_for(self.path, lambda s: s.migration != "postcopy-active", SEES, "to end the restore")
        except VmstateError as gone:
            if isinstance(gone, GuestGone) and self._plan.on_demand:
                return
            raise GuestGone(f"the guest at {self.path} ended while its memory was being read") from gone
        words = f"the guest at {self.path} runs ({guest_state.migration}), and lacks pages: {error}"
        raise InDoubt(words, self._resume()) from error

    def _resume(self) -> str:
        return markers.resume_command(self.path, {markers.LAZY: {"on_demand": self._plan.on_demand}})

    def _afterwards(self, monitor: Monitor) -> None:
        guest_state = query(monitor)
        if guest_state.migration == "failed":
            raise CannotDo(f"QEMU ended the restore as failed: {guest_state.reason}")
        for name in (markers.LAZY, markers.HALTED):
            markers.remove(monitor, name)
        with contextlib.suppress(Refused):
            self.saved.put_back(monitor)
            if self._plan.resume:
                clear_leftovers(monitor)
