"""Who holds a QEMU: one command at a time, told by what lies in it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from vmstate.errors import CannotDo
from vmstate.qemu import claim, control, status
from vmstate.qemu.monitor import Monitor

from unit.qemu.fake_qemu import FakeQemu


@pytest.fixture
def other() -> Iterator[int]:
    """Another process, which lives."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait(10)


def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait(10)
    return process.pid


def started(pid: int) -> int:
    return claim._process(pid).start


def holds(qemu: FakeQemu, *pids: int, number: int = 1, **values: Any) -> None:
    """A claim of these processes lies in it."""
    facts = {"command": "vm-other", "pids": pids, "starts": [started(pid) for pid in pids], "host": claim._host()}
    qemu.claims[f"vmstate-claim-{number}"] = json.dumps(facts | values)


def take(path: str, **values: Any) -> None:
    with Monitor(path) as monitor:
        claim.take(monitor, path, **values)


def numbers(qemu: FakeQemu) -> list[int]:
    return [int(name.rpartition("-")[2]) for name in qemu.claims]


def test_the_first_one_has_it(qemu: FakeQemu, path: str) -> None:
    take(path)
    (data,) = qemu.claims.values()
    assert json.loads(data)["pids"] == [os.getpid()]
    # Once more it is the same one.
    take(path)
    assert numbers(qemu) == [1]


def test_a_second_one_is_told_who_has_it(qemu: FakeQemu, path: str, other: int) -> None:
    holds(qemu, other)
    before = dict(qemu.claims)
    with pytest.raises(CannotDo, match=f"is in the hands of vm-other .process {other}."):
        take(path)
    assert qemu.claims == before
    assert status.of(path).values()["holder"] == f"vm-other (process {other})"


@pytest.mark.parametrize("number", [1, 7, 123456789])
def test_that_of_one_that_has_ended_is_taken_over(qemu: FakeQemu, path: str, number: int) -> None:
    holds(qemu, ended(), number=number)
    assert status.of(path).holder == ""
    take(path)
    assert numbers(qemu) == [number + 1]


def test_one_that_waits_to_be_reaped_has_ended(qemu: FakeQemu, path: str) -> None:
    process = subprocess.Popen(["sleep", "600"])
    holds(qemu, process.pid)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    take(path)
    process.wait(10)
    assert numbers(qemu) == [2]


def test_a_number_that_was_given_to_another_process(qemu: FakeQemu, path: str, other: int) -> None:
    holds(qemu, other, starts=[started(other) - 1])
    take(path)
    assert numbers(qemu) == [2]


@pytest.mark.parametrize(
    "values",
    [
        {"host": "another-boot pid:[1]"},
        {"host": ""},
        {"pids": [], "starts": []},
        {"pids": [1, 2]},
        {"pids": "x"},
        {"command": "vm-cont --force; x\n"},
        {"starts": [True]},
    ],
)
def test_one_that_cannot_be_seen_counts_as_alive(qemu: FakeQemu, path: str, values: dict[str, Any]) -> None:
    holds(qemu, ended(), number=3, **values)
    with pytest.raises(CannotDo, match="cannot be seen from here") as error:
        take(path)
    assert "object_del vmstate-claim-3" in error.value.hints[0]
    assert "--force" not in str(error.value)
    assert numbers(qemu) == [3]


def test_a_watchdog_at_work_is_waited_for(qemu: FakeQemu, path: str) -> None:
    process = subprocess.Popen(["sleep", "0.3"])
    reaper = threading.Thread(target=process.wait)
    holds(qemu, ended(), process.pid)
    reaper.start()
    take(path)
    assert numbers(qemu) == [2]
    reaper.join()


def test_but_not_for_ever(qemu: FakeQemu, path: str, other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "PATIENCE", 0.2)
    holds(qemu, ended(), other)
    with pytest.raises(CannotDo, match="in the hands of vm-other"):
        take(path)


def test_a_command_and_its_watchdog_are_one_holder(qemu: FakeQemu, path: str, other: int) -> None:
    take(path)
    take(path, watchdog=other)
    take(path, watchdog=other)
    take(path)
    assert numbers(qemu) == [2]
    assert json.loads(qemu.claims["vmstate-claim-2"])["pids"] == [os.getpid(), other]


@pytest.mark.parametrize(("move", "given"), [("a", True), ("b", False), ("", False)])
def test_only_that_of_the_same_migration_is_taken_over(
    qemu: FakeQemu, path: str, other: int, move: str, given: bool
) -> None:
    holds(qemu, other, move=move)
    if given:
        take(path, move="a", ours="a")
        assert numbers(qemu) == [2]
    else:
        with pytest.raises(CannotDo, match="in the hands of"):
            take(path, move="a", ours="a")


def test_one_that_was_faster(qemu: FakeQemu, path: str, other: int) -> None:
    """Between the look and the addition another one has come: QEMU refuses the second of one name."""
    add = qemu.object_add

    def faster(**values: Any) -> dict[str, Any]:
        qemu.object_add = add  # type: ignore[method-assign]
        holds(qemu, other)
        return add(**values)

    qemu.object_add = faster  # type: ignore[method-assign]
    with pytest.raises(CannotDo, match=f"vm-other .process {other}."):
        take(path)


def test_a_number_that_is_lower_by_now_is_no_claim(qemu: FakeQemu, path: str, other: int) -> None:
    """Others have come and gone between the look and the addition: only the highest one holds it."""
    add = qemu.object_add

    def late(**values: Any) -> dict[str, Any]:
        qemu.object_add = add  # type: ignore[method-assign]
        answer = add(**values)
        holds(qemu, other, number=2)
        return answer

    qemu.object_add = late  # type: ignore[method-assign]
    with pytest.raises(CannotDo, match=f"vm-other .process {other}."):
        take(path)
    # The lower one is for the holder of the higher one to remove.
    assert numbers(qemu) == [1, 2]


@pytest.mark.parametrize("serves", [False, True])
def test_vm_cont_lets_nothing_run_that_is_being_settled(qemu: FakeQemu, path: str, other: int, serves: bool) -> None:
    qemu.run, qemu.migration = "paused", "completed"
    qemu.capabilities["late-block-activate"] = True
    holds(qemu, other, serves=serves)
    if serves:
        assert control.cont(path).run == "running"
    else:
        with pytest.raises(CannotDo, match="in the hands of vm-other"):
            control.cont(path)
        assert status.of(path).next == ()
        assert status.of(path).leftovers == ()
    # What belongs to it stays.
    assert qemu.capabilities["late-block-activate"]
    assert numbers(qemu) == [1]


def test_one_that_nobody_could_see_says_that_it_has_ended(
    qemu: FakeQemu, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_host", lambda: "boot pid:[2]")
    take(path)
    monkeypatch.setattr(claim, "_host", lambda: "boot pid:[3]")
    with pytest.raises(CannotDo, match="cannot be seen"):
        take(path)
    monkeypatch.setattr(claim, "_host", lambda: "boot pid:[2]")
    claim.release()
    monkeypatch.setattr(claim, "_host", lambda: "boot pid:[3]")
    claim.leave_to_watchdog()
    take(path)
    assert numbers(qemu) == [3]
    # What its watchdog goes on to undo is not over.
    claim.leave_to_watchdog()
    claim.release()
    assert numbers(qemu) == [3]


def test_who_waits_for_a_watchdog_leaves_the_monitor_to_it(qemu: FakeQemu, path: str, other: int) -> None:
    holds(qemu, ended(), other)
    talks: list[int] = []

    def frees() -> None:
        talks.append(qemu.heard.count("qmp_capabilities"))
        qemu.claims.clear()

    timer = threading.Timer(0.5, frees)
    timer.start()
    take(path)
    timer.join()
    assert talks[0] > 1
    assert numbers(qemu) == [1]


def test_but_not_as_long_as_a_migration_goes_on(qemu: FakeQemu, path: str, other: int) -> None:
    """vm-migrate -d has ended itself, and its watchdog stays: that is the one that is named."""
    holds(qemu, ended(), other)
    qemu.migration = "active"
    with pytest.raises(CannotDo, match=f"in the hands of vm-other .process {other}."):
        take(path)
    assert qemu.heard.count("qmp_capabilities") == 1


def test_a_process_with_a_strange_name(qemu: FakeQemu, path: str) -> None:
    line = "open('/proc/self/comm', 'wb').write(b'\\xff) S 1'); print(flush=True); import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", line], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        holds(qemu, process.pid)
        with pytest.raises(CannotDo, match="in the hands of vm-other"):
            take(path)
        process.kill()
        process.wait(10)
    take(path)


@pytest.mark.parametrize(
    "data", ["[" * 100_000, '{"pids": [99999999999], "starts": [1], "command": "x", "host": "h"}', ""]
)
def test_a_claim_that_cannot_be_read(qemu: FakeQemu, path: str, data: str) -> None:
    qemu.claims["vmstate-claim-5"] = data
    with pytest.raises(CannotDo, match="cannot be seen from here"):
        take(path)
    assert status.of(path).holder


def test_one_that_proc_hides_counts_as_alive(
    qemu: FakeQemu, path: str, other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds(qemu, other)
    monkeypatch.setattr(claim, "_stat", lambda _pid: None)
    with pytest.raises(CannotDo, match="in the hands of vm-other"):
        take(path)


def test_one_that_is_removed_while_it_is_looked_at(qemu: FakeQemu, path: str, other: int) -> None:
    """The holder of a higher one has removed it in between."""
    holds(qemu, ended())
    get = qemu.qom_get

    def later(**values: Any) -> str:
        qemu.qom_get = get  # type: ignore[method-assign]
        qemu.claims.clear()
        holds(qemu, other, number=2)
        return get(**values)

    qemu.qom_get = later  # type: ignore[method-assign]
    with pytest.raises(CannotDo, match=f"vm-other .process {other}."):
        take(path)


def test_protection_that_is_lifted_in_a_moment_is_left_alone(
    qemu: FakeQemu, path: str, other: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a snapshot its pages are protected for a moment still, and its command is at work."""
    monkeypatch.setattr(control, "lost_its_snapshot", lambda *_: True)
    monkeypatch.setattr(control.userfault, "unprotect", lambda _pid: pytest.fail("unprotected"))
    holds(qemu, other)
    qemu.capabilities["background-snapshot"] = True
    assert control.cont(path).run == "running"
    assert qemu.capabilities["background-snapshot"]
