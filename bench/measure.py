"""Time and memory of commands, and what one comparison found.

Every figure is a `Row`: what ours and theirs took, smaller being better, and the ratio theirs / ours, above 1 where
ours wins.  A limit is a peer that always takes just the limit.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DEADLINE = 300.0
SINK = ["cat"]


@dataclass(frozen=True)
class Row:
    """`ours` and `theirs` are the rounds, in `unit`; `target` is the least ratio wanted, None where none was set."""

    case: str
    ours_name: str
    theirs_name: str
    what: str
    unit: str
    ours: list[float]
    theirs: list[float]
    target: float | None = None
    # When each hundredth of something had come, as a part of the whole time
    curve: list[float] | None = None

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.theirs) / max(1e-9, statistics.median(self.ours))

    @property
    def best(self) -> float:
        """Of the best rounds, which other work on the machine disturbs least."""
        return min(self.theirs) / max(1e-9, min(self.ours))

    @property
    def met(self) -> bool | None:
        return None if self.target is None else round(self.ratio, 2) >= self.target


def interleave(rounds: int, runners: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """What each runner gives in each round, in turn: A B A B …"""
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            taken[name].append(runner())
    return taken


Processes = list[subprocess.Popen[bytes]]


@contextlib.contextmanager
def started(commands: list[list[str]], source: Path | None, sink: Path | None) -> Iterator[Processes]:
    """A pipeline from `source` to `sink` (each /dev/null where None), surely ended."""
    processes: Processes = []
    with contextlib.ExitStack() as files:
        below = files.enter_context(open(source or os.devnull, "rb"))
        last = files.enter_context(open(sink or os.devnull, "wb"))
        try:
            for number, command in enumerate(commands, 1):
                stdout = last if number == len(commands) else subprocess.PIPE
                processes.append(subprocess.Popen(command, stdin=below, stdout=stdout, start_new_session=True))
                below.close()
                below = processes[-1].stdout or below
            yield processes
        finally:
            for process in processes:
                end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def pipeline(*commands: list[str], source: Path | None = None, sink: Path | None = None) -> float:
    """Seconds from the start of the first process to the end of the last; RuntimeError if one fails."""
    begun = time.perf_counter()
    with started(list(commands), source, sink) as processes:
        for process in processes:
            wait(process, begun + DEADLINE - time.perf_counter())
        seconds = time.perf_counter() - begun
        judge(processes)
    return seconds


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until it has ended, at once: `Popen.wait` with a deadline only looks every few milliseconds."""
    ended = os.pidfd_open(process.pid)
    try:
        if not select.select([ended], [], [], max(0.0, seconds))[0]:
            raise TimeoutError(f"{process.args!r}: not within {DEADLINE:.0f} s")
    finally:
        os.close(ended)
    process.wait()


def judge(processes: Processes) -> None:
    for process in processes:
        if process.returncode:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")


def peak(*commands: list[str], watched: int = 0, source: Path | None = None, sink: Path | None = None) -> int:
    """The memory that one process of a pipeline and all its children needed at their highest, in bytes.

    Each one's own high-water mark, added up, though they may not have stood so high at the same time.
    """
    marks: dict[int, int] = {}
    give_up = time.monotonic() + DEADLINE
    with started(list(commands), source, sink) as processes:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > give_up:
                raise TimeoutError(f"{commands!r}: not within {DEADLINE:.0f} s")
            for pid in family(processes[watched].pid):
                marks[pid] = max(marks.get(pid, 0), high_water(pid))
            time.sleep(0.003)
        judge(processes)
    return sum(marks.values())


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """While this lasts, another process uses all of the processor that it gets."""
    process = subprocess.Popen(["timeout", "300", "sh", "-c", "while :; do :; done"], start_new_session=True)
    try:
        yield
    finally:
        end(process)


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return found


def high_water(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def same(one: Path, other: Path) -> None:
    """RuntimeError unless two files have the same bytes."""
    if subprocess.run(["cmp", "-s", one, other], timeout=DEADLINE, check=False).returncode:
        raise RuntimeError(f"{one.name} and {other.name} differ")
