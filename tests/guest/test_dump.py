"""vm-dump on a running guest: what it writes, what becomes of the guest, what it says."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Guests, run, shell
from vm import Guest, until

from guest.judge import as_it_was, went_on


def test_live_dump_leaves_the_guest_paused_and_the_state_goes_on(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-dump a.qmp > s", work)
    assert (done.status, done.out) == (0, b"")
    assert done.err == "vm-dump: hint: the guest stands paused; to let it run again: vm-cont a.qmp\n"
    assert source.status() == "postmigrate"
    assert source.standing()
    stood = source.count() or 0
    target = guests.waiting()
    done = shell("vm-restore b.qmp < s", work)
    assert (done.status, done.text, done.err) == (0, "52:54:00:00:00:01 -\n", "")
    went_on(stood, target)
    assert source.status() == "postmigrate"


def test_what_leaves_is_the_plain_stream(guests: Guests, work: Path) -> None:
    """No return path is asked for in it, so that a QEMU reads it from a plain pipe."""
    guests.running()
    assert shell("vm-dump -q a.qmp > s; vm-cont a.qmp", work).status == 0
    with Path(work, "s").open("rb") as file:
        head = file.read(200)
    # Behind the configuration comes the first section, not a command.
    at = 13 + head[12]
    assert head[:9] == b"QEVM\0\0\0\3\7"
    assert head[at] == 1
    with guests.start("c", incoming=f"exec:cat {work}/s") as plain:
        plain.wait_status("running")
        assert plain.running()


def test_stop_saves_a_guest_that_stands(guests: Guests, work: Path) -> None:
    source = guests.running()
    assert shell("vm-dump --stop -o s a.qmp", work).status == 0
    assert source.status() == "postmigrate"
    target = guests.waiting()
    done = shell("vm-restore b.qmp < s", work)
    assert done.status == 0
    assert "stands paused; to let it run: vm-cont b.qmp" in done.err
    assert done.out == b""
    assert target.status() == "paused"
    assert shell("vm-cont b.qmp", work).status == 0
    went_on(source.count() or 0, target)


@pytest.mark.parametrize("mode", ["", "--stop"])
def test_after_running(guests: Guests, work: Path, mode: str) -> None:
    source = guests.running()
    done = shell(f"vm-dump {mode} --after running a.qmp > s", work)
    assert (done.status, done.err) == (0, "")
    as_it_was(source)


def test_after_quit(guests: Guests, work: Path) -> None:
    source = guests.running()
    stood = source.count() or 0
    assert shell("vm-dump --after quit -o s a.qmp", work).status == 0
    source.wait_gone(10)
    target = guests.waiting()
    assert shell("vm-restore b.qmp < s", work).status == 0
    assert target.wait_count(stood) >= stood
    assert target.running()


def test_after_quit_into_a_plain_pipe_is_refused(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-dump --after quit a.qmp | cat > s", work)
    assert done.status == 2
    assert "--to" in done.err
    as_it_was(source)


def test_to_a_sink_that_takes_all(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-dump --to 'sleep 1; zstd -q > s.zst' a.qmp", work)
    assert done.status == 0, done.err
    assert source.status() == "postmigrate"
    guests.waiting()
    assert shell("zstd -dc s.zst | vm-restore b.qmp", work).status == 0


def test_rate_and_downtime_are_put_back(guests: Guests, work: Path) -> None:
    source = guests.running()
    assert shell("vm-dump -q --speed 300m --downtime 50 --after running a.qmp > s", work).status == 0
    as_it_was(source)


def test_a_rate_set_before_is_kept(guests: Guests, work: Path) -> None:
    source = guests.running()
    source.cmd("migrate-set-parameters", **{"max-bandwidth": 32 << 20})
    started = time.monotonic()
    assert shell("vm-dump -q --after running a.qmp > s", work).status == 0
    size = Path(work, "s").stat().st_size
    assert time.monotonic() - started > size / (32 << 20) / 4
    assert source.cmd("query-migrate-parameters")["max-bandwidth"] == 32 << 20


def test_what_was_left_switched_on_does_no_harm(guests: Guests, work: Path) -> None:
    """With a left-over background-snapshot a plain migration would end with the guest running."""
    source = guests.running()
    left = [{"capability": "background-snapshot", "state": True}]
    source.cmd("migrate-set-capabilities", capabilities=left)
    assert shell("vm-dump -q a.qmp > s", work).status == 0
    assert source.status() == "postmigrate"
    # Only a snapshot that was killed leaves it, and nobody wants it back.
    assert not [c["capability"] for c in source.cmd("query-migrate-capabilities") if c["state"]]


def test_estimate_sends_nothing(guests: Guests, work: Path) -> None:
    source = guests.running()
    before = source.cmd("query-migrate")
    done = shell("vm-dump -n --json a.qmp; vm-dump -n --speed 100m a.qmp", work)
    assert done.status == 0
    estimate = json.loads(done.err)
    assert source.cmd("query-migrate") == before
    assert "100.0 MiB/s" in done.text
    assert shell("vm-dump -q a.qmp > s", work).status == 0
    real = Path(work, "s").stat().st_size
    assert real / 4 < estimate["bytes"] < real * 2


def test_json_is_one_object_a_line_on_stderr(guests: Guests, work: Path) -> None:
    guests.running()
    done = shell("vm-dump --json --progress --speed 30m a.qmp > s", work)
    assert done.status == 0
    objects = [json.loads(line) for line in done.err.splitlines()]
    assert {o["vmstate"] for o in objects} == {1}
    result = objects[-2] if objects[-1]["type"] == "hint" else objects[-1]
    assert result["type"] == "result"
    assert result["bytes"] == Path(work, "s").stat().st_size
    assert result["saved"] == "running"
    progress = [o for o in objects if o["type"] == "progress"]
    assert progress
    wanted = {"percent", "rate", "dirty_rate", "round", "expected_downtime_ms", "seconds_left"}
    assert wanted <= progress[0].keys()
    errors = shell("vm-dump --json a.qmp > s2", work)
    assert errors.status == 1
    assert json.loads(errors.err)["type"] == "error"


def test_a_line_on_sigusr1(guests: Guests, work: Path) -> None:
    guests.running()
    with Path(work, "err").open("wb") as err:
        dump = subprocess.Popen(["vm-dump", "--speed", "20m", "-o", "s", "a.qmp"], cwd=work, stderr=err)
        until(lambda: guests_active(guests), 20, "the dump is under way")
        time.sleep(0.5)
        dump.send_signal(signal.SIGUSR1)
        until(lambda: b" %, " in Path(work, "err").read_bytes(), 20, "a line of progress")
        dump.send_signal(signal.SIGTERM)
        assert dump.wait(20) == -signal.SIGTERM


def guests_active(guests: Guests) -> bool:
    return guests._started[0].cmd("query-migrate").get("status") == "active"


def test_a_socket_as_standard_output(guests: Guests, work: Path) -> None:
    import socket
    import threading

    source = guests.running()
    ours, theirs = socket.socketpair()
    taken = bytearray()

    def take() -> None:
        while data := ours.recv(1 << 20):
            taken.extend(data)

    reader = threading.Thread(target=take)
    reader.start()
    done = run("vm-dump", "-q", "a.qmp", cwd=work, stdout=theirs)
    theirs.close()
    reader.join(20)
    ours.close()
    assert done.status == 0
    Path(work, "s").write_bytes(taken)
    assert source.status() == "postmigrate"
    guests.waiting()
    assert shell("vm-restore -q b.qmp < s", work).status == 0


def test_status_beside_a_running_dump(guests: Guests, work: Path) -> None:
    source = guests.running()
    dump = subprocess.Popen(["vm-dump", "--speed", "20m", "-o", "s", "a.qmp"], cwd=work)
    try:
        until(lambda: source.cmd("query-migrate").get("status") == "active", 20, "under way")
        time.sleep(0.3)
        done = shell("vm-status a.qmp; vm-status --json a.qmp; vm-dump a.qmp > s2; echo $?", work)
        text, answer, status = done.text.splitlines()[0], done.text.splitlines()[-2], done.text.splitlines()[-1]
        assert "while its state is being sent" in text
        assert json.loads(answer)["progress"]["round"] >= 1
        assert status == "1"
        assert "is in the hands of vm-dump" in done.err
        assert source.cmd("query-migrate").get("status") == "active"
        source.cmd("migrate_cancel")
        assert dump.wait(30) == 1
    finally:
        dump.kill()
        dump.wait(10)
    as_it_was(source)
    assert not Path(work, "s").exists()


BUSY = {"kind": "metal", "mem": 80, "append": "dirty=4000"}


@pytest.fixture
def busy(guests: Guests) -> Guest:
    """It writes its memory faster than it is sent."""
    guest = guests.start("a", **BUSY)
    guest.wait_count(1)
    return guest


def test_one_that_does_not_converge_is_paused_for_the_rest(busy: Guest, guests: Guests, work: Path) -> None:
    done = shell("vm-dump -q --speed 30m -o s a.qmp", work)
    assert done.status == 0, done.err
    assert done.err.count("\n") == 1
    assert "warning: the guest is paused while " in done.err
    assert busy.cmd("query-migrate-parameters")["downtime-limit"] == 300
    assert busy.standing()
    # As after any live dump, the state says that it ran.
    there = guests.waiting("b", **BUSY)
    assert shell("vm-restore -q b.qmp < s", work).status == 0
    there.wait_status("running")


@pytest.mark.parametrize("options", ["--max-rounds 2 -o s", "--timeout 3 -o s", "--timeout 3 --to 'cat > t'"])
def test_limits(busy: Guest, work: Path, options: str) -> None:
    done = shell(f"vm-dump -q --speed 30m {options} a.qmp", work)
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "the dump " in done.err
    assert "; the guest runs on\n" in done.err
    assert not (work / "s").exists()
    busy.wait_count(busy.count() + 2)
    assert busy.cmd("query-migrate-parameters")["downtime-limit"] == 300


@pytest.mark.parametrize("options", ["", "--stop", "--snapshot", "--after running"])
@pytest.mark.parametrize("sink", ["| sleep 60", "--to 'sleep 60'"])
def test_a_sink_that_takes_nothing(guests: Guests, work: Path, options: str, sink: str) -> None:
    """Stuck in a write; the last bytes wait in the pipe."""
    source = guests.start("a", kind="metal")
    started = time.monotonic()
    words = f"vm-dump -q --timeout 2 {options}"
    line = f"{words} {sink} a.qmp" if sink.startswith("--") else f"({words} a.qmp; echo $? > status) {sink}"
    with subprocess.Popen(["bash", "-c", line], cwd=work, start_new_session=True) as process:
        try:
            until(lambda: (work / "status").exists() or process.poll() is not None, 30, "it ends")
            assert time.monotonic() - started < 15
            assert (process.returncode or int((work / "status").read_text())) == 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert source.status() == "running"
