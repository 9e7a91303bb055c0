"""Who works on a QEMU: one command at a time, named by an object in that QEMU which whoever comes next can read.

A command takes the claim at each of its ends before it changes a capability, a marker, a channel or a disk there.  The
object `vmstate-claim-N` with the highest N tells the holder.  One whose processes have ended is taken over by adding
N+1, which QEMU allows once; the highest is never removed, so that no number is given twice, and its holder's end frees
it.  One in a pid namespace of its own (a container) says so in the end, since its processes are seen nowhere else.
vm-speed, vm-cancel, vm-stop, vm-cont and vm-status take none, and obey the markers.
"""

import contextlib
import os
import re
import sys
from typing import NamedTuple

from ..deadline import Deadline
from ..errors import CannotDo, Refused, VmstateError
from ..fields import Fields
from . import answers, markers
from .monitor import PATIENCE, Monitor
from .state import query

NAME = re.compile(r"vmstate-claim-([1-9][0-9]{0,8})")
PREFIX = "vmstate-claim-"
COMMAND = "[a-z][a-z0-9_.-]{0,31}"
# More than a command and its watchdog need.
MOST = 8
# Of the first pid namespace of a machine (PROC_PID_INIT_INO): who can see all processes.
FIRST = "pid:[4026531836]"
# Where this process has a claim that nobody else could see the end of
_unseen: set[str] = set()
# In a race each loser sees the winner; more rounds than there can be.
ROUNDS = 64
# In place of its host, of one that has ended
ENDED = "ended"


class Process(NamedTuple):
    """pid, and the kernel's time of its start in clock ticks, since the number may be given to another one."""

    pid: int
    start: int

    @property
    def alive(self) -> bool:
        """One that only waits to be reaped is not."""
        found = _stat(self.pid)
        return _is_there(self.pid) if found is None else found[0] not in "ZX" and int(found[19]) == self.start


class Holder(NamedTuple):
    """Who holds a claim.  name: of the command.  processes: itself, and then its watchdog.  host: its boot and pid
    namespace.  move: the migration it is at.

    serves: it brings the pages of a guest that may run meanwhile.
    """

    number: int
    name: str
    processes: tuple[Process, ...]
    host: str
    move: str = ""
    serves: bool = False

    @property
    def seen(self) -> bool:
        """Whether its processes can be looked for from here."""
        return bool(self.host) and self.host == _host()

    @property
    def alive(self) -> bool:
        """One that cannot be seen counts as alive, unless it has said that it has ended."""
        if self.host == ENDED:
            return False
        return not self.seen or any(process.alive for process in self.processes)

    @property
    def ends(self) -> bool:
        """The command itself has ended, and its watchdog puts things back."""
        return self.seen and not self.processes[0].alive

    @property
    def is_us(self) -> bool:
        return self.seen and os.getpid() in (process.pid for process in self.processes)

    def refusal(self, path: str) -> CannotDo:
        """For another command that would work on the guest at `path`."""
        return CannotDo(f"the guest at {path} is in the hands of {self.words()}", self.hint())

    def words(self) -> str:
        """As the object of a sentence."""
        if not self.seen:
            return f"a {self.name} that cannot be seen from here"
        alive = [process.pid for process in self.processes if process.alive]
        return f"{self.name} (process {(alive or [self.processes[0].pid])[0]})"

    def hint(self) -> str:
        if self.serves and self.seen:
            return "its memory is still being brought from a file; with --on-demand, SIGTERM has that come to its end"
        if not self.seen:
            return f"if that has ended, in the guest's monitor: object_del {PREFIX}{self.number}"
        return "it can be used again once that has ended"


def another(monitor: Monitor) -> Holder | None:
    """Who holds the claim of a QEMU now; None where nobody does, whoever did has ended, or it is this process."""
    found = _highest(monitor)
    return found if found and found.alive and not found.is_us else None


def take(
    monitor: Monitor, path: str, *, watchdog: int | None = None, move: str = "", serves: bool = False, ours: str = ""
) -> None:
    """Claim the QEMU at `path` for this process until it ends; CannotDo, with the holder's name, where another has it.

    watchdog: a process that holds it too.  move: the migration this is for.  ours: one whose claim may be taken over,
    since this command has proven to belong to it.  A holder whose watchdog is putting things back is waited for.
    """
    this = [_process(pid) for pid in (os.getpid(), watchdog) if pid is not None]
    found: Holder | None = None
    for _ in Deadline(PATIENCE).tries(0.02):
        found = _taken(monitor, path, this, move, serves, ours)
        if found is None or not found.ends or query(monitor).moving:
            break
        # It needs the monitor itself.
        monitor.step_aside(0.1)
    if found:
        raise found.refusal(path)


def _taken(monitor: Monitor, path: str, this: list[Process], move: str, serves: bool, ours: str) -> Holder | None:
    """Try to take it; who has it instead."""
    for _ in range(ROUNDS):
        found = _highest(monitor)
        mine = bool(found and found.seen and found.processes[0] == this[0])
        if mine and found and (found.move, found.serves) == (move, serves) and set(this) <= set(found.processes):
            return None
        if found and found.alive and not mine and not (ours and found.move == ours):
            return found
        number = found.number + 1 if found else 1
        whose = {"command": _name(), "pids": [one.pid for one in this], "starts": [one.start for one in this]}
        try:
            markers.put(monitor, f"{PREFIX}{number}", **whose, host=_host(), move=move, serves=serves)
        except Refused:
            # Another one was faster.
            continue
        if _is_highest(monitor, number):
            if not _host().endswith(FIRST):
                _unseen.add(path)
            return None
    raise CannotDo("the claims of this QEMU change all the time")


def _is_highest(monitor: Monitor, number: int) -> bool:
    """Whether ours is the highest; then those below it go."""
    numbers = _numbers(monitor)
    if number != max(numbers):
        return False
    for lower in numbers:
        if lower < number:
            markers.remove(monitor, f"{PREFIX}{lower}")
    return True


def leave_to_watchdog() -> None:
    """What there is to undo goes on to be undone when this process has ended."""
    _unseen.clear()


def release(*paths: str) -> None:
    """At the end of a command, or of its watchdog for these guests: say so where nobody else could see it."""
    for path in paths or _unseen:
        if _host().endswith(FIRST):
            break
        with contextlib.suppress(VmstateError), Monitor(path) as monitor:
            found = _highest(monitor)
            if found and found.is_us:
                markers.put(monitor, f"{PREFIX}{found.number + 1}", command=_name(), pids=[0], starts=[0], host=ENDED)
                _is_highest(monitor, found.number + 1)


def _numbers(monitor: Monitor) -> list[int]:
    found = (NAME.fullmatch(child.name) for child in answers.children(monitor, "/objects"))
    return [int(match[1]) for match in found if match]


def _highest(monitor: Monitor) -> Holder | None:
    numbers = _numbers(monitor)
    if not numbers:
        return None
    number = max(numbers)
    values = markers.facts(monitor, f"{PREFIX}{number}")
    if not values and number not in _numbers(monitor):
        # Removed in between by one that has a higher number.
        return _highest(monitor)
    facts = Fields(values, f"the object '{PREFIX}{number}' in QEMU")
    try:
        pids, starts = facts.wholes("pids", most=MOST, high=(1 << 31) - 1), facts.wholes("starts", most=MOST)
        found = tuple(Process(*pair) for pair in zip(pids, starts, strict=True))
        if not found:
            raise CannotDo("no process")
        name, host = facts.text("command", pattern=COMMAND), facts.text("host", most=256)
        return Holder(number, name, found, host, facts.text("move", "", most=64), facts.flag("serves", False))
    except (CannotDo, ValueError):
        # Not one of ours: who put it there has to take it away.
        return Holder(number, "command", (Process(0, 0),), "")


def _name() -> str:
    name = os.path.basename(sys.argv[0])
    return name if re.fullmatch(COMMAND, name) else "command"


def _host() -> str:
    """This boot of this machine and this pid namespace: within it a number is one process."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> Process:
    found = _stat(pid)
    return Process(pid, int(found[19]) if found else 0)


def _stat(pid: int) -> list[str] | None:
    """The fields of its /proc/PID/stat from the state on; None where there is none to be seen."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            text = file.read()
    except OSError:
        return None
    # The name, in parentheses, can have blanks and parentheses of its own.
    return text[text.rindex(")") + 2 :].split()


def _is_there(pid: int) -> bool:
    """Of one that /proc does not show: it may be another user's (hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
