"""vm-migrate: from one QEMU to another, and what becomes of the source where that fails."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Guests, shell
from vm import Guest, until

from guest.judge import as_it_was, same_memory, went_on
from guest.test_control import sent

MIB = 1 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def target(work: Path, kind: str) -> str:
    return f"unix:{work}/b.sock" if kind == "unix" else f"tcp:127.0.0.1:{free_port()}"


@contextlib.contextmanager
def migrating(work: Path, source: Guest, uri: str, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A move that is under way."""
    move = subprocess.Popen(["vm-migrate", *options, "a.qmp", uri], cwd=work, stderr=subprocess.PIPE)
    try:
        until(lambda: sent(source) > MIB, 20, "under way")
        yield move
    finally:
        move.kill()
        move.communicate(timeout=10)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_guest_is_moved(guests: Guests, work: Path, kind: str) -> None:
    source, uri = guests.running(), target(work, kind)
    there = guests.start("b", incoming=uri)
    # QEMU may have another working directory than we.
    done = shell(f"vm-migrate a.qmp {'unix:b.sock' if kind == 'unix' else uri}", work)
    assert (done.status, done.out, done.err) == (0, b"", "")
    count = source.counts()[-1]
    assert source.status() == "postmigrate"
    went_on(count, there)
    assert not [c for c in source.cmd("query-migrate-capabilities") if c["state"]]

    # It runs there, so it must not run here.
    done = shell("vm-status a.qmp", work)
    assert "a.qmp: was moved and stands paused here\nnext: vm-cont --force a.qmp" in done.out.decode()
    done = shell("vm-cont a.qmp", work)
    assert done.status == 5
    assert "a.qmp was moved, and is where it was sent to" in done.err
    assert "vm-cont --force a.qmp" in done.err
    assert (source.status(), there.status()) == ("postmigrate", "running")
    there.end()
    assert shell("vm-cont --force a.qmp", work).status == 0
    source.wait_advance()
    # From now on it is like any other.
    assert shell("vm-stop a.qmp && vm-cont a.qmp", work).status == 0


def test_a_paused_guest_arrives_paused(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.start("b", incoming=target(work, "unix"))
    source.wait_sum()
    source.cmd("stop")
    assert shell("vm-migrate a.qmp unix:b.sock", work).status == 0
    assert there.wait_status("paused")
    there.cmd("cont")
    same_memory(source, there)


def test_the_options(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.start("b", incoming=target(work, "unix"))
    there.cmd("migrate-set-capabilities", capabilities=[{"capability": "xbzrle", "state": True}])
    options = "--after quit --speed 300m --downtime 200 --auto-converge --xbzrle --timeout 60 --max-rounds 500"
    done = shell(f"vm-migrate --json {options} a.qmp unix:b.sock", work)
    assert done.status == 0, done.err
    values = json.loads(done.out)
    assert (values["type"], values["state"], values["uri"]) == ("result", "gone", f"unix:{work}/b.sock")
    assert values["bytes"] > MIB
    assert values["downtime_ms"] >= 0
    went_on(source.counts()[-1], there)
    until(lambda: not Path(work, "a.qmp").exists() or shell("vm-status a.qmp", work).status == 1, 20, "the end of it")


def test_a_descriptor_of_two_directions(guests: Guests, work: Path) -> None:
    source, uri = guests.running(), target(work, "tcp")
    there = guests.start("b", incoming=uri)
    done = shell(f"vm-migrate a.qmp fd:3 3<>/dev/tcp/127.0.0.1/{uri.split(':')[-1]}", work)
    assert (done.status, done.err) == (0, "")
    went_on(source.counts()[-1], there)


def test_a_descriptor_of_one_direction(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-migrate a.qmp fd:3 3>&1 >/dev/null | cat > s; vm-verify s", work)
    assert done.status == 0, done.err
    assert done.err == (
        "vm-migrate: warning: fd:3 has one direction only: whether the guest arrives is not known here\n"
    )
    assert source.status() == "postmigrate"


def test_into_a_command(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-migrate a.qmp 'exec:cat > s; exit 3'", work)
    assert done.status == 1
    assert "ended with status 3; the guest runs on" in done.err
    as_it_was(source)
    done = shell("vm-migrate -v a.qmp 'exec:zstd -q -c > s.zst' && zstd -qdc s.zst | vm-verify", work)
    assert done.status == 0, done.err
    assert source.status() == "postmigrate"
    # A file is no guest that runs.
    assert shell("vm-cont a.qmp", work).status == 0


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_nobody_listens(guests: Guests, work: Path, kind: str) -> None:
    source = guests.running()
    done = shell(f"vm-migrate a.qmp {target(work, kind)}", work)
    assert done.status == 1
    assert done.err.startswith("vm-migrate: error: the guest was not moved: ")
    assert "Failed to connect" in done.err
    assert done.err.endswith("; the guest runs on\n")
    as_it_was(source)
    assert shell("vm-stop a.qmp && vm-cont a.qmp", work).status == 0


def test_another_machine(guests: Guests, work: Path) -> None:
    """QEMU's own migrate says `completed` where the destination dies of it, unless it is asked for the way back."""
    source = guests.running()
    guests.start("b", incoming=target(work, "unix"), kind="metal", mem=64)
    done = shell("vm-migrate a.qmp unix:b.sock", work)
    assert done.status == 1
    assert "; the guest runs on" in done.err
    as_it_was(source)


def test_the_destination_dies(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.start("b", incoming=target(work, "unix"))
    with migrating(work, source, "unix:b.sock", "--speed", "20m") as move:
        there.end()
        _, err = move.communicate(timeout=30)
    assert move.returncode == 1
    assert err.decode().endswith("; the guest runs on\n")
    as_it_was(source)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels(guests: Guests, work: Path, number: signal.Signals) -> None:
    source = guests.running()
    guests.start("b", incoming=target(work, "unix"))
    with migrating(work, source, "unix:b.sock", "--speed", "20m") as move:
        move.send_signal(number)
        move.communicate(timeout=30)
    assert move.returncode == -number
    as_it_was(source)


@pytest.mark.parametrize("arrived", [True, False])
def test_a_signal_in_the_last_step(guests: Guests, work: Path, arrived: bool) -> None:
    """The other side has everything, and may run the guest already; here its word is still on the way."""
    source = guests.running()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(work / "b.sock"))
        listener.listen()
        taker = threading.Thread(target=take_all, args=(listener, ends := []))
        taker.start()
        with migrating(work, source, "unix:b.sock") as move:
            source.wait_status("finish-migrate")
            there = ends[0]
            move.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                move.wait(1)
            assert source.status() == "finish-migrate"
            if arrived:
                # The return path's SHUT with 0: it has the whole state.
                there.sendall(bytes((0, 1, 0, 4, 0, 0, 0, 0)))
            there.shutdown(socket.SHUT_RDWR)
            _, err = move.communicate(timeout=30)
            taker.join(10)
            there.close()
    if arrived:
        assert move.returncode == 5, err
        assert b"a signal came; but the guest had arrived before" in err
        assert source.status() == "postmigrate"
    else:
        assert move.returncode == -signal.SIGTERM, err
        as_it_was(source)


def take_all(listener: socket.socket, ends: list[socket.socket]) -> None:
    there = listener.accept()[0]
    ends.append(there)
    while there.recv(1 << 20):
        pass


def test_vm_cancel_ends_it(guests: Guests, work: Path) -> None:
    source = guests.running()
    guests.start("b", incoming=target(work, "unix"))
    with migrating(work, source, "unix:b.sock", "--speed", "20m") as move:
        assert shell("vm-cancel a.qmp", work).status == 0
        _, err = move.communicate(timeout=30)
    assert (move.returncode, err) == (1, b"vm-migrate: error: the migration was cancelled; the guest runs on\n")
    as_it_was(source)


@pytest.mark.parametrize("option", [("--timeout", "1"), ("--max-rounds", "1")])
def test_it_takes_too_long(guests: Guests, work: Path, option: tuple[str, str]) -> None:
    source = guests.running()
    guests.start("b", incoming=target(work, "unix"))
    done = shell(f"vm-migrate --speed 10m --downtime 1 {' '.join(option)} a.qmp unix:b.sock", work)
    assert done.status == 1, done.err
    assert "the move " in done.err
    assert "; the guest runs on\n" in done.err
    assert "hint: a higher --downtime, --auto-converge or vm-speed may help" in done.err
    as_it_was(source)


def test_it_is_killed_and_qemu_goes_on(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.start("b", incoming=target(work, "unix"))
    with migrating(work, source, "unix:b.sock", "--speed", "20m") as move:
        os.kill(move.pid, signal.SIGKILL)
        move.wait(10)
        assert "while its state is being sent" in shell("vm-status a.qmp", work).out.decode()
    assert shell("vm-speed a.qmp 0", work).status == 0
    assert source.wait_status("postmigrate")
    went_on(source.counts()[-1], there)
    assert shell("vm-cont a.qmp", work).status == 5
    # What it leaves to its guard is restored when QEMU has done.
    until(lambda: "left over" not in shell("vm-status a.qmp", work).text, 20, "the settings are restored")
    assert not [c for c in source.cmd("query-migrate-capabilities") if c["state"]]


def test_detached_and_watched(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.start("b", incoming=target(work, "unix"))
    done = shell("vm-migrate -d --speed 40m a.qmp unix:b.sock", work)
    assert (done.status, done.err) == (0, "vm-migrate: hint: to see how far it is: vm-status a.qmp\n")
    assert source.cmd("query-migrate")["status"] in ("setup", "active")
    done = shell("vm-status --watch a.qmp", work)
    assert done.status == 0, done.err
    assert "%, " in done.err
    assert "/s dirtied" in done.err
    assert done.out.decode().startswith("a.qmp: was moved and stands paused here\n")
    went_on(source.counts()[-1], there)


def test_the_next_dump_is_no_move(guests: Guests, work: Path) -> None:
    """A mark that a killed move has left does not stay on a guest that runs."""
    source = guests.running()
    source.cmd("object-add", **{"qom-type": "secret", "id": "vmstate-moved", "data": "moved"})
    assert shell("vm-dump -q -o s a.qmp && vm-cont a.qmp", work).status == 0
    assert source.running()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a.qmp tcp:nowhere", "'tcp:nowhere' is no place to move a guest to"),
        (
            "a.qmp /b.sock",
            "expected tcp:HOST:PORT, unix:PATH, fd:N, exec:COMMAND, link:COMMAND or ssh://[USER@]HOST/GUEST",
        ),
        ("a.qmp unix:", "is no place"),
        ("a.qmp fd:x", "is no place"),
        ("a.qmp fd:77", "fd:77: bad file descriptor"),
        ("--after running a.qmp unix:b", "--after: expected paused or quit, found 'running'"),
        ("--timeout 0 a.qmp unix:b", "--timeout: expected a whole number above 0"),
        ("--speed fast a.qmp unix:b", "--speed: 'fast' is no rate"),
        ("--after quit a.qmp fd:1", "could end the only whole copy"),
        ("-d --after quit a.qmp unix:b", "with -d nobody stays"),
        ("-d a.qmp exec:cat", "exec: does not go with -d"),
        ("--xbzrle a.qmp exec:cat", "exec: does not go with"),
    ],
)
def test_wrong_usage(work: Path, words: str, said: str) -> None:
    done = shell(f"vm-migrate {words}", work)
    assert done.status == 2, done.err
    assert said in done.err


def test_one_that_cannot_be_moved(guests: Guests, work: Path) -> None:
    guests.waiting("b")
    done = shell("vm-migrate b.qmp unix:c.sock", work)
    assert done.status == 1
    assert "b.qmp waits for a state" in done.err
