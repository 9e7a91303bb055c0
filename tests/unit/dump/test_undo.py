"""Of a dump that fails each undo step fails in turn: all others are taken, and the error says which did not."""

from pathlib import Path

import pytest
from vmstate.checkpoint.create import Wish
from vmstate.dump.live import Dump, DumpPlan
from vmstate.dump.snapshot import Snapshot
from vmstate.errors import CannotDo, InDoubt
from vmstate.report import Report

from unit.qemu.fake_qemu import FakeQemu
from unit.undoing import TROUBLES, Undone

STEPS = ["the channel", "the sink", "the guest", "the disks", "the watchdog"]
OF_A_SNAPSHOT = ["the sink", "the snapshot", "the channel", "the guest", "the disks", "the watchdog"]
CASES = [(Dump, STEPS, step) for step in STEPS] + [(Snapshot, OF_A_SNAPSHOT, step) for step in OF_A_SNAPSHOT]


def failing(job: type[Dump], path: str, work: Path, qemu: FakeQemu) -> BaseException:
    """The error of a dump that QEMU refuses to begin, with disks that would belong to it."""
    qemu.refuses = {"migrate": "no, thanks"}
    qemu.query_block = list  # type: ignore[attr-defined]
    qemu.human_monitor_command = lambda command_line: ""  # type: ignore[attr-defined]
    plan = DumpPlan(path, out=str(work / "state"), disks=Wish("t", "overlay"))
    with pytest.raises(BaseException) as found:  # noqa: PT011 - looked at by who asks
        job(plan, Report("vm-dump", quiet=True), "none").run()
    return found.value


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("job", "steps", "step"), CASES)
def test_a_step_fails(
    job: type[Dump],
    steps: list[str],
    step: str,
    trouble: Exception,
    qemu: FakeQemu,
    path: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = qemu.settings()
    undone = Undone(monkeypatch, step, trouble)
    error = failing(job, path, work, qemu)
    assert undone.ran == steps
    assert isinstance(error, InDoubt)
    assert f"could not put back {step}: {trouble}" in str(error)
    assert "no, thanks" in str(error)
    assert (qemu.settings(), qemu.objects, qemu.run) == (before, {}, "running")
    assert list(work.glob("state*")) == []


@pytest.mark.parametrize("job", [Dump, Snapshot])
def test_none_fails(job: type[Dump], qemu: FakeQemu, path: str, work: Path) -> None:
    before = qemu.settings()
    error = failing(job, path, work, qemu)
    assert isinstance(error, CannotDo)
    assert "no, thanks; the guest runs on" in str(error)
    assert (qemu.settings(), qemu.objects, qemu.run) == (before, {}, "running")
