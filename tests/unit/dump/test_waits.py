"""No wait of a dump is without an end, and a signal ends it."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from qmp_server import SILENCE, QmpServer, Said
from vm import until
from vmstate.dump import snapshot
from vmstate.dump.live import DumpPlan
from vmstate.dump.snapshot import Snapshot
from vmstate.dump.watchdog import Guard
from vmstate.errors import Stopped
from vmstate.qemu.monitor import Monitor
from vmstate.qemu.outgoing import OutgoingMigration
from vmstate.qemu.settings import SNAPSHOT, SavedSettings, prepare
from vmstate.report import Report
from vmstate.signals import stop_on_signal

from unit.qemu.fake_qemu import FakeQemu


def sends(qemu: FakeQemu) -> None:
    def migrate(uri: str) -> dict[str, Any]:
        qemu.migration = "active"
        return {}

    qemu.migrate = migrate  # type: ignore[attr-defined]


def test_a_snapshot_over_a_monitor_without_events(qemu: FakeQemu, path: str) -> None:
    """How long the guest stood is not known; that it runs is."""
    sends(qemu)
    ours, theirs = socket.socketpair()
    started = time.monotonic()
    with ours, theirs:
        assert OutgoingMigration(path, on=SNAPSHOT).snapshot(theirs.fileno()) is None
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("answers", [False, True])
def test_a_signal_ends_a_snapshot(qemu: FakeQemu, work: Path, monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    """Of a QEMU that does not answer whoever has it begin, or sends nothing."""
    monkeypatch.setattr(snapshot, "TALKS", 0.5)

    def answer(command: dict[str, Any]) -> Iterable[Said]:
        if command["execute"] == "migrate" and not answers:
            return (SILENCE,)
        return qemu(command)

    before = qemu.settings()
    signal.signal(signal.SIGTERM, stop_on_signal)
    with QmpServer(work / "qmp", answer) as server:
        job = Snapshot(DumpPlan(server.path, out=str(work / "s")), Report("vm-dump", quiet=True), "off")
        threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if answers:
            sends(qemu)
            threading.Timer(3.5, setattr, (qemu, "migration", "failed")).start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            job.run()
        assert time.monotonic() - started < 10
    assert (qemu.settings(), qemu.objects, qemu.run) == (before, {}, "running")


def test_the_watchdog_waits_as_long_as_another_holds_the_monitor(
    qemu: FakeQemu, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its deadline is the end of its QEMU.  For it a minute is over in 3 s."""
    before = qemu.settings()
    saved = SavedSettings()
    with Monitor(path) as monitor:
        prepare(monitor, ("return-path",), {}, saved)
        saved.pause(monitor)
    clock = time.monotonic
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(path)
        with monkeypatch.context() as faster:
            faster.setattr(time, "monotonic", lambda: clock() * 20)
            guard = Guard(path, saved.owner)
        guard.leave()
        time.sleep(6)
        assert os.waitpid(guard.pid, os.WNOHANG)[0] == 0
    until(lambda: os.waitpid(guard.pid, os.WNOHANG)[0], 20, "the watchdog ends")
    assert (qemu.settings(), qemu.objects, qemu.run) == (before, {}, "running")
