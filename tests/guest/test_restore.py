"""vm-restore: what it takes, what it refuses and while who still waits, and when the guest runs."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, Guests, shell
from vm import Guest, until

from guest.judge import as_it_was, still_waits, used_up, went_on

# Of a few MiB, for what is slow or only has to count; a nested KVM emulates its firmware, which takes five seconds.
SMALL: dict[str, Any] = {"kind": "metal", "mem": 20, "accel": "tcg"}


@pytest.fixture
def saved(guests: Guests, work: Path) -> Path:
    """A whole state `s` in the work folder; its source has ended."""
    guests.dumped(work / "s")
    return work / "s"


def refused(done: Done, status: int, words: str) -> None:
    assert done.status == status, done.err
    assert re.search(words, done.err), done.err
    assert done.out == b""


def test_an_empty_input(guests: Guests, work: Path) -> None:
    guest = guests.waiting()
    refused(shell("vm-restore b.qmp < /dev/null", work), 3, "the input is empty")
    refused(shell("true | vm-restore b.qmp", work), 3, "the input is empty")
    still_waits(guest)


def test_an_input_that_is_no_state(guests: Guests, work: Path) -> None:
    guest = guests.waiting()
    refused(shell("head -c 1000000 /dev/urandom | vm-restore b.qmp", work), 3, "no state of a guest")
    refused(shell("echo hello | vm-restore b.qmp", work), 3, "no state of a guest")
    still_waits(guest)


def test_an_encrypted_input_has_a_hint(guests: Guests, work: Path, gnupg: Path) -> None:
    guest = guests.waiting()
    refused(shell("echo x | gpg -q -e -r me@example.org | vm-restore b.qmp", work), 3, "hint: .*vm-encrypt -d")
    still_waits(guest)


@pytest.mark.parametrize("cut", [1, 5000, 300_000, 50_000_000])
def test_a_truncated_file_is_refused_while_the_guest_waits(guests: Guests, work: Path, saved: Path, cut: int) -> None:
    guest = guests.waiting()
    os.truncate(saved, saved.stat().st_size - cut)
    refused(shell("vm-restore b.qmp < s", work), 3, "not whole")
    still_waits(guest)


def test_junk_behind_the_end(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting()
    refused(shell("cp s t; echo x >> t; vm-restore b.qmp < t", work), 3, "not whole")
    still_waits(guest)
    refused(shell("(cat s s; echo x) | vm-restore b.qmp", work), 3, "lies behind the end of the state, at offset")
    # Its devices never came to QEMU: 7.2 ends over that, 10.0 stays, and neither can run.
    until(lambda: used_up(guest), 20, "it has failed")
    assert guest.status() in ("gone", "inmigrate")
    assert guest.count() is None


@pytest.mark.parametrize("cut", [1, 300_000, 50_000_000])
def test_a_truncated_pipe_never_runs(guests: Guests, work: Path, saved: Path, cut: int) -> None:
    guest = guests.waiting()
    done = shell(f"head -c -{cut} s | vm-restore b.qmp", work)
    refused(done, 3, r"truncated at offset \d+, in")
    assert "start it again with -incoming defer" in done.err
    assert guest.status() in ("gone", "inmigrate")
    assert guest.count() is None


def test_a_short_truncated_pipe_is_refused_while_the_guest_waits(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting()
    refused(shell("head -c 10000000 s | vm-restore b.qmp", work), 3, "truncated at offset 10000000, in")
    still_waits(guest)


def test_another_machine_type(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting(machine="pc")
    refused(shell("vm-restore b.qmp < s", work), 4, r"of machine type 'pc-q35-\S+', the guest at b.qmp is a 'pc-i440fx")
    still_waits(guest)


def test_another_size_of_memory(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting(mem=384)
    done = shell("cat s | vm-restore b.qmp", work)
    refused(done, 4, "'pc.ram' has 268435456 bytes in the state and 402653184 in the guest")
    assert "-m 256" in done.err
    still_waits(guest)


def test_a_device_that_is_missing(guests: Guests, work: Path) -> None:
    """Seen by QEMU alone, in the middle of the load; its words come from the QEMU that we started."""
    guests.running()
    assert shell("vm-dump -q a.qmp > s", work).status == 0
    other = Guest(work, "c", net=[])
    done = shell(f"vm-restore -- {' '.join(quoted(other.args))} < s", work)
    assert done.status == 4, done.err
    assert "Unknown savevm section" in done.err
    assert "hint: start the guest with the same devices" in done.err
    assert not alive(work, "c")


def quoted(args: list[str]) -> list[str]:
    return ["'" + arg.replace("'", "'\\''") + "'" for arg in args]


def alive(work: Path, name: str) -> bool:
    found = subprocess.run(["pgrep", "-f", f"{work}/{name}.qmp"], capture_output=True).stdout
    return bool(found)


def test_a_damaged_byte_in_the_head_of_the_pages(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting()
    with saved.open("r+b") as file:
        file.seek(30_000_000)
        file.write(b"\xff" * 65536)
    done = shell("vm-restore b.qmp < s", work)
    assert done.status == 3, done.err
    assert guest.status() in ("gone", "inmigrate")


def test_a_guest_that_does_not_wait(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.running("b")
    refused(shell("vm-restore b.qmp < s", work), 1, "does not wait for a state: it is 'running'")
    as_it_was(guest)


def test_no_such_guest(work: Path, guests: Guests, saved: Path) -> None:
    refused(shell("vm-restore no.qmp < s", work), 1, "no guest at no.qmp: No such file")
    guest = guests.waiting()
    guest.end()
    refused(shell("vm-restore b.qmp < s", work), 1, "nobody listens")


def test_a_terminal_as_input(guests: Guests, work: Path) -> None:
    guest = guests.waiting()
    done = shell("script -qec 'vm-restore b.qmp' /dev/null", work)
    assert done.status == 2
    assert "standard input is a terminal" in done.text
    still_waits(guest)


def test_paused_and_run(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting()
    done = shell("vm-restore --paused b.qmp < s", work)
    assert (done.status, done.out) == (0, b"")
    assert guest.status() == "paused"
    assert shell("vm-cont b.qmp", work).status == 0
    assert guest.running()
    assert shell("vm-dump -q --stop b.qmp > t", work).status == 0
    third = guests.waiting("c")
    assert shell("vm-restore --run c.qmp < t", work).text == "52:54:00:00:00:01 -\n"
    assert third.running()
    assert shell("vm-restore --run --paused c.qmp < t", work).status == 2


def test_a_paused_guest_arrives_paused(guests: Guests, work: Path) -> None:
    source = guests.running()
    assert shell("vm-stop a.qmp", work).status == 0
    stood = source.count() or 0
    guest = guests.waiting()
    done = shell("vm-dump a.qmp | vm-restore b.qmp", work)
    assert done.status == 0
    assert guest.status() == "paused"
    assert shell("vm-cont b.qmp", work).status == 0
    went_on(stood, guest)


def test_nothing_is_left_switched_on(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting()
    assert shell("vm-restore b.qmp < s", work).status == 0
    as_it_was(guest)
    assert guest.cmd("query-migrate-parameters")["announce-rounds"] == 5


@pytest.mark.parametrize("form", ["zstd -q -c", "gzip -1 -c", "bzip2 -1 -c", "xz -0 -c", "vm-compress"])
def test_a_packed_state_is_taken_as_it_is(guests: Guests, work: Path, form: str) -> None:
    guests.dumped(work / "s", **SMALL)
    guest = guests.waiting(**SMALL)
    done = shell(f"{form} < s > packed; vm-restore b.qmp < packed", work)
    assert (done.status, done.err) == (0, "")
    assert guest.running()


def test_a_cut_packed_state(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting()
    refused(shell("vm-compress < s > z; truncate -s -10 z; vm-restore b.qmp < z", work), 3, "truncated|not whole")
    assert guest.count() is None


def test_a_save_file_of_libvirt(guests: Guests, work: Path, saved: Path) -> None:
    """Its header: magic, version 2, length of the XML, was running, format (0: raw), offset of the cookie, padding."""
    guest = guests.waiting()
    xml = b"<domain type='qemu'><name>x</name></domain>\0"
    header = b"LibvirtQemudSave" + b"".join(n.to_bytes(4, "little") for n in (2, len(xml), 1, 0, 0)) + bytes(56)
    Path(work, "libvirt").write_bytes(header + xml + saved.read_bytes())
    assert shell("vm-restore b.qmp < libvirt", work).status == 0
    assert guest.running()


def test_from_counts_every_stage(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting()
    done = shell("vm-restore --from 'cat s; exit 3' b.qmp", work)
    refused(done, 1, "the source 'cat s; exit 3' ended with status 3")
    assert guest.count() is None
    assert guest.status() != "running"
    guest.end()
    guest = guests.waiting("c")
    assert shell("vm-restore --from 'zstd -q -c s | zstd -q -dc' c.qmp", work).status == 0
    assert guest.running()


def test_starting_the_guest(guests: Guests, work: Path, saved: Path) -> None:
    guest = Guest(work, "c")
    done = shell(f"vm-restore -- {' '.join(quoted(guest.args))} < s; vm-status c.qmp", work)
    try:
        assert done.status == 0, done.err
        assert done.text.startswith("52:54:00:00:00:01 -\n")
        assert "c.qmp: runs" in done.text
        guest.wait_advance()
    finally:
        shell(f"pkill -9 -f '{work}/c[.]qmp'", work)


def test_starting_the_guest_without_a_monitor_of_its_own(guests: Guests, work: Path, saved: Path) -> None:
    args = Guest(work, "c").args
    keep = [a for i, a in enumerate(args) if a != "-qmp" and args[i - 1] != "-qmp"]
    done = shell(f"XDG_RUNTIME_DIR={work} vm-restore -- {' '.join(quoted(keep))} < s", work)
    try:
        assert done.status == 0, done.err
        found = re.search(r"the guest's monitor is (\S+)", done.err)
        assert found
        assert "runs" in shell(f"vm-status {found[1]}", work).text
    finally:
        shell(f"pkill -9 -f '{work}/c[.]serial'", work)


@pytest.mark.parametrize(
    "wrong", ["-nographic", "-serial stdio", "-serial mon:stdio", "-monitor stdio", "-daemonize", "-incoming tcp:0:1"]
)
def test_what_cannot_be_among_the_arguments(work: Path, wrong: str) -> None:
    done = shell(f"echo | vm-restore -- qemu-system-x86_64 -M q35 {wrong}", work)
    assert done.status == 2, done.err


def test_a_qemu_that_does_not_start(guests: Guests, work: Path, saved: Path) -> None:
    done = shell("vm-restore -- qemu-system-x86_64 -M nonsense -qmp unix:x.qmp,server,nowait < s", work)
    refused(done, 1, "QEMU did not start: .*unsupported machine type")
    assert not Path(work, "x.qmp").exists()
    before = set(work.iterdir())
    done = shell(f"XDG_RUNTIME_DIR={work} vm-restore -- no-such-qemu < s", work)
    refused(done, 1, "cannot start no-such-qemu")
    assert set(work.iterdir()) == before


def test_a_running_guests_monitor_is_not_taken_away(guests: Guests, work: Path, saved: Path) -> None:
    source = guests.running("d")
    done = shell("vm-restore -- qemu-system-x86_64 -M q35 -qmp unix:d.qmp,server,nowait < s", work)
    refused(done, 1, "d.qmp is the monitor of a running guest")
    as_it_was(source)
    assert shell("vm-status d.qmp", work).status == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle_the_guest_never_runs(
    guests: Guests, work: Path, saved: Path, number: signal.Signals
) -> None:
    guest = guests.waiting()
    script = "(head -c 60000000 s; sleep 100) | vm-restore b.qmp"
    restore = subprocess.Popen(["bash", "-c", script], cwd=work, start_new_session=True)
    try:
        until(lambda: guest.cmd("query-migrate").get("status") == "active", 20, "it loads")
        time.sleep(0.3)
        os.killpg(restore.pid, number)
        restore.wait(20)
    finally:
        if restore.poll() is None:
            os.killpg(restore.pid, signal.SIGKILL)
            restore.wait(10)
    until(lambda: not guest.alive() or guest.status() == "inmigrate", 20, "it has not run")
    assert guest.count() is None


@pytest.mark.parametrize("reader", ["| true", "> /dev/full"])
def test_nobody_takes_the_lines_of_a_guest_that_runs(guests: Guests, work: Path, saved: Path, reader: str) -> None:
    """A failure now could have the source run on as well."""
    guest = guests.waiting()
    done = shell(f"vm-restore b.qmp < s {reader}", work)
    assert done.status == 0, done.err
    assert guest.running()


def test_killed_when_the_guest_is_loaded_and_held(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting()
    restore = subprocess.Popen(["vm-restore", "b.qmp"], cwd=work, stdin=saved.open("rb"))
    try:
        until(lambda: guest.cmd("query-migrate").get("status") in ("active", "completed"), 20, "it loads")
        restore.kill()
    finally:
        restore.kill()
        restore.wait(10)

    def settled() -> bool:
        # 7.2 ends over a failed load, perhaps while it is asked; 10.0 stays with it.
        try:
            ended = not guest.alive() or guest.cmd("query-migrate").get("status") == "failed"
        except OSError:
            return False
        return ended or guest.status() in ("paused", "running")

    until(settled, 20, "it has loaded, or failed to")
    if guest.alive() and guest.status() == "paused":
        assert "is held" in shell("vm-status b.qmp", work).text
        assert shell("vm-cont b.qmp", work).status == 0
        assert guest.running()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_qemu_that_was_started(guests: Guests, work: Path, saved: Path, number: int) -> None:
    args = " ".join(quoted(Guest(work, "c").args))
    script = f"(head -c 60000000 s; sleep 100) | exec vm-restore -- {args}"
    restore = subprocess.Popen(["bash", "-c", script], cwd=work, start_new_session=True)
    try:
        until(lambda: alive(work, "c"), 20, "QEMU runs")
        time.sleep(1)
        os.killpg(restore.pid, number)
        restore.wait(20)
    finally:
        if restore.poll() is None:
            os.killpg(restore.pid, signal.SIGKILL)
            restore.wait(10)
    until(lambda: not alive(work, "c"), 20, "QEMU has ended")


def test_json(guests: Guests, work: Path, saved: Path) -> None:
    guests.waiting()
    done = shell("vm-restore --json b.qmp < s", work)
    result = json.loads(done.out)
    assert result["state"] == "running"
    assert result["nics"] == [{"mac": "52:54:00:00:00:01", "iface": None, "addresses": []}]
    assert result["bytes"] == saved.stat().st_size


def test_a_monitor_held_by_another(guests: Guests, work: Path, saved: Path) -> None:
    guest = guests.waiting()
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(guest.qmp)
        started = time.monotonic()
        refused(shell("vm-restore b.qmp < s", work), 1, "another client holds it")
        assert time.monotonic() - started < 30
    still_waits(guest)
    assert shell("vm-restore b.qmp < s", work).status == 0


def announcements(wire: socket.socket, seconds: float) -> int:
    """How many RARP frames a guest's card sends within a time."""
    end = time.monotonic() + seconds
    found = 0
    while (left := end - time.monotonic()) > 0:
        wire.settimeout(left)
        try:
            found += wire.recv(2048)[12:14] == b"\x80\x35"
        except TimeoutError:
            break
    return found


@pytest.mark.parametrize("how", ["vm-restore b.qmp < s", "vm-restore -q --paused b.qmp < s; vm-cont b.qmp"])
def test_the_guest_announces_itself_once_it_runs(guests: Guests, work: Path, saved: Path, how: str) -> None:
    """QEMU's one packet, then five rounds of ours, and none while it is held."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
        wire.bind(str(work / "b.wire"))
        guests.waiting()
        assert shell(how, work).status == 0
        assert announcements(wire, 2) == 1 + 5


@pytest.mark.root
def test_a_guest_started_in_another_network(guests: Guests, work: Path, saved: Path) -> None:
    """`-- COMMAND` may be one that starts QEMU elsewhere."""
    args = quoted(Guest(work, "c").args)
    done = shell(f"vm-restore -- unshare --net {' '.join(args)} < s; vm-status c.qmp", work)
    try:
        assert done.status == 0, done.err
        assert "c.qmp: runs" in done.text
    finally:
        shell(f"pkill -9 -f '{work}/c[.]qmp'", work)
