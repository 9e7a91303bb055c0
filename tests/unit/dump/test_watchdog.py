"""A watchdog whose parent dies, and a scripted QEMU that it finds then."""

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from vm import until
from vmstate.dump import watchdog
from vmstate.dump.watchdog import Guard
from vmstate.errors import CannotDo
from vmstate.qemu import markers
from vmstate.qemu.monitor import Monitor
from vmstate.qemu.settings import SavedSettings, prepare

from unit.qemu.fake_qemu import FakeQemu

MOVE = "0123456789abcdef"


def begun(path: str, *, stopped: bool = False, mark: bool = False) -> SavedSettings:
    saved = SavedSettings()
    with Monitor(path) as monitor:
        prepare(monitor, ("return-path",), {"max-bandwidth": 0}, saved)
        if mark:
            markers.put(monitor, markers.MOVED, uri="link:x", move=MOVE)
        if stopped:
            saved.pause(monitor)
    return saved


def dies(guard: Guard) -> None:
    """As when the kernel closes the pipe of a parent that was killed."""
    guard.leave()


def over(guard: Guard) -> bool:
    return os.waitpid(guard.pid, os.WNOHANG)[0] != 0


def ends(guard: Guard) -> None:
    until(lambda: over(guard), 20, "the watchdog ends")


@pytest.mark.parametrize("stopped", [False, True])
def test_it_puts_back(qemu: FakeQemu, path: str, stopped: bool) -> None:
    before = qemu.settings()
    saved = begun(path, stopped=stopped)
    qemu.migration = "failed"
    guard = Guard(path, saved.owner)
    dies(guard)
    ends(guard)
    assert (qemu.settings(), qemu.objects, qemu.run) == (before, {}, "running")
    assert ("cont" in qemu.heard) == stopped


def test_a_guest_that_its_user_has_paused_stays_so(qemu: FakeQemu, path: str) -> None:
    qemu.run = "paused"
    saved = begun(path)
    guard = Guard(path, saved.owner)
    guard.watch()
    dies(guard)
    ends(guard)
    assert (qemu.run, qemu.objects) == ("paused", {})


def test_it_waits_for_the_end_of_the_migration(qemu: FakeQemu, path: str) -> None:
    before = qemu.settings()
    saved = begun(path)
    qemu.migration = "active"
    guard = Guard(path, saved.owner)
    dies(guard)
    time.sleep(0.5)
    assert not over(guard)
    assert qemu.objects
    qemu.migration = "completed"
    ends(guard)
    assert (qemu.settings(), qemu.objects) == (before, {})


def test_one_that_was_given_away_does_not_run(qemu: FakeQemu, path: str) -> None:
    before = qemu.settings()
    saved = begun(path, stopped=True, mark=True)
    qemu.run, qemu.migration = "postmigrate", "completed"
    guard = Guard(path, saved.owner, move=MOVE)
    dies(guard)
    ends(guard)
    assert "cont" not in qemu.heard
    assert (qemu.settings(), list(qemu.objects)) == (before, [markers.MOVED])


def test_a_move_that_stays_is_kept(qemu: FakeQemu, path: str) -> None:
    saved = begun(path, mark=True)
    qemu.migration = "failed"
    guard = Guard(path, saved.owner, move=MOVE)
    dies(guard)
    ends(guard)
    with Monitor(path) as monitor:
        assert markers.read(monitor) == {markers.DECIDED: {"move": MOVE, "what": markers.KEPT}}


@pytest.mark.parametrize("what", ["another command", "the user"])
def test_a_guest_that_is_no_longer_ours(qemu: FakeQemu, path: str, what: str) -> None:
    """Another command has begun meanwhile, or the user has let it run and paused it again."""
    saved = begun(path, stopped=True)
    guard = Guard(path, saved.owner)
    if what == "the user":
        with Monitor(path) as monitor:
            saved.put_back(monitor)
    else:
        begun(path, stopped=True)
    at_work, heard = qemu.settings(), len(qemu.heard)
    dies(guard)
    ends(guard)
    assert (qemu.settings(), qemu.run) == (at_work, "paused")
    assert not {"cont", "migrate-set-capabilities", "migrate-set-parameters", "object-del"} & set(qemu.heard[heard:])


def test_a_lock_that_is_held_for_a_moment(qemu: FakeQemu, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "TRIES", (0.3, 0.3, 0.3, 0.3))
    saved = begun(path, stopped=True)
    qemu.refuses["cont"] = 'Failed to get "write" lock'
    guard = Guard(path, saved.owner)
    dies(guard)
    until(lambda: "cont" in qemu.heard, 20, "it has tried")
    del qemu.refuses["cont"]
    ends(guard)
    assert (qemu.run, qemu.objects) == ("running", {})


def test_a_lock_that_stays_keeps_no_settings(qemu: FakeQemu, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "TRIES", (0.1, 0.1))
    before = qemu.settings()
    saved = begun(path, stopped=True)
    qemu.refuses["cont"] = 'Failed to get "write" lock'
    guard = Guard(path, saved.owner)
    dies(guard)
    ends(guard)
    assert (qemu.settings(), qemu.objects, qemu.run) == (before, {}, "paused")


def test_done_is_done(qemu: FakeQemu, path: str) -> None:
    saved = begun(path, stopped=True)
    heard = len(qemu.heard)
    guard = Guard(path, saved.owner)
    guard.done()
    assert len(qemu.heard) == heard


@pytest.mark.parametrize("call", [Guard.let_go, Guard.keep])
def test_it_was_killed_itself(qemu: FakeQemu, path: str, call: Callable[[Guard], None]) -> None:
    """What is complete is not thrown away over that; nothing new is begun without it."""
    guard = Guard(path, "x")
    os.kill(guard.pid, signal.SIGKILL)
    os.waitpid(guard.pid, 0)
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        call(guard)
        with pytest.raises(CannotDo, match="watches over the guest"):
            guard.watch()
        guard.done()
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_qemu_has_gone(path: str, work: Path) -> None:
    guard = Guard(str(work / "nobody"), "x")
    dies(guard)
    ends(guard)


def test_nothing_is_held_open(qemu: FakeQemu, path: str) -> None:
    """A pipe, and a descriptor of a high number, end for their other ends with us."""
    saved = begun(path)
    qemu.migration = "active"
    reading, writing = os.pipe()
    os.dup2(writing, 1 << 13)
    os.close(writing)
    guard = Guard(path, saved.owner)
    os.close(1 << 13)
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    assert poll.poll(5000)
    assert os.read(reading, 1) == b""
    os.close(reading)
    dies(guard)
    qemu.migration = "none"
    ends(guard)


@pytest.mark.parametrize("runs_on", [False, True])
def test_a_guest_whose_state_was_taken_on_its_way(qemu: FakeQemu, path: str, runs_on: bool) -> None:
    """Killed between the word for QEMU and its `cont`: only --after running has the guest run."""
    saved = begun(path)
    qemu.run, qemu.migration = "postmigrate", "completed"
    dies(guard := Guard(path, saved.owner, runs_on=runs_on))
    ends(guard)
    assert qemu.run == ("running" if runs_on else "postmigrate")
    assert qemu.objects == {}


@pytest.mark.parametrize("found", ["prelaunch", "guest-panicked", "watchdog", "paused"])
def test_after_running_starts_nothing_that_did_not_run(qemu: FakeQemu, path: str, found: str) -> None:
    saved = SavedSettings()
    saved.found = found
    with Monitor(path) as monitor:
        prepare(monitor, ("return-path",), {}, saved)
    qemu.run, qemu.migration = "postmigrate", "completed"
    dies(guard := Guard(path, saved.owner, runs_on=True))
    ends(guard)
    assert qemu.run == ("running" if found == "paused" else "postmigrate")


def test_one_that_shuts_down_meanwhile_is_off(qemu: FakeQemu, path: str) -> None:
    """Behind the end of its migration QEMU shows that no more."""
    saved = begun(path)
    qemu.run, qemu.migration = "shutdown", "active"
    dies(guard := Guard(path, saved.owner))
    until(lambda: qemu.heard.count("query-status") > 3, 20, "it looks")
    qemu.run, qemu.migration = "postmigrate", "failed"
    ends(guard)
    assert (qemu.run, list(qemu.objects)) == ("postmigrate", [markers.OFF])
