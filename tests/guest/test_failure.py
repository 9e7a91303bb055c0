"""Upon failure the guest continues on the source: whatever dies, at whatever moment."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Guests, run, shell
from vm import Guest, until

from guest.judge import as_it_was

# By which those of this run are told from others on the host.
RATE = 30_000_000 + os.getpid()


def sending(guest: Guest) -> bool:
    return guest.cmd("query-migrate").get("status") == "active"


def start(work: Path, script: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["bash", "-o", "pipefail", "-c", script], cwd=work, start_new_session=True)


def end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def dumper(shell_pid: int) -> int:
    """The process of vm-dump below a shell (not the guard, its child)."""
    found = subprocess.run(["pgrep", "-P", str(shell_pid), "-f", "vm-dump"], capture_output=True, text=True).stdout
    return int(found.split()[0]) if found else 0


def test_the_sink_dies_at_once(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-dump a.qmp | true", work)
    assert done.status == 1
    assert done.err == "vm-dump: error: the reader of standard output went away; the guest runs on\n"
    as_it_was(source)


def test_the_sink_dies_in_the_middle(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-dump a.qmp | head -c 40000000 > s", work)
    assert done.status == 1
    as_it_was(source)


LEAVES = """
import fcntl, os, sys, termios, time
def there():
    return int.from_bytes(fcntl.ioctl(0, termios.FIONREAD, bytes(4)), sys.byteorder)
quiet = time.monotonic()
while time.monotonic() < quiet + 1:
    more = there() - int(sys.argv[1])
    if more > 0:
        os.read(0, more)
        quiet = time.monotonic()
"""


@pytest.mark.parametrize("less", [1, 100, 65536])
def test_the_sink_dies_at_the_last_byte(guests: Guests, work: Path, less: int) -> None:
    """It has read all but the last bytes, which lie in the pipe when it goes."""
    source = guests.running()
    Path(work, "leaves.py").write_text(LEAVES)
    done = shell(f"vm-dump a.qmp | python3 leaves.py {less}", work)
    assert done.status == 1, done.err
    assert "the reader of standard output went away; the guest runs on" in done.err
    as_it_was(source)


@pytest.mark.parametrize("mode", ["", "--stop"])
def test_the_sink_fails_when_the_guest_runs_on_already(guests: Guests, work: Path, mode: str) -> None:
    """With --after running it does not wait for the proof, which counts all the same."""
    source = guests.running()
    process = start(work, f"vm-dump {mode} --after running --to 'cat > s; touch t; sleep 5; exit 3' a.qmp 2> err")
    try:
        until(lambda: source.cmd("query-migrate").get("status") == "completed", 20, "all is sent")
        until(source.running, 5, "the guest runs on")
        assert process.poll() is None
        assert process.wait(30) == 1
    finally:
        end(process)
    assert "ended with status 3; the guest runs on" in Path(work, "err").read_text()
    as_it_was(source)


def test_a_paused_guest_does_not_run_on_before_the_proof(guests: Guests, work: Path) -> None:
    """It was paused, so it is again where the state was not kept."""
    source = guests.running()
    source.cmd("stop")
    done = shell("vm-dump -q --after running --to 'cat > s; exit 3' a.qmp", work)
    assert done.status == 1
    assert source.status() in ("paused", "postmigrate")
    assert shell("vm-cont -q a.qmp", work).status == 0
    as_it_was(source)


@pytest.mark.root
def test_the_disk_is_full(guests: Guests, work: Path) -> None:
    source = guests.running()
    small = work / "small"
    small.mkdir()
    assert run("mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", small).status == 0
    try:
        done = shell("vm-dump a.qmp > small/s", work)
        assert done.status == 1
        assert "No space left on device" in done.err
        as_it_was(source)
        done = shell("vm-dump -o small/t a.qmp", work)
        assert done.status == 1
        assert sorted(p.name for p in small.iterdir()) == ["s"]
        done = shell("vm-dump --to 'cat > small/u' a.qmp", work)
        assert done.status == 1
        as_it_was(source)
    finally:
        run("umount", small)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("mode", ["", "--stop"])
def test_a_signal_to_vm_dump(guests: Guests, work: Path, number: signal.Signals, mode: str) -> None:
    source = guests.running()
    dump = subprocess.Popen(["vm-dump", *mode.split(), "--speed", "30m", "-o", "s", "a.qmp"], cwd=work)
    try:
        until(lambda: sending(source), 20, "under way")
        time.sleep(0.2)
        dump.send_signal(number)
        assert dump.wait(30) == -number
    finally:
        dump.kill()
        dump.wait(10)
    until(lambda: not sending(source) and source.status() == "running", 20, "it runs on")
    # Killed, it has a guard, which restores the settings a moment later.
    until(lambda: not switched_on(source), 20, "the settings are restored")
    as_it_was(source)
    assert not Path(work, "s").exists()


def switched_on(guest: Guest) -> list[str]:
    return [c["capability"] for c in guest.cmd("query-migrate-capabilities") if c["state"]]


def killed_with_its_guard(work: Path, source: Guest, *options: str) -> None:
    process = start(work, f"vm-dump -q {' '.join(options)} --speed {RATE} a.qmp > s")
    try:
        until(lambda: sending(source), 20, "under way")
        shell(f"pkill -9 -f '[-]-speed {RATE}'", work)
        process.wait(60)
    finally:
        end(process)


@pytest.mark.parametrize("cure", ["vm-cont a.qmp", "vm-dump -q --after running a.qmp > again"])
def test_vm_dump_and_its_guard_are_killed(guests: Guests, work: Path, cure: str) -> None:
    """What both have left is named, and the next command restores it, the rate too."""
    source = guests.running()
    killed_with_its_guard(work, source)
    until(lambda: not sending(source) and source.status() == "running", 20, "it runs on")
    status = shell("vm-status a.qmp", work)
    assert "left over from a command that was killed: max-bandwidth, return-path" in status.text
    assert source.running()
    done = shell(cure, work)
    assert (done.status, done.err) == (0, "")
    as_it_was(source)
    assert "left over" not in shell("vm-status a.qmp", work).text


def test_who_paused_it_is_known_to_the_next_command(guests: Guests, work: Path) -> None:
    """vm-dump --stop is killed with its guard: the guest ran before, so the next command that fails lets it run."""
    source = guests.running()
    killed_with_its_guard(work, source, "--stop")
    until(lambda: not sending(source) and source.status() == "paused", 20, "it is left paused")
    assert "return-path, the pause" in shell("vm-status a.qmp", work).text
    assert shell("vm-dump -q --to 'exit 3' a.qmp", work).status == 1
    as_it_was(source)


def test_a_guest_that_its_user_paused_stays_so(guests: Guests, work: Path, disk: Path) -> None:
    """Whatever else the guard has to undo when vm-dump is killed."""
    source = guests.with_disk(disk)
    source.cmd("stop")
    process = start(work, "vm-dump -q --stop --disks t --speed 30m a.qmp > s")
    try:
        until(lambda: sending(source), 20, "under way")
        os.kill(dumper(process.pid), signal.SIGKILL)
        process.wait(60)
    finally:
        end(process)
    until(lambda: not sending(source) and not switched_on(source), 20, "all is undone")
    until(lambda: not list(work.glob("disk.t.*")), 20, "the overlay is gone")
    assert source.standing(2)
    assert source.status() == "paused"


def test_ctrl_c_on_the_whole_pipeline(guests: Guests, work: Path) -> None:
    """The terminal sends it to all: the reader may be gone before vm-dump hears of it."""
    source = guests.running()
    for moment in (0.1, 0.2, 0.3, 0.5):
        moving = start(work, "trap : INT; vm-dump --speed 30m a.qmp | zstd -q > s")
        time.sleep(moment)
        os.killpg(moving.pid, signal.SIGINT)
        moving.wait(30)
        until(lambda: not sending(source), 20, "it is over")
        as_it_was(source)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment(guests: Guests, work: Path, number: signal.Signals) -> None:
    source = guests.running()
    for moment in (0.03, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2):
        command = ["vm-dump", "-q", "--stop", "--after", "running", "-o", "s", "a.qmp"]
        dump = subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE)
        time.sleep(moment)
        dump.send_signal(number)
        _, err = dump.communicate(timeout=30)
        # Python itself ends with 1 where it is interrupted before our program begins.
        assert dump.returncode in (-number, 0) or b"Fatal Python error: init_" in err, err
        as_it_was(source)
        assert not list(work.glob("*.part"))


MOMENTS = [0.0, 0.03, 0.06, 0.09, 0.12, 0.15, 0.2, 0.3]


@pytest.mark.parametrize(
    ("mode", "moment"),
    [
        pytest.param(mode, moment, marks=pytest.mark.more if (at + bool(mode)) % 2 else ())
        for mode in ("", "--stop")
        for at, moment in enumerate(MOMENTS)
    ],
)
def test_kill_9_at_any_moment(guests: Guests, work: Path, mode: str, moment: float) -> None:
    """Before the sink is proven the guest runs on; after that its state is whole."""
    source = guests.running()
    dump = subprocess.Popen(["vm-dump", "-q", *mode.split(), "-o", "s", "a.qmp"], cwd=work)
    time.sleep(moment)
    dump.kill()
    dump.wait(10)

    def settled() -> bool:
        status = source.cmd("query-migrate").get("status")
        return source.status() == "running" or (source.status() == "postmigrate" and status == "completed")

    until(settled, 30, "it runs on, or has given its state away")
    if source.status() == "running":
        assert source.running()
    else:
        assert Path(work, "s").exists()
        guests.waiting()
        assert shell("vm-restore -q b.qmp < s", work).status == 0


def test_kill_9_while_the_sink_holds_the_last_bytes(guests: Guests, work: Path) -> None:
    """All is sent, the guest stands in finish-migrate: the most dangerous moment."""
    source = guests.running()
    dump = start(work, "vm-dump -q a.qmp | python3 -c 'import time; time.sleep(100)'")
    try:
        until(lambda: sending(source), 20, "under way")
        os.kill(dumper(dump.pid), signal.SIGKILL)
        until(lambda: source.status() == "running", 20, "it runs on")
    finally:
        end(dump)
    assert source.running()


def killed_sink(work: Path, kill: Callable[[int], None], source: Guest) -> None:
    """A sink that would commit a short object as whole when its input ends."""
    script = "cat > part && sync && mv part object"
    dump = subprocess.Popen(["vm-dump", "--speed", "30m", "--to", script, "a.qmp"], cwd=work)
    try:
        until(lambda: sending(source), 20, "under way")
        until(lambda: Path(work, "part").exists(), 20, "the sink has begun")
        time.sleep(0.3)
        kill(dump.pid)
        assert dump.wait(30) != 0
    finally:
        dump.kill()
        dump.wait(10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_uploader_never_commits_a_short_object(guests: Guests, work: Path, number: int) -> None:
    source = guests.running()
    killed_sink(work, lambda pid: os.kill(pid, number), source)
    until(lambda: source.status() == "running", 20, "it runs on")
    assert source.running()
    time.sleep(1)
    assert Path(work, "part").exists()
    assert not Path(work, "object").exists()


def test_kill_9_while_the_sink_ends(guests: Guests, work: Path) -> None:
    """It has every byte, and has not said yet that it is well."""
    source = guests.running()
    dump = subprocess.Popen(["vm-dump", "--to", "cat > part; touch read; sleep 100; mv part object", "a.qmp"], cwd=work)
    try:
        until(lambda: Path(work, "read").exists(), 30, "the sink has read everything")
        assert source.standing()
        dump.kill()
        dump.wait(10)
    finally:
        dump.kill()
        dump.wait(10)
    until(lambda: source.status() == "running", 20, "it runs on")
    assert source.running()
    assert not Path(work, "object").exists()


def test_a_monitor_taken_by_another_while_a_stopped_guest_is_put_back(guests: Guests, work: Path) -> None:
    import socket

    source = guests.running()
    dump = subprocess.Popen(["vm-dump", "--stop", "--speed", "30m", "-o", "s", "a.qmp"], cwd=work)
    with socket.socket(socket.AF_UNIX) as holder:
        until(lambda: sending(source), 20, "under way")
        holder.connect(source.qmp)
        holder.recv(10)
        dump.terminate()
        time.sleep(6)
        assert dump.poll() is None
    assert dump.wait(30) == -signal.SIGTERM
    as_it_was(source)


def test_the_sink_reads_everything_and_then_fails(guests: Guests, work: Path) -> None:
    """What QEMU's own `exec:` calls completed."""
    source = guests.running()
    done = shell("vm-dump --to 'cat > s; exit 3' a.qmp", work)
    assert done.status == 1
    assert "ended with status 3; the guest runs on" in done.err
    as_it_was(source)
    done = shell("vm-dump --to 'cat | false | cat' a.qmp", work)
    assert done.status == 1
    as_it_was(source)
    done = shell("vm-dump --stop --to '(cat; exit 3) | zstd -q > s' a.qmp", work)
    assert done.status == 1
    as_it_was(source)


def test_cancelled_by_another(guests: Guests, work: Path) -> None:
    source = guests.running()
    dump = subprocess.Popen(["vm-dump", "--speed", "30m", "a.qmp"], cwd=work, stdout=-3, stderr=subprocess.PIPE)
    try:
        until(lambda: sending(source), 20, "under way")
        source.cmd("migrate_cancel")
        _, err = dump.communicate(timeout=30)
        assert dump.returncode == 1
        assert err == b"vm-dump: error: the migration was cancelled; the guest runs on\n"
    finally:
        dump.kill()
        dump.wait(10)
    as_it_was(source)


def test_the_guest_dies(guests: Guests, work: Path) -> None:
    source = guests.running()
    dump = subprocess.Popen(["vm-dump", "--speed", "30m", "-o", "s", "a.qmp"], cwd=work, stderr=subprocess.PIPE)
    try:
        until(lambda: sending(source), 20, "under way")
        source.end()
        _, err = dump.communicate(timeout=30)
        assert dump.returncode == 1
        assert err.count(b"\n") == 1
        assert b"the QEMU of the guest at a.qmp has ended: the guest has shut down" in err
    finally:
        dump.kill()
        dump.wait(10)
    assert not Path(work, "s").exists()


BROKEN = '[inject-error]\nevent = "flush_to_disk"\nerrno = "5"\n'


@pytest.mark.parametrize("options", ["-o s", "--to 'cat > s'"])
def test_qemu_gives_up_after_the_last_page(guests: Guests, work: Path, disk: Path, options: str) -> None:
    """It cannot flush the disk; QEMU 7.2 leaves its channel open then."""
    (work / "broken").write_text(BROKEN)
    source = guests.start("a", disk=Path(f"blkdebug:{work}/broken:{disk}"))
    source.wait_count(2)
    started = time.monotonic()
    done = shell(f"vm-dump -q {options} a.qmp", work)
    assert time.monotonic() - started < 20
    assert done.status == 1, done.err
    assert "QEMU gave up after " in done.err
    # Its disk is as bad as before.
    source.wait_count(source.count() + 2)
    assert not (work / "s").exists() or "--to" in options


def test_a_paused_guest_stays_paused_when_the_last_byte_is_lost(guests: Guests, work: Path) -> None:
    source = guests.running()
    source.cmd("stop")
    done = shell("vm-dump --to 'cat > s; exit 1' a.qmp; vm-status a.qmp", work)
    assert "the guest is paused as before" in done.err
    assert "stands paused; its last migration failed" in done.text
    assert source.standing()
    assert shell("vm-cont a.qmp", work).status == 0
    as_it_was(source)


def test_a_paused_guest_stays_paused_on_failure(guests: Guests, work: Path) -> None:
    source = guests.running()
    source.cmd("stop")
    done = shell("vm-dump a.qmp | head -c 1000000 > s", work)
    assert done.status == 1
    assert "the guest is paused as before" in done.err
    assert source.status() == "paused"
    source.cmd("cont")
    as_it_was(source)


def test_what_a_failed_dump_has_left_is_no_state(guests: Guests, work: Path) -> None:
    """A cut input of a whole pipeline is noticed at its end, too: the short file is no state."""
    source = guests.running()
    shell("vm-dump a.qmp | head -c 30000000 > s", work)
    as_it_was(source)
    waiting = guests.waiting()
    done = shell("vm-restore b.qmp < s", work)
    assert done.status == 3
    assert waiting.status() == "inmigrate"
