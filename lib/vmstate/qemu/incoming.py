"""Verbs on a guest that waits for a state (`-incoming defer`): does the state fit, hold the guest, load, let it run."""

import contextlib
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CannotDo, Damaged, GuestGone, InDoubt, Misfit, Refused, VmstateError
from . import answers, claim, markers
from .control import announce, run_on
from .monitor import Monitor
from .outgoing import NAME
from .settings import SavedSettings, clear_leftovers, prepare
from .state import SOON, GuestState, look_until, query, ram_blocks, wait_for, with_retry

# How long a QEMU may take to see that its channel has ended, in seconds.
FALLS = 10.0
# QEMU's words for a state that does not fit the guest, and what to do about it.
MISFITS = {
    "Machine type received": "start the guest with the -machine type of the state",
    "Size mismatch": "start the guest with the same -m, and the same ROM files, as its source",
    "Unknown ramblock": "start the guest with the same devices, at the same addresses, as its source",
    "Unknown savevm section": "start the guest with the same devices, at the same addresses, as its source",
    "doesn't match": "start the guest with the same -cpu and devices as its source",
    "Missing section footer": "the device has another layout in this version of QEMU",
    "savevm section version": "this QEMU is older than the one that saved the state",
    "Failed to load": "the device differs between source and guest: compare -device lines, -cpu and QEMU versions",
    "capability": "source and guest must agree on this capability",
}


def require_waiting(monitor: Monitor, path: str) -> None:
    """CannotDo unless the guest waits, and has not loaded anything before."""
    guest_state = query(monitor)
    if guest_state.run != "inmigrate":
        raise CannotDo(
            f"the guest at {path} does not wait for a state: it is '{guest_state.run}'",
            "start the QEMU that is to take the state with -incoming defer",
        )
    if guest_state.migration != "none":
        raise CannotDo(
            f"the guest at {path} has begun to load a state before ({guest_state.migration})",
            "a waiting QEMU is good for one try: end it and start it again with -incoming defer",
        )


NO_ROUNDS = "announce-rounds was 0: it is 1 while QEMU loads, since with 0 QEMU ends when the guest reboots later"
DEVICES = "start the guest with the same devices, at the same addresses, as its source"


def misfits(monitor: Monitor, path: str, machine: str, blocks: tuple[tuple[str, int], ...]) -> list[tuple[str, str]]:
    """What keeps the guest from taking a state of this machine type and these RAM blocks, each with a hint."""
    own = answers.machine(monitor)
    return differences(("the state", machine, blocks), (f"the guest at {path}", own, ram_blocks(monitor)))


def differences(
    what: tuple[str, str, Iterable[tuple[str, int]]], where: tuple[str, str, Mapping[str, tuple[int, int]]]
) -> list[tuple[str, str]]:
    """The same of two that are known: their words, machine types and RAM blocks."""
    (it, machine, blocks), (there, own, have) = what, where
    found = []
    if own != machine:
        text = f"{it} is of machine type '{machine}', {there} is a '{own}'"
        found.append((text, f"start the guest with -machine {machine}"))
    for name, size in blocks:
        if name not in have:
            found.append((f"{it} has a RAM block '{name}' that {there} has not", DEVICES))
            continue
        used, most = have[name]
        # Blocks such as the ACPI tables can grow to the size in the state; RAM cannot.
        if size != used and (used == most or size > most):
            hint = f"start the guest with -m {size >> 20}" if name in ("pc.ram", "mem0", "ram") else "use the same ROMs"
            found.append((f"RAM block '{name}' has {size} bytes in {it} and {used} in {there}", hint))
    return found


def require_fit(monitor: Monitor, path: str, machine: str, blocks: tuple[tuple[str, int], ...]) -> None:
    """Misfit where the machine type or a RAM block of the state is not the guest's."""
    found = misfits(monitor, path, machine, blocks)
    if found:
        raise Misfit(*found[0])


class Waiting:
    """A waiting guest on its way to a loaded one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.saved = SavedSettings()
        self.begun = False

    def hold_and_load(
        self, theirs: socket.socket, on: tuple[str, ...] = (), mark: dict[str, Any] | None = None
    ) -> None:
        """From now on QEMU loads from `theirs`, and does not run, take its images or announce itself by itself.

        on: further capabilities.  mark: facts about the move by which it comes; marked before there is anything loaded.
        """
        with Monitor(self.path) as monitor:
            claim.take(monitor, self.path, move=str((mark or {}).get("move", "")))
            require_waiting(monitor, self.path)
            markers.clear(monitor)
            if mark is not None:
                markers.put(monitor, markers.TAKEN, **mark)
            monitor.ask("stop")
            try:
                # Its own announcement is to be short: ours is made once it runs.  With no round at all QEMU would free
                # the timer of a card that can announce itself, and end at the card's next reset.
                prepare(monitor, ("late-block-activate", *on), {"announce-rounds": 1}, self.saved)
                monitor.send_fd(NAME, theirs.fileno())
                self.incoming(monitor)
            except Refused:
                with contextlib.suppress(Refused):
                    monitor.ask("closefd", fdname=NAME)
                self.saved.put_back(monitor)
                raise
            self.begun = True

    @property
    def had_no_rounds(self) -> bool:
        """Whether somebody had silenced QEMU's own announcement."""
        return self.saved.parameters.get("announce-rounds") == 0

    @staticmethod
    def incoming(monitor: Monitor) -> None:
        """QEMU begins to load from the descriptor that it was given."""
        try:
            monitor.ask("migrate-incoming", uri=f"fd:{NAME}", exit_on_error=False)
        except Refused as error:
            if "exit-on-error" not in error.text:
                raise
            # Before 9.1 QEMU ends itself on every failure.
            monitor.ask("migrate-incoming", uri=f"fd:{NAME}")

    def loaded(self) -> None:
        """Wait until QEMU has loaded everything.

        Raises GuestGone or CannotDo where it ended over it, Refused with its words where it said why.
        """
        guest_state = with_retry(self.path, lambda monitor: look_until(monitor, _is_over, SOON), 120)
        _require_loaded(guest_state if _is_over(guest_state) else wait_for(self.path, _is_over, 120, "to load"))

    @staticmethod
    def loaded_in(monitor: Monitor) -> None:
        """`loaded` within a conversation, for a guest that is about to be."""
        guest_state = look_until(monitor, _is_over, 10)
        if not _is_over(guest_state):
            raise CannotDo("QEMU said that it had loaded the guest, and does not go on")
        _require_loaded(guest_state)

    def settle(self, run: bool) -> str:
        """With `run` let the guest run, and put back what was found; its run state.

        InDoubt where it stands loaded, but does not run.  Once it runs nothing says otherwise any more.
        """
        try:
            return with_retry(self.path, lambda monitor: self._settle(monitor, run))
        except InDoubt:
            raise
        except VmstateError as error:
            text = f"the state is loaded, but the guest at {self.path} could not be let run: {error}"
            raise InDoubt(text, f"vm-status {self.path}") from error

    def _settle(self, monitor: Monitor, run: bool) -> str:
        if not run:
            with contextlib.suppress(Refused):
                self.saved.put_back(monitor)
            return query(monitor).run
        self._cont(monitor)
        # It runs, whatever becomes of this.
        with contextlib.suppress(VmstateError):
            self.saved.put_back(monitor)
        with contextlib.suppress(VmstateError):
            # A guest that was held is silent until it is told to speak.
            announce(monitor)
        return "running"

    def _cont(self, monitor: Monitor) -> None:
        try:
            run_on(monitor)
        except Refused as error:
            raise InDoubt(
                f"the state is loaded, but the guest at {self.path} stands paused: {error.text}",
                "a disk image can be locked by the source: once that has ended, " + f"vm-cont {self.path}",
            ) from error

    def afterwards(self, monitor: Monitor) -> None:
        """What has time once the guest runs: put back what was found, or what one before us has left."""
        with contextlib.suppress(Refused):
            self.saved.put_back(monitor)
            clear_leftovers(monitor)

    def nic_facts(self) -> tuple[str, int, list[answers.RxFilter]]:
        """`info network`, the process id of QEMU, and what the cards of a guest take frames for."""
        with Monitor(self.path) as monitor:
            filters = answers.rx_filters(monitor)
            return answers.human(monitor, "info network"), monitor.pid(), filters

    def discard(self) -> None:
        """End a guest that has loaded what must not run, as QEMU does when it finds that itself."""
        with contextlib.suppress(VmstateError), Monitor(self.path) as monitor:
            if query(monitor).run not in ("inmigrate", "running", "suspended") and markers.ARRIVED not in markers.names(
                monitor
            ):
                monitor.ask("quit")

    def abort_load(self) -> bool:
        """Our end is closed: have a guest end that has not loaded everything.

        False where it has, and is held; also where that is not known.
        """
        try:
            guest_state = wait_for(self.path, lambda s: s.migration in ("completed", "failed"), FALLS, "to give up")
            if guest_state.migration == "completed":
                return False
            with_retry(self.path, lambda monitor: monitor.ask("quit"))
        except GuestGone:
            pass
        except VmstateError:
            return False
        return True

    def outcome_text(self) -> str:
        """What has become of a guest into which nothing was loaded, in words."""
        try:
            with Monitor(self.path) as monitor:
                guest_state = query(monitor)
        except VmstateError:
            return f"the guest at {self.path} has ended over it; start it again with -incoming defer"
        if _waits(guest_state) and guest_state.migration == "none":
            return f"the guest at {self.path} still waits"
        return f"the guest at {self.path} is used up; end it and start it again with -incoming defer"


def _is_over(guest_state: GuestState) -> bool:
    return guest_state.migration in ("completed", "failed") or not _waits(guest_state)


def _require_loaded(guest_state: GuestState) -> None:
    if guest_state.migration == "failed":
        raise Refused("migrate-incoming", guest_state.reason or "no reason given")


def _waits(guest_state: GuestState) -> bool:
    return guest_state.run == "inmigrate"


def refusal(words: str, whole: bool) -> VmstateError:
    """The error for a state that QEMU did not load; `words` are its own, `whole`: the state had proven its end."""
    lines = [line for line in words.strip().splitlines() if line.strip()]
    quoted = "; ".join(line.strip() for line in lines[:6]) or "QEMU ended without a word to us; it may be on its stderr"
    for mark, hint in MISFITS.items():
        if mark in words:
            return Misfit(f"the state does not fit the guest; QEMU says: {quoted}", hint)
    if whole:
        return Misfit(f"the guest does not take the state, though that is whole; QEMU says: {quoted}")
    return Damaged(f"QEMU does not take the state; it says: {quoted}")
