"""A state into a waiting guest, which runs only once the state has proven its end.

Here the part that talks to QEMU and the part that reads the stream meet.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import Damaged, GuestGone, InDoubt, Refused, VmstateError
from ..io.descriptors import HOLD, channel
from ..io.pipeline import ShellPipeline
from ..io.readers import FdReader, Reader, open_input, read_up_to
from ..progress import Progress, Sample
from ..qemu.incoming import NO_ROUNDS, Waiting, require_fit, require_waiting
from ..qemu.launch import Process, check_arguments
from ..qemu.monitor import Monitor
from ..qemu.run_states import RUNS, row_of
from ..report import Report
from ..rollback import Rollback
from ..signals import hold_signals, no_more_signals, release_signals
from ..stream.description import find_end, validate_end
from ..stream.identity import identity
from ..stream.validate import State
from ..vmz import decompress
from ..vmz.vmz_file import vmz_file
from .outcome import Outcome, left_over, nics_of, refusal_of
from .relay import Head, Incoming, QemuStopped, read_head
from .used_states import UsedStates

if TYPE_CHECKING:
    from ..checkpoint.revert import Revert


class RestorePlan(NamedTuple):
    """path: the waiting guest, or command: the QEMU to start.  run: None as saved, else whether it is to run.

    disks: to be put back, for the QEMU to start.  used: where it is noted.
    """

    path: str | None = None
    command: Sequence[str] = ()
    run: bool | None = None
    source: str | None = None
    disks: "Revert | None" = None
    used: UsedStates | None = None


# Of a file: where the end of most states begins
NEAR = 1 << 20


class Restore:
    """One restore, from its plan to its outcome."""

    def __init__(self, plan: RestorePlan, report: Report, mode: str) -> None:
        self._plan = plan
        self._report = report
        self._mode = mode
        if plan.command:
            check_arguments(plan.command[1:])
        hold_signals()
        self._pipeline = ShellPipeline(plan.source, "source") if plan.source else None
        self._fd = self._pipeline.fd if self._pipeline else open_input(None)
        self._process: Process | None = None
        self._waiting: Waiting | None = None
        self._incoming: Incoming | None = None
        self._size: int | None = None
        self._whole = False
        self._ours, self._theirs = channel()
        self._rollback = self._steps()

    def _steps(self) -> Rollback:
        """What there is to be undone, whether it has been begun or not."""
        found = Rollback(left_over(self._plan.path))
        if self._plan.disks:
            found.add("the disks", self._plan.disks.undo)
        if self._plan.command:
            found.add("the QEMU that was started", self._end_process)
        if self._pipeline:
            # Before QEMU is ended, but read before it is started.
            found.add("the source", self._pipeline.end)
        found.add("the channel", self._close)
        return found

    def run(self) -> Outcome:
        """Look, refuse or load, judge, let run.  On failure a QEMU that we started is ended."""
        try:
            release_signals()
            head, ahead, source = self._open()
            path = self._find_guest(head)
            waiting = self._waiting = Waiting(path)
            saved = self._load(waiting, ahead, source)
            # Loaded and proven: what is left takes no time, and half of it would help nobody.
            no_more_signals()
        except BaseException as error:
            raise self._undone(error) from error
        return self._settle(waiting, saved)

    def _open(self) -> tuple[Head, bytes, Reader]:
        """The head of the plain state, the bytes read for it, and where the rest comes from."""
        source = FdReader(self._fd)
        first = read_up_to(source, decompress.FIRST)
        if not self._pipeline:
            # Before QEMU gets a byte: a file that was not finished has no end record.
            vmz_file(self._fd, len(first))
        plain = decompress.unpacked(source, first)
        head, ahead = read_head(plain)
        if decompress.recognise(first) == "state" and not self._pipeline:
            self._validate_seekable(len(ahead))
        return head, ahead, plain

    def _validate_seekable(self, ahead: int) -> None:
        """Where the input is a file, its end is looked at before QEMU gets a byte."""
        try:
            start = os.lseek(self._fd, 0, os.SEEK_CUR) - ahead
        except OSError:
            return
        size = os.fstat(self._fd).st_size
        if size > start:
            self._size = size - start
            for most in (NEAR, HOLD):
                tail = max(start, size - most)
                data = os.pread(self._fd, size - tail, tail)
                if find_end(data):
                    return
            validate_end(data)

    def _find_guest(self, head: Head) -> str:
        if self._plan.command:
            hold_signals()
            command = self._plan.command
            self._process = Process(self._plan.disks.prepare(command) if self._plan.disks else command)
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

    def _load(self, waiting: Waiting, ahead: bytes, source: Reader) -> State:
        incoming = self._incoming = Incoming(source, ahead, self._ours)
        try:
            with Progress(self._report, self._mode, self._sampler()):
                # A file that is larger need not be read ahead to know that.
                if (self._size is None or self._size <= HOLD) and (whole := incoming.prefill()):
                    self._proven(whole)
                hold_signals()
                waiting.hold_and_load(self._theirs)
                release_signals()
                self._theirs.close()
                if waiting.had_no_rounds:
                    self._report.note(NO_ROUNDS)
                saved = incoming.carry(self._proven)
                waiting.loaded()
                self._note(saved)
                return saved
        except (QemuStopped, Refused, GuestGone) as error:
            if not waiting.begun:
                raise
            raise refusal_of(waiting, self._process, error, self._whole) from error

    def _proven(self, state: State) -> None:
        """The input ends as a whole state does; so must all stages before it, each with 0."""
        if self._plan.disks:
            self._plan.disks.validate(state)
        if self._plan.used:
            self._plan.used.require_new(identity(state))
        if self._pipeline and not self._whole:
            self._pipeline.finish()
        self._whole = True

    def _note(self, saved: State) -> None:
        try:
            if self._plan.used:
                self._plan.used.note(identity(saved))
        except VmstateError:
            # Another one was faster.
            assert self._waiting
            self._waiting.discard()
            raise

    def _sampler(self) -> Callable[[], Sample | None]:
        return lambda: Sample(self._incoming.came, self._size) if self._incoming else None

    def _end_process(self) -> None:
        if self._process:
            self._process.end()

    def _close(self) -> None:
        self._ours.close()
        self._theirs.close()

    def _undone(self, error: BaseException) -> BaseException:
        """All of it, over an error: the one to raise, which says what has become of a guest that waited."""
        found = self._rollback.run(error)
        if isinstance(found, VmstateError) and self._waiting and not self._process:
            if self._waiting.begun and isinstance(error, Damaged):
                self._waiting.discard()
            found.hints = (*found.hints, self._waiting.outcome_text())
        return found

    def _settle(self, waiting: Waiting, saved: State) -> Outcome:
        run = saved.runstate in RUNS if self._plan.run is None else self._plan.run
        if run and not (row := row_of(saved.runstate)).cont:
            waiting.settle(False)
            text = f"the state is loaded, but its guest {row.words}: the guest at {waiting.path} cannot run on"
            raise InDoubt(text, row.hint.format(path=waiting.path))
        state = waiting.settle(run)
        self._report.settle()
        nics = nics_of(waiting, self._report) if run else []
        if self._process and self._process.added:
            self._report.hint(f"the guest's monitor is {waiting.path}")
        return Outcome(waiting.path, state, saved.runstate, saved.machine, saved.size, nics)
