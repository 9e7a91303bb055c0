"""Two commands on one QEMU: one works on it, and the other one is told so; what it touches then is nothing."""

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Guests, shell
from vm import Guest, until

from guest.judge import still_waits


@contextmanager
def begun(work: Path, line: str, **kwargs: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A command that surely ends."""
    with subprocess.Popen(shlex.split(line), cwd=work, **kwargs) as process:
        try:
            yield process
        finally:
            process.kill()


def metal(guests: Guests, work: Path) -> tuple[Guest, Path]:
    """A guest that waits, and the state of another one."""
    source = guests.start("a", kind="metal", mem=32)
    assert shell("vm-dump -o s a.qmp", work).status == 0
    source.end()
    return guests.waiting(kind="metal", mem=32), work / "s"


def test_a_second_restore_leaves_the_first_one_alone(guests: Guests, work: Path) -> None:
    source = guests.running()
    assert shell("vm-dump --stop -o s a.qmp", work).status == 0
    source.end()
    there, state = guests.waiting(), (work / "s").read_bytes()
    with begun(work, "vm-restore --run b.qmp", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as first:
        assert first.stdin
        first.stdin.write(state[: len(state) // 2])
        first.stdin.flush()
        until(lambda: there.cmd("query-migrate").get("status") == "active", 20, "QEMU loads")
        before = there.cmd("qom-list", path="/objects"), there.cmd("query-migrate-capabilities")
        for line in ("vm-restore b.qmp < s", "vm-dump -o x b.qmp", "vm-cont b.qmp"):
            done = shell(line, work)
            assert done.status == 1, (line, done.err)
            assert (there.cmd("qom-list", path="/objects"), there.cmd("query-migrate-capabilities")) == before, line
        assert f"in the hands of vm-restore (process {first.pid})" in shell("vm-status b.qmp", work).text
        first.stdin.write(state[len(state) // 2 :])
        first.stdin.close()
        assert first.wait(20) == 0
    assert there.running()


def test_a_claim_ends_with_its_holder(guests: Guests, work: Path) -> None:
    source = guests.start("a", kind="metal", mem=32)
    dump = subprocess.Popen(["vm-dump", "--speed", "1m", "-o", "s", "a.qmp"], cwd=work, stderr=subprocess.DEVNULL)
    until(lambda: source.cmd("query-migrate").get("status") == "active", 20, "begun")
    done = shell("vm-dump -o t a.qmp", work)
    assert done.status == 1
    assert f"is in the hands of vm-dump (process {dump.pid})" in done.err
    # The others need no claim.
    assert shell("vm-speed a.qmp 2m && vm-status a.qmp", work).status == 0
    dump.kill()
    dump.wait(10)
    # Its watchdog puts things back first.
    done = shell("vm-speed a.qmp 0; vm-dump -o t a.qmp", work)
    assert done.status == 0, done.err
    assert not (work / "s").exists()


def test_of_many_one_has_it(guests: Guests, work: Path) -> None:
    there, state = metal(guests, work)
    line = "for n in 1 2 3 4 5 6; do (vm-restore --run b.qmp < s > $n.out 2> $n.err; echo $? > $n.status) & done; wait"
    assert shell(line, work).status == 0
    statuses = sorted((work / f"{n}.status").read_text().strip() for n in range(1, 7))
    assert statuses == ["0", "1", "1", "1", "1", "1"]
    assert there.status() == "running"
    assert state.exists()


def test_one_in_a_container(guests: Guests, work: Path) -> None:
    """Its processes cannot be seen from here: it says when it ends, and where it is killed a person has to."""
    if os.getuid():
        pytest.skip("only root can make a pid namespace")
    source = guests.start("a", kind="metal", mem=32)
    inside = "unshare --pid --fork --mount-proc --kill-child"
    for _ in range(2):
        assert shell(f"{inside} vm-dump --after running -o s a.qmp", work).status == 0
    with begun(work, f"{inside} vm-dump --speed 1m --after running -o t a.qmp", stderr=subprocess.DEVNULL):
        until(lambda: source.cmd("query-migrate").get("status") == "active", 20, "begun")
        assert "in the hands of a vm-dump that cannot be seen" in shell("vm-status a.qmp", work).text
    until(lambda: source.cmd("query-migrate").get("status") != "active", 20, "ended")
    done = shell("vm-dump -o t a.qmp", work)
    assert done.status == 1
    (hint,) = [line for line in done.err.splitlines() if "object_del" in line]
    source.cmd("object-del", id=hint.rpartition(" ")[2])
    assert shell("vm-dump --speed 0 -o t a.qmp", work).status == 0


def test_a_restore_that_is_refused_leaves_the_guest_waiting(guests: Guests, work: Path) -> None:
    """It has the claim by then, and whoever comes next takes it over."""
    there, _state = metal(guests, work)
    assert shell("head -c 100000 s | vm-restore b.qmp", work).status == 3
    still_waits(there)
    assert shell("vm-restore --run b.qmp < s", work).status == 0
    assert there.status() == "running"


def test_one_that_serves_may_be_stopped_and_let_run(guests: Guests, work: Path) -> None:
    source = guests.start("a", kind="metal", mem=32)
    assert shell("vm-dump a.qmp | vm-compress -o s.vmz", work).status == 0
    source.end()
    there = guests.waiting(kind="metal", mem=32)
    line, state = "vm-restore --lazy --on-demand --run b.qmp", open(work / "s.vmz", "rb")  # noqa: SIM115
    with state, begun(work, line, stdin=state, stdout=subprocess.DEVNULL) as server:
        until(lambda: there.status() == "running", 20, "runs")
        assert shell("vm-stop b.qmp && vm-cont b.qmp", work).status == 0
        assert there.status() == "running"
        done = shell("vm-restore --resume b.qmp < s.vmz", work)
        assert done.status == 1
        assert f"is in the hands of vm-restore (process {server.pid})" in done.err
        server.terminate()
        assert server.wait(30) in (0, -signal.SIGTERM)
