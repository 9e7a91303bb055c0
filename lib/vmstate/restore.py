"""A state into a waiting guest, which runs only once the state has proven its end.

Here the part that talks to QEMU and the part that reads the stream meet.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import compression
from .command import hold_signals, no_more_signals, release_signals
from .description import End, judge_end
from .errors import Damaged, GuestGone, Refused, Stopped, VmstateError
from .head import Head
from .monitor import Monitor
from .nics import Nic, from_info_network
from .octets import HOLD, FdReader, Pushback, Reader, channel, open_input, read_up_to
from .process import Process, check_arguments
from .progress import Progress, Sample
from .relay import Incoming, QemuStopped, read_head
from .report import Report
from .stage import Stage
from .waiting import Waiting, refusal, require_fit, require_waiting


@dataclass(frozen=True)
class Plan:
    """path: the waiting guest, or command: the QEMU to start.  run: None as saved, else whether it is to run."""

    path: str | None = None
    command: list[str] = field(default_factory=list)
    run: bool | None = None
    source: str | None = None


@dataclass(frozen=True)
class Outcome:
    """state: the guest's run state; saved: the one in the state; nics: its cards, empty where it does not run."""

    guest: str
    state: str
    saved: str
    machine: str
    bytes: int
    nics: list[Nic]

    def values(self) -> dict[str, Any]:
        cards = [{"mac": nic.mac, "iface": nic.iface, "addresses": list(nic.addresses)} for nic in self.nics]
        return {**self.__dict__, "nics": cards}


class Restore:
    """One restore, from its plan to its outcome."""

    def __init__(self, plan: Plan, report: Report, mode: str) -> None:
        self._plan = plan
        self._report = report
        self._mode = mode
        if plan.command:
            check_arguments(plan.command[1:])
        hold_signals()
        self._stage = Stage(plan.source, "source") if plan.source else None
        self._fd = self._stage.fd if self._stage else open_input(None)
        self._process: Process | None = None
        self._waiting: Waiting | None = None
        self._incoming: Incoming | None = None
        self._size: int | None = None
        self._ours, self._theirs = channel()

    def run(self) -> Outcome:
        """Look, refuse or load, judge, let run.  On failure a QEMU that we started is ended."""
        try:
            release_signals()
            head, ahead, source = self._open()
            path = self._find_guest(head)
            waiting = self._waiting = Waiting(path)
            end = self._load(waiting, ahead, source)
            # Loaded and proven: what is left takes no time, and half of it would help nobody.
            no_more_signals()
        except BaseException as error:
            raise self._put_back(error) from error
        return self._settle(waiting, head, end)

    def _open(self) -> tuple[Head, bytes, Reader]:
        """The head of the plain state, the bytes read for it, and where the rest comes from."""
        plain = FdReader(self._fd)
        first = read_up_to(plain, 4096)
        form = compression.recognise(first)
        source: Reader = Pushback(first, plain)
        if first and form != "state":
            source = compression.unpacked(plain, first)
        head, ahead = read_head(source)
        if form == "state" and not self._stage:
            self._judge_seekable(len(ahead))
        return head, ahead, source

    def _judge_seekable(self, ahead: int) -> None:
        """Where the input is a file, its end is looked at before QEMU gets a byte."""
        try:
            start = os.lseek(self._fd, 0, os.SEEK_CUR) - ahead
        except OSError:
            return
        size = os.fstat(self._fd).st_size
        if size > start:
            self._size = size - start
            tail = max(start, size - HOLD)
            judge_end(os.pread(self._fd, size - tail, tail))

    def _find_guest(self, head: Head) -> str:
        if self._plan.command:
            hold_signals()
            self._process = Process(self._plan.command)
            release_signals()
            self._process.wait_until_it_answers()
            path = self._process.path
        else:
            assert self._plan.path is not None
            path = self._plan.path
        with Monitor(path) as monitor:
            require_waiting(monitor, path)
            require_fit(monitor, path, head.machine, head.blocks)
        return path

    def _load(self, waiting: Waiting, ahead: bytes, source: Reader) -> End:
        incoming = self._incoming = Incoming(source, ahead, self._ours)
        whole = False
        try:
            with Progress(self._report, self._mode, self._sampler()):
                short = incoming.prefill()
                end = self._proven(incoming) if short else None
                hold_signals()
                waiting.hold_and_load(self._theirs)
                release_signals()
                self._theirs.close()
                incoming.carry()
                end = end or self._proven(incoming)
                whole = True
                incoming.release()
                waiting.loaded()
                return end
        except (QemuStopped, Refused, GuestGone) as error:
            if not waiting.begun:
                raise
            raise self._refusal(error, whole) from error

    def _proven(self, incoming: Incoming) -> End:
        """The end of the input: its last stages have ended with 0, and its last bytes are those of a whole state."""
        if self._stage:
            self._stage.finish()
        return incoming.judge()

    def _refusal(self, error: Exception, whole: bool) -> VmstateError:
        """Why QEMU did not take the state, in its own words where they can be had."""
        if self._process and not self._process.alive():
            return refusal(self._process.words(), whole)
        try:
            if isinstance(error, Refused):
                raise error
            assert self._waiting
            self._waiting.loaded()
        except Refused as reason:
            # From 9.1 on QEMU lives on; the details are on its stderr nevertheless.
            details = self._process.words() if self._process else ""
            return refusal(f"{details}; {reason.text}" if details else reason.text, whole)
        except VmstateError:
            return refusal("", whole)
        return Damaged(
            f"the input is not whole: it goes on behind the end of the state, at most {self.passed} bytes in"
        )

    @property
    def passed(self) -> int:
        return self._incoming.passed if self._incoming else 0

    def _sampler(self) -> Callable[[], Sample | None]:
        return lambda: Sample(self._incoming.came, self._size) if self._incoming else None

    def _put_back(self, error: BaseException) -> BaseException:
        no_more_signals()
        self._ours.close()
        self._theirs.close()
        if self._stage:
            self._stage.end()
        if self._process:
            self._process.end()
        if isinstance(error, Stopped) or not isinstance(error, VmstateError):
            return error
        if self._waiting and not self._process:
            if self._waiting.begun and isinstance(error, Damaged):
                self._waiting.discard()
            error.hints = (*error.hints, self._waiting.fate())
        return error

    def _nics(self, waiting: Waiting) -> list[Nic]:
        """The cards; the guest runs already, and what cannot be learnt now does not change that."""
        try:
            return from_info_network(*waiting.nic_facts())
        except (VmstateError, OSError) as error:
            self._report.warning(f"the guest runs, but its network cards are not known: {error}")
            return []

    def _settle(self, waiting: Waiting, head: Head, end: End) -> Outcome:
        run = end.runstate in ("running", "suspended") if self._plan.run is None else self._plan.run
        state = waiting.settle(run)
        nics = self._nics(waiting) if run else []
        came = self._incoming.came if self._incoming else 0
        if self._process and self._process.added:
            self._report.hint(f"the guest's monitor is {waiting.path}")
        return Outcome(waiting.path, state, end.runstate, head.machine, came, nics)
