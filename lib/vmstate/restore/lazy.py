"""A guest that runs before its memory is read (`vm-restore --lazy`), and how such a restore is taken up again.

Here the part that talks to QEMU and the part that reads states meet: a server of pages, and who watches over it.
"""

import contextlib
import socket
import time
from dataclasses import dataclass, field

from ..checkpoint.revert import Revert
from ..errors import CannotDo, Damaged, GuestGone, InDoubt, Misfit, Refused, VmstateError
from ..io.descriptors import channel
from ..qemu import markers
from ..qemu.control import run_on
from ..qemu.incoming import NO_ROUNDS, Waiting, refusal, require_waiting
from ..qemu.launch import Process, check_arguments
from ..qemu.monitor import Monitor, StandsStill
from ..qemu.outgoing import NAME
from ..qemu.settings import SavedSettings, clear_leftovers, prepare
from ..qemu.state import GuestState, odd_pages, query, query_once, wait_for, with_retry
from ..report import Report
from ..signals import hold_signals, no_more_signals, release_signals
from ..stream.identity import identity
from ..vmz.state_file import state_of
from . import page_injection
from .compatibility import Against
from .lazy_state import open_state, opening_identity
from .outcome import Outcome, nics_of
from .page_order import Place
from .page_queue import ServedPages
from .page_server import Lost, PageServer
from .page_server_thread import Recovered, Serving, recover
from .postcopy import NotLazy, have_of, opening_of
from .used_states import UsedStates

# What may lie between us and QEMU: a request waits behind it.
ROOM = 128 << 10
RUNS = ("running", "suspended")
STARTS = 60.0


@dataclass(frozen=True)
class LazyPlan:
    """path: the waiting guest, or command: the QEMU to start.  run: None as saved, else whether it is to run.

    first: pages to be sent before the rest.  resume: the guest runs already, and has lost its server; sure: though it
    is not marked with the state that it runs on.  disks, used: as in `eager.RestorePlan`.
    """

    path: str | None = None
    command: list[str] = field(default_factory=list)
    run: bool | None = None
    on_demand: bool = False
    first: list[Place] = field(default_factory=list)
    resume: bool = False
    sure: bool = False
    disks: Revert | None = None
    used: UsedStates | None = None


class Lazy:
    """One lazy restore: `start` returns when the guest runs, `wait` when QEMU has everything.

    Signals wait in between.
    """

    def __init__(self, plan: LazyPlan, report: Report, fd: int) -> None:
        self._plan = plan
        self._report = report
        self._file = open_state(fd)
        self._opening = opening_of(self._file)
        self._state = state_of(self._file)
        if plan.disks:
            plan.disks.validate(self._state)
        if plan.used:
            plan.used.require_new(identity(self._state))
        self._process: Process | None = None
        self._saved = SavedSettings()
        self._ours: socket.socket | None = None
        self._serving: Serving | None = None
        self._halted = self._was_halted = False
        self._in_doubt: InDoubt | None = None
        self.path = plan.path or ""
        self.seconds = 0.0

    @property
    def tally(self) -> ServedPages:
        return self._serving.server.tally if self._serving else ServedPages()

    def start(self) -> Outcome:
        """The guest runs (or stands, where it is to); what `Restore.run` gives."""
        begun = time.monotonic()
        try:
            if self._plan.command:
                check_arguments(self._plan.command[1:])
                hold_signals()
                command = self._plan.command
                self._process = Process(self._plan.disks.prepare(command) if self._plan.disks else command)
                release_signals()
                self._process.wait_until_it_answers()
                self.path = self._process.path
            state = self._take_up() if self._plan.resume else self._begin()
        except BaseException as error:
            raise self._put_back(error) from error
        self.seconds = time.monotonic() - begun
        nics = [] if self._plan.resume or state not in RUNS else nics_of(Waiting(self.path), self._report)
        if self._process and self._process.added:
            self._report.hint(f"the guest's monitor is {self.path}")
        saved = self._state
        return Outcome(self.path, state, saved.runstate, saved.machine, saved.size, nics)

    @property
    def total(self) -> int:
        """Bytes of the state."""
        return self._file.content

    def wait(self) -> None:
        """Until QEMU has everything, or the guest is gone that was to be served as long as it lives.

        A signal has all that is left be sent first.  Damaged where the file is, InDoubt where the guest runs on and
        lacks pages.
        """
        assert self._serving
        error = self._serving.wait(self._halt)
        if self._ours:
            self._ours.close()
        if isinstance(error, Damaged):
            raise self._damaged(error) from error
        if error is not None:
            self._check_loss(error)
            return
        wait_for(self.path, lambda guest_state: not guest_state.moving, 60, "to complete")
        with_retry(self.path, self._afterwards)
        if self._in_doubt:
            raise self._in_doubt

    # the beginning

    def _begin(self) -> str:
        run = self._state.runstate in RUNS if self._plan.run is None else self._plan.run
        self._require_fit()
        self._ours, theirs = channel(ROOM)
        serving = self._make_serving(self._ours.fileno())
        with Monitor(self.path) as monitor:
            require_waiting(monitor, self.path)
            hold_signals()
            self._set_up(monitor, run)
            if self._plan.used:
                self._plan.used.note(identity(self._state))
            monitor.send_fd(NAME, theirs.fileno())
            Waiting.incoming(monitor)
            theirs.close()
            # Until `wait`: from now on the guest may run, and then a signal is to have all of its memory be brought.
            serving.start(self._opening.stream())
            return self._until_it_runs(monitor, run)

    def _require_fit(self) -> None:
        """Misfit where the guest is another one; NotLazy where it cannot run on pages that come later."""
        Against(self.path).whole(self._state)
        with Monitor(self.path) as monitor:
            if odd := odd_pages(monitor):
                raise NotLazy(f"the guest at {self.path} has pages that are not of 4 KiB: {', '.join(odd)}", EAGER)
            with contextlib.suppress(Refused):
                shared = [back["id"] for back in monitor.ask("query-memdev") if back.get("share")]
                if shared:
                    raise NotLazy(f"the guest at {self.path} has RAM that others share ({', '.join(shared)})", EAGER)

    def _set_up(self, monitor: Monitor, run: bool) -> None:
        markers.clear(monitor)
        silent = monitor.ask("query-migrate-parameters").get("announce-rounds") == 0
        if silent:
            self._report.note(NO_ROUNDS)
        try:
            prepare(monitor, ("postcopy-ram",), {"announce-rounds": 1} if silent else {}, self._saved)
        except Refused as error:
            self._saved.put_back(monitor)
            hint = "userfaultfd is for root, or after: sysctl vm.unprivileged_userfaultfd=1"
            raise NotLazy(f"this QEMU cannot load lazily here: {error.text}", hint, EAGER) from error
        markers.put(monitor, markers.LAZY, state=opening_identity(self._opening), on_demand=self._plan.on_demand)
        # Whether a guest runs that is loaded in this way is not in its state, but set here.
        monitor.ask("cont" if run else "stop")

    def _until_it_runs(self, monitor: Monitor, run: bool) -> str:
        give_up = time.monotonic() + STARTS
        try:
            while True:
                guest_state = query(monitor)
                if guest_state.migration == "failed":
                    raise refusal(guest_state.reason, True)
                if guest_state.run in RUNS or (guest_state.run == "paused" and _crossed(guest_state)):
                    break
                if self._serving and self._serving.error:
                    raise self._serving.error
                if time.monotonic() > give_up:
                    raise CannotDo(f"QEMU has not loaded the devices within {STARTS:.0f} s")
                time.sleep(0.001)
        except VmstateError as error:
            # A QEMU that waits for a page does not answer; once the channel has ended, it ends over that.
            if self._serving and isinstance(self._serving.error, Damaged):
                raise self._serving.error from error
            if isinstance(error, GuestGone | Lost):
                raise self._refusal(error) from error
            raise
        if run and guest_state.run == "paused":
            # It is served nevertheless, and said when that is done.
            words = f"the guest at {self.path} is loaded, but stands paused: QEMU could not take its disks"
            self._in_doubt = InDoubt(words, f"once their other user is gone: vm-cont {self.path}")
        return guest_state.run

    def _refusal(self, error: VmstateError) -> VmstateError:
        if self._process and not self._process.alive():
            return refusal(self._process.words(), True)
        with contextlib.suppress(VmstateError):
            guest_state = query_once(self.path)
            if guest_state.reason:
                return refusal(guest_state.reason, True)
        return refusal("", True) if isinstance(error, GuestGone) else error

    # a guest that has lost its server

    def _take_up(self) -> str:
        try:
            return self._go_on()
        except StandsStill as error:
            page_injection.fill(
                error.pid, self._file, self._opening, None if self._plan.sure else opening_identity(self._opening)
            )
        lost = wait_for(
            self.path, lambda guest_state: guest_state.migration != "postcopy-active", 20, "to see its loss"
        )
        self._report.note(f"its QEMU was given what it lacked, from outside; the guest is '{lost.run}'")
        return self._go_on()

    def _go_on(self) -> str:
        with Monitor(self.path) as monitor:
            guest_state = self._require_lost(monitor)
            found = recover(monitor, self._opening)
            hold_signals()
            self._ours = found.end
            serving = self._make_serving(found.end.fileno())
            serving.server.take_up(self._have(found, monitor.pid()), found.path, found.said)
        serving.start(self._opening.part())
        return with_retry(self.path, self._run_on) if self._was_halted else guest_state.run

    def _have(self, found: Recovered, pid: int) -> dict[bytes, bytearray]:
        """What QEMU knows that it has, and what was put there from outside."""
        have = have_of(self._opening, found.bitmaps)
        for name, there in page_injection.present(pid, self._opening).items():
            known, seen = int.from_bytes(have[name], "big"), int.from_bytes(there, "big")
            have[name] = bytearray((known | seen).to_bytes(len(there), "big"))
        return have

    def _require_lost(self, monitor: Monitor) -> GuestState:
        guest_state = query(monitor)
        found = markers.read(monitor)
        if (markers.LAZY not in found and not self._plan.sure) or not guest_state.migration.startswith("postcopy"):
            text = f"the guest at {self.path} is not being restored lazily ({guest_state.run}, {guest_state.migration})"
            raise CannotDo(text, f"vm-status {self.path}")
        if guest_state.migration != "postcopy-paused":
            text = f"the guest at {self.path} has a server that brings its pages ({guest_state.migration})"
            raise CannotDo(text, f"vm-status {self.path}")
        if markers.LAZY in found and found[markers.LAZY].get("state") != opening_identity(self._opening):
            raise Misfit(f"this is not the state that the guest at {self.path} runs on", "its pages would be wrong")
        self._was_halted = markers.HALTED in found
        return guest_state

    def _run_on(self, monitor: Monitor) -> str:
        with contextlib.suppress(Refused):
            monitor.ask("object-del", id=markers.HALTED)
        return run_on(monitor).run

    # the server

    def _make_serving(self, fd: int) -> Serving:
        plan = self._plan
        server = PageServer(self._file, self._opening, fd, fd, on_demand=plan.on_demand, first=plan.first)
        self._serving = Serving(server, self._hang_up)
        return self._serving

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            if self._ours:
                self._ours.shutdown(socket.SHUT_RDWR)

    def _halt(self) -> None:
        """A page that nobody has asked for cannot be read: stop the guest while all that is asked for can be."""
        assert self._serving
        self._halted = True
        with contextlib.suppress(VmstateError), Monitor(self.path) as monitor:
            if query(monitor).run in RUNS:
                # Before it stands: that can take until it is served again, where it waits for a page.
                markers.put(monitor, markers.HALTED)
                monitor.ask("stop")
        self._serving.server.give_up()

    # the end

    def _afterwards(self, monitor: Monitor) -> None:
        guest_state = query(monitor)
        if guest_state.migration == "failed":
            raise CannotDo(f"QEMU ended the restore as failed: {guest_state.reason}")
        for name in (markers.LAZY, markers.HALTED):
            with contextlib.suppress(Refused):
                monitor.ask("object-del", id=name)
        with contextlib.suppress(Refused):
            self._saved.put_back(monitor)
            if self._plan.resume:
                clear_leftovers(monitor)

    def _check_loss(self, error: BaseException) -> None:
        if not isinstance(error, Lost):
            raise error
        try:
            guest_state = wait_for(self.path, lambda s: s.migration != "postcopy-active", 20, "to end the restore")
        except VmstateError as gone:
            if isinstance(gone, GuestGone) and self._plan.on_demand:
                return
            raise GuestGone(f"the guest at {self.path} ended while its memory was being read") from gone
        words = f"the guest at {self.path} runs ({guest_state.migration}), and lacks pages: {error}"
        raise InDoubt(words, self._resume()) from error

    def _resume(self) -> str:
        return markers.resume_command(self.path, {markers.LAZY: {"on_demand": self._plan.on_demand}})

    def _damaged(self, error: Damaged) -> Damaged:
        stands = "was stopped" if self._halted else "stands still as soon as it needs a page that it lacks"
        hint = f"with a good copy of this state: {self._resume()}"
        return Damaged(f"{error}; the guest at {self.path} {stands}", hint)

    def _put_back(self, error: BaseException) -> BaseException:
        if isinstance(error, NotLazy):
            # It may go on as an eager restore, which a signal ends.
            hold_signals()
        else:
            no_more_signals()
        if self._ours:
            self._ours.close()
        if self._process:
            self._process.end()
        elif isinstance(error, VmstateError) and not isinstance(error, InDoubt) and not self._plan.resume:
            error.hints = (*error.hints, Waiting(self.path).outcome_text())
        if self._plan.disks:
            self._plan.disks.undo()
        return error


EAGER = "restore all of it before it runs: vm-restore without --lazy, or --lazy-or-eager"


def _crossed(guest_state: GuestState) -> bool:
    return guest_state.migration in ("postcopy-active", "postcopy-paused", "completed")


def outcome_of(path: str, report: Report) -> Outcome:
    """What another process has restored."""
    state = query_once(path).run
    return Outcome(path, state, "", "", 0, nics_of(Waiting(path), report) if state in RUNS else [])
