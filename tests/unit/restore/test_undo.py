"""Each thing that a restore has begun is undone, whichever of the others cannot be, and the error says which."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from vmstate.checkpoint.revert import Revert
from vmstate.errors import CannotDo, InDoubt, Refused, Stopped
from vmstate.report import Report
from vmstate.restore import eager, lazy, lazy_resume
from vmstate.restore.eager import Restore, RestorePlan
from vmstate.restore.lazy import Lazy
from vmstate.restore.lazy_plan import LazyPlan
from vmstate.restore.lazy_state import lazy_state
from vmstate.restore.page_server_thread import Recovered
from vmstate.restore.postcopy import NotLazy, ReturnPath
from vmstate.signals import release_signals, stop_on_signal
from vmstate.stream.validate import State, validate

from unit.restore.target import Target
from unit.streams import Pieces, state
from unit.undoing import Undone

NAME = "microvm-10.0"
COMMAND = ["qemu"]
# What each job has begun when it fails here, the last one first
STEPS = {
    "eager": ["the channel", "the source"],
    "eager-started": ["the channel", "the source", "the QEMU that was started", "the disks"],
    "lazy": ["the settings of QEMU", "the channel"],
    "lazy-started": ["the settings of QEMU", "the channel", "the QEMU that was started", "the disks"],
    "not-lazy": ["the settings of QEMU", "the channel"],
    "resume": ["the channel"],
}
# Where there is a guest that waited before
WAITING = ("eager", "lazy", "not-lazy")
# Any way in which a step can fail: with words for the user, and with a bug of ours.
TROUBLE = [CannotDo("it stays"), OSError(5, "it stays"), KeyError("it stays")]
EACH = [(job, step, error) for job, steps in STEPS.items() for step in steps for error in TROUBLE]


@dataclass
class Disks:
    """In the place of a Revert."""

    undone: int = 0

    def prepare(self, command: list[str]) -> list[str]:
        return [*command, "-placed"]

    def validate(self, _state: State) -> None:
        pass

    def undo(self) -> None:
        self.undone += 1


class Process:
    """In the place of a QEMU that was started."""

    added = False
    made: list[Process] = []

    def __init__(self, path: str, command: list[str]) -> None:
        self.path, self.command, self.ended = path, command, 0
        self.made.append(self)

    def wait_until_it_answers(self) -> None:
        pass

    def alive(self) -> bool:
        return not self.ended

    def end(self) -> None:
        self.ended += 1


@dataclass
class Job:
    """A restore that fails; `undone`: the steps, as they were undone."""

    run: Callable[[], object]
    disks: Disks = field(default_factory=Disks)
    undone: list[str] = field(default_factory=list)

    def fails(self) -> BaseException:
        with pytest.raises(BaseException) as caught:  # noqa: PT011 - any
            self.run()
        return caught.value


Make = Callable[..., Job]


@pytest.fixture
def qemu() -> Target:
    return Target(validate(Pieces(state(NAME))))


@pytest.fixture
def job(qemu: Target, path: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A job of `STEPS`, of which `step` fails with `error`, but only once it has done what it is for."""
    (work / "s").write_bytes(state(NAME))
    file = (work / "s").open("rb", buffering=0)
    ends: list[socket.socket] = []
    Process.made = []
    for module in (eager, lazy):
        monkeypatch.setattr(module, "Process", lambda command: Process(path, command))

    def recovered(_monitor: object, opening: Any) -> Recovered:
        ends.extend(socket.socketpair())
        return Recovered(ends[0], dict.fromkeys(opening.blocks, b""), ReturnPath(), [])

    monkeypatch.setattr(lazy_resume, "recover", recovered)

    def make(kind: str, step: str = "", error: Exception | None = None) -> Job:
        made = Job(lambda: None)
        made.undone = Undone(monkeypatch, step, error).ran
        qemu.refuses["migrate-incoming"] = "not today"
        qemu.userfaultfd = kind != "not-lazy"
        report, started = Report("vm-restore", quiet=True), kind.endswith("-started")
        guest, command = (None, COMMAND) if started else (path, [])
        disks = cast("Revert", made.disks) if started else None
        if kind.startswith("eager"):
            plan = RestorePlan(guest, command, source=f"cat {work / 's'}", disks=disks)
            made.run = lambda: Restore(plan, report, "off").run()
        elif kind == "resume":
            # Its server could not read its pages, and it does not go on.
            qemu.lost(lazy_state(file.fileno()).identity, halted=True)
            qemu.refuses["cont"] = "not today"
            made.run = lambda: Lazy(LazyPlan(path, resume=True), report, file.fileno()).start()
        else:
            made.run = lambda: Lazy(LazyPlan(guest, command, disks=disks), report, file.fileno()).start()
        return made

    yield make
    file.close()
    for end in ends:
        end.close()


@pytest.mark.parametrize("kind", STEPS)
def test_all_steps_in_reverse(kind: str, job: Make, path: str) -> None:
    made = job(kind)
    error = made.fails()
    assert isinstance(error, NotLazy if kind == "not-lazy" else Refused)
    assert "not today" in str(error)
    assert made.undone == STEPS[kind]
    assert made.disks.undone == ("the disks" in STEPS[kind])
    assert [process.ended for process in Process.made] == [1] * kind.endswith("-started")
    assert [process.command for process in Process.made] == [[*COMMAND, "-placed"]] * kind.endswith("-started")
    assert (f"the guest at {path} still waits" in error.hints) == (kind in WAITING)


@pytest.mark.parametrize(("kind", "step", "trouble"), EACH)
def test_a_step_that_fails(kind: str, step: str, trouble: Exception, job: Make, path: str) -> None:
    """Status 5 whichever it is, also of what is no guest's: something that was begun may be there still."""
    made = job(kind, step, trouble)
    error = made.fails()
    # Then it is not restored as a whole, either.
    assert isinstance(error, InDoubt)
    assert error.status == 5
    assert "not today" in str(error)
    assert f"; and could not put back {step}: " in str(error)
    assert "it stays" in str(error)
    assert made.undone == STEPS[kind]
    assert made.disks.undone == ("the disks" in STEPS[kind])
    assert [process.ended for process in Process.made] == [1] * kind.endswith("-started")
    look = "end it before the next try" if kind.endswith("-started") else f"vm-status {path}"
    assert look in error.hints[0]
    # Who stands where, all the same
    assert (f"the guest at {path} still waits" in error.hints) == (kind in WAITING)


@pytest.mark.parametrize("step", ["", "the channel"])
@pytest.mark.parametrize("kind", [kind for kind in STEPS if kind != "not-lazy"])
def test_a_signal(kind: str, step: str, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while all is there; where a step cannot be undone, that is said, rather than to die of it."""
    signal.signal(signal.SIGTERM, stop_on_signal)
    made = job(kind, step, CannotDo("it stays"))
    monkeypatch.setattr(eager.Waiting, "hold_and_load", lambda *_: stopped())
    monkeypatch.setattr(lazy.Waiting, "incoming", lambda *_: stopped())
    monkeypatch.setattr(lazy_resume, "with_retry", lambda *_: stopped())
    error = made.fails()
    assert made.undone == STEPS[kind]
    if step:
        assert isinstance(error, InDoubt)
        assert f"a signal came; and could not put back {step}: it stays" in str(error)
    else:
        assert isinstance(error, Stopped)


def stopped() -> None:
    signal.raise_signal(signal.SIGTERM)
    release_signals()


def test_what_can_only_be_restored_as_a_whole(job: Make, qemu: Target) -> None:
    """Its settings are as before.  A signal waits: what comes next may be an eager restore, which it ends."""
    signal.signal(signal.SIGTERM, stop_on_signal)
    qemu.capabilities["xbzrle"] = True
    before = qemu.settings()
    assert isinstance(job("not-lazy").fails(), NotLazy)
    assert qemu.settings() == before
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped):
        release_signals()


def test_a_qemu_that_does_not_start(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disks are undone, and nothing is said of a guest that there never was."""

    def no_process(command: list[str]) -> None:
        raise CannotDo(f"cannot start {command[0]}")

    made = job("lazy-started")
    monkeypatch.setattr(lazy, "Process", no_process)
    error = made.fails()
    assert isinstance(error, CannotDo)
    assert (str(error), error.hints) == ("cannot start qemu", ())
    assert made.undone == ["the disks"]


@pytest.mark.parametrize("kind", ["eager", "lazy", "not-lazy"])
def test_a_waiting_guest_has_what_it_had(kind: str, job: Make, qemu: Target) -> None:
    before, objects = qemu.settings(), dict(qemu.objects)
    job(kind).fails()
    assert (qemu.settings(), qemu.objects) == (before, objects)
