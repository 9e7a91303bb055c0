"""What vm-dump refuses, with the guests as they were."""

import socket
import time
from pathlib import Path

import pytest
from conftest import Done, Guests, shell

from guest.judge import as_it_was, still_waits
from guest.test_restore import SMALL


def refused(done: Done, status: int, words: str) -> None:
    assert done.status == status, done.err
    assert words in done.err
    assert done.out == b""


def test_no_such_socket(work: Path) -> None:
    refused(shell("vm-dump no.qmp | cat", work), 1, "no guest at no.qmp: No such file or directory")
    Path(work, "file").write_text("")
    refused(shell("vm-dump file | cat", work), 1, "no guest at file")


def test_nobody_listening(guests: Guests, work: Path) -> None:
    guests.running().end()
    refused(shell("vm-dump a.qmp | cat", work), 1, "nobody listens there")


def test_a_monitor_held_by_another_client(guests: Guests, work: Path) -> None:
    source = guests.running()
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(source.qmp)
        started = time.monotonic()
        refused(shell("vm-dump a.qmp | cat", work), 1, "another client holds it")
        assert time.monotonic() - started < 10
    as_it_was(source)


def test_a_guest_that_waits(guests: Guests, work: Path) -> None:
    guest = guests.waiting()
    refused(shell("vm-dump b.qmp | cat", work), 1, "waits for a state (inmigrate)")
    refused(shell("vm-stop b.qmp", work), 1, "there is nothing to stop")
    refused(shell("vm-cont b.qmp", work), 1, "it cannot run yet")
    still_waits(guest)


def test_a_guest_that_has_given_its_state_away(guests: Guests, work: Path) -> None:
    source = guests.running()
    assert shell("vm-dump -q -o s a.qmp", work).status == 0
    done = shell("vm-dump a.qmp | cat", work)
    refused(done, 1, "has given its state away and stands paused")
    assert "hint: vm-cont a.qmp, if it does not run elsewhere" in done.err
    assert source.status() == "postmigrate"
    assert shell("vm-cont a.qmp", work).status == 0
    as_it_was(source)


def test_a_device_that_cannot_be_saved(guests: Guests, work: Path) -> None:
    drive = ["-drive", "if=none,id=d0,driver=null-co,read-zeroes=on", "-device", "nvme,drive=d0,serial=x"]
    source = guests.booted(extra=drive, **SMALL)
    for mode in ("", "--stop"):
        done = shell(f"vm-dump {mode} a.qmp | cat", work)
        refused(done, 1, "cannot be saved: ")
        assert "0000:00:02.0/nvme" in done.err
    as_it_was(source)


def test_what_blocks_is_named_before_anything_is_touched(guests: Guests, work: Path) -> None:
    Path(work, "folder").mkdir()
    drive = ["-drive", f"if=virtio,format=raw,file=fat:rw:{work}/folder"]
    source = guests.booted(extra=drive, **SMALL)
    reasons = source.cmd("query-migrate")["blocked-reasons"]
    done = shell("vm-dump a.qmp | cat; vm-dump -n a.qmp", work)
    assert done.err.count(f"cannot be saved: {reasons[0]}") == 2
    as_it_was(source)


def test_a_guest_without_a_description(guests: Guests, work: Path) -> None:
    source = guests.booted(machine="q35,suppress-vmdesc=on", **SMALL)
    refused(shell("vm-dump a.qmp | cat", work), 1, "writes states without a description (suppress-vmdesc=on)")
    as_it_was(source)


def test_a_key_that_does_not_exist(guests: Guests, work: Path, gnupg: Path) -> None:
    source = guests.running()
    done = shell("vm-dump a.qmp | vm-encrypt -r nobody@example.org > s", work)
    assert done.status == 1
    assert "nobody@example.org" in done.err
    as_it_was(source)


def test_after_quit_needs_a_sink_that_is_proven(guests: Guests, work: Path) -> None:
    source = guests.running()
    assert shell("mkfifo fifo", work).status == 0
    for sink in ("| cat", "-o - a.qmp | cat", "-o /dev/null", "-o fifo"):
        done = shell(f"vm-dump --after quit {sink.replace('| cat', 'a.qmp | cat') if sink == '| cat' else sink}", work)
        assert done.status == 2, sink
        assert "could end the only whole copy" in done.err
    as_it_was(source)


def test_a_terminal(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("script -qec 'vm-dump a.qmp' /dev/null", work)
    assert done.status == 2
    assert "standard output is a terminal" in done.text
    as_it_was(source)


@pytest.mark.parametrize(
    "wrong",
    ["--speed fast", "--downtime -5", "--downtime x", "--after later", "--to cat -o s", "--nonsense", "a.qmp b.qmp"],
)
def test_wrong_usage(guests: Guests, work: Path, wrong: str) -> None:
    done = shell(f"vm-dump {wrong} a.qmp | cat", work)
    assert done.status == 2
    assert done.err.startswith("vm-dump: error: ")


def test_two_dumps_at_once(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-dump -q -o s a.qmp & a=$!; vm-dump -q -o t a.qmp & wait $a; x=$?; wait $!; echo $x $?", work)
    assert sorted(done.text.split()) == ["0", "1"], done.err
    assert source.status() == "postmigrate"
