"""What every command has in common: one table, no guest that runs."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Done, Guests, run, shell
from unit.streams import state

COMMANDS = sorted(path.name for path in (ROOT / "bin").glob("vm-*"))
OF_A_GUEST = ["vm-cancel", "vm-cont", "vm-dump", "vm-migrate", "vm-restore", "vm-speed", "vm-status", "vm-stop"]
# What makes a pure filter work, in both directions.
PACK = ("vm-compress",)
UNPACK = ("vm-compress", "-d")
LOCK = ("vm-encrypt", "-r", "me@example.org")
UNLOCK = ("vm-encrypt", "-d")
PASS = ("vm-verify", "--pass")
FILTERS = [PACK, UNPACK, LOCK, UNLOCK, PASS]
# What reads a state and answers in words.
READERS = [("vm-verify",), ("vm-inspect",)]
# Enough of a state for a command to look for the guest that it is for; no guest is of this machine type.
HEAD = b"QEVM\0\0\0\3\7\0\0\0\7nothing\1\0\0\0\2\3ram\0\0\0\0\0\0\0\4\0\0\0\0\0\0\0\4"

LINE = re.compile(r"vm-[a-z]+: (error|warning|hint|note): (?![A-Z][a-z]).*[^.\n]")
HEAVY = {"asyncio", "gnupg", "numpy", "tqdm", "xxhash", "zstandard"}


def well_said(done: Done, command: str) -> Done:
    """Every line of standard error keeps to the grammar and is the command's own."""
    for line in done.err.splitlines():
        assert LINE.fullmatch(line), line
        assert line.startswith(f"{command}: ")
    return done


def refused(done: Done, command: str, status: int, *words: str) -> Done:
    well_said(done, command)
    assert done.status == status, done.err
    assert done.err.startswith(f"{command}: error: ")
    assert done.out == b""
    for word in words:
        assert word in done.err
    return done


def words_for(command: str, *guest: str) -> list[str]:
    return [command, *guest, *{"vm-speed": ["1g"], "vm-migrate": ["tcp:127.0.0.1:1"]}.get(command, [])]


def input_for(command: str) -> dict[str, bytes]:
    return {"input": HEAD} if command == "vm-restore" else {}


def name_of(command: tuple[str, ...]) -> str:
    return " ".join(command)


@pytest.fixture(scope="module")
def samples(gnupg: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """For each filter a file that it likes, and whose result is larger than any pipe."""
    folder = tmp_path_factory.mktemp("samples")
    plain = folder / "plain"
    plain.write_bytes(os.urandom(24 << 20))
    found = {PACK: folder / "state", LOCK: plain, PASS: folder / "state"}
    found[PASS].write_bytes(with_pages(state("pc-7.2"), 6 << 10))
    for back, there in ((UNPACK, PACK), (UNLOCK, LOCK)):
        found[back] = folder / there[0]
        assert run(*there, "-q", "-o", found[back], found[there]).status == 0
    return found


def with_pages(content: bytes, count: int) -> bytes:
    """A state with a section of RAM more, in which the first page is sent `count` times, each time another."""
    end_of_body = b"\0\0\0\0\0\0\0\x10"
    at = content.index(end_of_body + b"\x7e") + 13
    number = content[at - 4 : at]
    body = b"".join(b"\0\0\0\0\0\0\0\x08\6pc.ram" + os.urandom(4096) for _ in range(count))
    return content[:at] + b"\2" + number + body + end_of_body + b"\x7e" + number + content[at:]


@pytest.fixture
def terminal() -> Iterator[int]:
    ours, theirs = pty.openpty()
    yield theirs
    os.close(ours)
    os.close(theirs)


# What each one says about itself


def test_the_table_is_whole() -> None:
    assert {*OF_A_GUEST, "vm-announce", *(command[0] for command in FILTERS + READERS)} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_version(command: str) -> None:
    for option in ("--help", "-h"):
        done = run(command, option)
        assert (done.status, done.err) == (0, "")
        assert f"\nUsage:\n  {command} " in done.text
    done = run(command, "--version")
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(rf"{command} \(vmstate\) \d+\.\d+\.\d+\n", done.text)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command: str) -> None:
    done = run(sys.executable, "-X", "importtime", ROOT / "bin" / command, "--help")
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.err.splitlines()}
    assert done.status == 0
    assert "docopt" in imported
    assert not imported & HEAVY


# Wrong usage


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option(command: str) -> None:
    done = refused(run(command, "--nonsense"), command, 2, "--nonsense", f"hint: {command} --help")
    assert f"{command}: hint: {command} [" in done.err
    refused(run(command, "-q", "-%"), command, 2, "there is no option -%")


@pytest.mark.parametrize("command", COMMANDS)
def test_too_many_operands(command: str) -> None:
    refused(run(command, *["x"] * 3), command, 2, "wrong usage" if command != "vm-announce" else "x")


@pytest.mark.parametrize("command", COMMANDS)
def test_json_errors_are_one_object_a_line(command: str) -> None:
    for wrong in ([command, "--json", "--nonsense"], [command, "--json", "-v", "-v", "a", "b", "c"]):
        done = run(*wrong)
        (found,) = [json.loads(line) for line in done.err.splitlines()]
        assert (done.status, found["status"], done.out) == (2, 2, b"")
        assert (found["vmstate"], found["type"], found["command"]) == (1, "error", command)
        assert found["message"]
        assert f"{command} --help" in found["hints"]


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_gives_no_hints(command: str) -> None:
    done = refused(run(command, "-q", "--nonsense"), command, 2)
    assert len(done.err.splitlines()) == 1
    assert "hint" not in done.err


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("vm-dump", "--speed", "fast", "a"), "fast"),
        (("vm-dump", "--downtime", "x", "a"), "milliseconds"),
        (("vm-dump", "--downtime=-1", "a"), "-1"),
        (("vm-dump", "--after", "lunch", "a"), "lunch"),
        (("vm-dump", "--to", "cat", "-o", "f", "a"), "--output"),
        (("vm-dump", "--after", "quit", "a"), "--to"),
        (("vm-restore", "--run", "--paused", "a"), "--paused"),
        (("vm-restore", "--", "qemu", "-nographic"), "-nographic"),
        (("vm-restore", "--", "qemu", "-serial", "stdio"), "stdio"),
        (("vm-restore", "--on-demand", "a"), "--on-demand goes with --lazy"),
        (("vm-restore", "--record", "f", "a"), "--record goes with --lazy"),
        (("vm-restore", "--prefetch", "f", "a"), "--prefetch goes with --lazy"),
        (("vm-restore", "--detach", "a"), "--detach goes with --lazy"),
        (("vm-restore", "--force-unmarked", "a"), "--force-unmarked goes with"),
        (("vm-restore", "--lazy", "--force-unmarked", "a"), "--force-unmarked goes with --resume"),
        (("vm-restore", "--lazy", "--log", "f", "a"), "--log goes with --detach"),
        (("vm-restore", "--lazy", "--from", "cat f", "a"), "--from does not go with --lazy"),
        (("vm-restore", "--lazy", "--receive", "a"), "--receive does not go with --lazy"),
        (("vm-restore", "--lazy", "--through", "cat", "a"), "--through does not go with --lazy"),
        (("vm-restore", "--lazy", "--run", "--paused", "a"), "--paused"),
        (("vm-restore", "--lazy", "--detach", "--", "qemu"), "--detach needs the path"),
        (("vm-restore", "--resume", "--run", "a"), "--resume is for a guest that is there"),
        (("vm-restore", "--resume", "--paused", "a"), "--resume is for a guest that is there"),
        (("vm-restore", "--resume", "--", "qemu"), "--resume is for a guest that is there"),
        (("vm-restore", "--lazy", "--stdio"), "wrong usage"),
        (("vm-compress", "--level", "20"), "--level"),
        (("vm-compress", "-T", "x"), "--threads"),
        (("vm-compress", "-d", "-3"), "-d"),
        (("vm-encrypt",), "-r KEY"),
        (("vm-verify", "-o", "f"), "--pass"),
        (("vm-inspect", "--device", "cpu", "--diff", "f"), "--diff"),
        (("vm-announce", "--rounds", "0"), "--rounds"),
        (("vm-announce", "52:54:00:12:34:56"), "IFACE"),
    ],
)
def test_wrong_values(command: tuple[str, ...], word: str) -> None:
    refused(run(*command), command[0], 2, word)


# GUEST


# VM_GUEST stands for a guest where that is the only operand, or the first of two that cannot be mistaken.
@pytest.mark.parametrize("command", [command for command in OF_A_GUEST if command != "vm-migrate"])
def test_no_guest_given(command: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "VM_GUEST"}
    refused(run(*words_for(command), env=environment), command, 2, "no guest given", "VM_GUEST")


@pytest.mark.parametrize("command", OF_A_GUEST)
def test_no_guest_there(command: str, work: Path) -> None:
    (work / "file").write_text("no socket\n")
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(work / "nobody.qmp"))
    for path in ("absent.qmp", "file", ".", "nobody.qmp", "x" * 200):
        done = run(*words_for(command, path), cwd=work, **input_for(command))
        refused(done, command, 1, f"no guest at {path}")
    assert "QMP socket" in done.err


@pytest.mark.parametrize("command", OF_A_GUEST)
def test_the_guest_ends_in_the_middle(command: str, work: Path) -> None:
    with socket.socket(socket.AF_UNIX) as guest:
        guest.bind(str(work / "a.qmp"))
        guest.listen()

        def hang_up() -> None:
            for _ in range(2):
                with guest.accept()[0] as client:
                    client.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\n')

        threading.Thread(target=hang_up, daemon=True).start()
        done = run(*words_for(command, "a.qmp"), cwd=work, **input_for(command))
        refused(done, command, 1, "a.qmp went away")


@pytest.mark.guest
def test_a_monitor_that_another_client_holds(guests: Guests, work: Path) -> None:
    guests.waiting("a", kind="metal")
    started = time.monotonic()
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(work / "a.qmp"))
        found: dict[str, Done] = {}

        def ask(command: str) -> None:
            found[command] = run(*words_for(command, "a.qmp"), cwd=work, **input_for(command))

        threads = [threading.Thread(target=ask, args=(command,)) for command in OF_A_GUEST]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert time.monotonic() - started < 5 + len(OF_A_GUEST)
    for command in OF_A_GUEST:
        refused(found[command], command, 1, "a.qmp does not answer: another client holds it", "second -qmp")


@pytest.mark.guest
def test_one_that_is_asked_alone_waits_for_five_seconds(guests: Guests, work: Path) -> None:
    guests.waiting("a", kind="metal")
    with socket.socket(socket.AF_UNIX) as holder:
        holder.connect(str(work / "a.qmp"))
        started = time.monotonic()
        refused(run("vm-status", "a.qmp", cwd=work), "vm-status", 1, "another client holds it")
        assert 4 < time.monotonic() - started < 7


@pytest.mark.guest
def test_a_waiting_guest_by_name_and_by_variable(guests: Guests, work: Path) -> None:
    """What cannot be done with it is said alike, and it waits on."""
    guest = guests.waiting("a", kind="metal")
    wanted = {"vm-cancel": 1, "vm-cont": 1, "vm-dump": 1, "vm-restore": 4, "vm-stop": 1}
    for command, status in wanted.items():
        by_name = run(command, "a.qmp", cwd=work, **input_for(command))
        by_variable = run(command, cwd=work, env={**os.environ, "VM_GUEST": "a.qmp"}, **input_for(command))
        refused(by_name, command, status, "a.qmp")
        assert by_name == by_variable
    done = run("vm-status", cwd=work, env={**os.environ, "VM_GUEST": "a.qmp"})
    assert (done.status, done.err) == (0, "")
    assert done.text.startswith("a.qmp: waits for a state\n")
    assert run("vm-status", "a.qmp", cwd=work, env={**os.environ, "VM_GUEST": "b.qmp"}) == done
    assert guest.status() == "inmigrate"


@pytest.mark.guest
def test_stop_and_cont(guests: Guests, work: Path) -> None:
    guest = guests.start("a", kind="metal")
    for command, word in (("vm-stop", "paused"), ("vm-cont", "running")):
        assert run(command, "a.qmp", cwd=work) == Done(0, b"", "")
        assert guest.status() == word
        # Once more does no harm.
        done = run(command, "-v", "a.qmp", cwd=work)
        assert (done.status, done.err) == (0, f"{command}: note: the guest is '{word}'\n")
        answer = json.loads(run(command, "--json", "a.qmp", cwd=work).out)
        assert (answer["type"], answer["status"], answer["guest"], answer["state"]) == ("result", 0, "a.qmp", word)
        assert word in run("vm-status", "--json", "a.qmp", cwd=work).text


@pytest.mark.guest
def test_an_answer_that_cannot_be_written(guests: Guests, work: Path) -> None:
    guests.start("a", kind="metal")
    for command in (["vm-status"], ["vm-dump", "-n"]):
        with open("/dev/full", "wb") as full:
            done = run(*command, "a.qmp", cwd=work, stdout=full)
        assert done.status == 1
        assert "No space left on device" in done.err


@pytest.mark.guest
@pytest.mark.parametrize("where", [">&-", "> /dev/full", "| true", "<&- >&- 2>&-", "> /dev/full 2>&1"])
def test_a_deed_is_done_though_its_words_go_nowhere(guests: Guests, work: Path, where: str) -> None:
    guest = guests.start("a", kind="metal")
    for command, word in (("vm-stop", "paused"), ("vm-cont", "running")):
        for option in ("", "-v", "--json"):
            done = shell(f"{command} {option} a.qmp {where}", work)
            assert (done.status, "error" in done.err) == (0, False), done.err
            assert guest.status() == word
    assert shell(f"vm-speed --json a.qmp 1g {where}", work).status == 0


# Terminals


@pytest.mark.parametrize("command", FILTERS, ids=name_of)
def test_a_state_is_not_written_to_a_terminal(command: tuple[str, ...], terminal: int, gnupg: Path) -> None:
    done = run(*command, input=b"x", stdout=terminal)
    refused(done, command[0], 2, "standard output is a terminal", "hint: redirect it: > FILE, or | COMMAND")


@pytest.mark.guest
def test_a_dump_is_not_written_to_a_terminal(guests: Guests, work: Path, terminal: int) -> None:
    guest = guests.start("a", kind="metal")
    done = run("vm-dump", "a.qmp", cwd=work, stdout=terminal)
    refused(done, "vm-dump", 2, "standard output is a terminal")
    assert guest.status() == "running"
    assert guest.cmd("query-migrate") == {}
    assert run("vm-dump", "-q", "-o", "s", "a.qmp", cwd=work, stdout=terminal).status == 0
    assert run("vm-cont", "a.qmp", cwd=work, stdout=terminal).status == 0
    assert run("vm-dump", "-q", "--to", "cat > s2", "a.qmp", cwd=work, stdout=terminal).status == 0


@pytest.mark.parametrize(
    "command",
    [*FILTERS, *READERS, ("vm-restore", "a.qmp"), ("vm-restore", "--lazy", "a.qmp"), ("vm-announce",)],
    ids=name_of,
)
def test_nothing_is_read_from_a_terminal(command: tuple[str, ...], terminal: int, gnupg: Path) -> None:
    refused(run(*command, stdin=terminal), command[0], 2, "standard input is a terminal", "hint: ")


# Files and pipes


@pytest.mark.parametrize("command", FILTERS, ids=name_of)
def test_the_same_file_in_and_out(command: tuple[str, ...], samples: dict[tuple[str, ...], Path], work: Path) -> None:
    file = work / "f"
    content = samples[command].read_bytes()[: 1 << 20]
    file.write_bytes(content)
    (work / "alias").hardlink_to(file)
    name = command[0]
    for other in ("f", "alias"):
        refused(run(*command, "-o", other, "f", cwd=work), name, 2, "input and output are the same file")
        with file.open("rb") as source:
            refused(run(*command, "-o", other, cwd=work, stdin=source), name, 2, "the same file")
    with file.open("rb") as source, file.open("ab") as sink:
        refused(run(*command, cwd=work, stdin=source, stdout=sink), name, 2, "the same file")
    assert file.read_bytes() == content
    assert sorted(path.name for path in work.iterdir()) == ["alias", "f"]


@pytest.mark.parametrize("command", FILTERS, ids=name_of)
def test_no_such_file(command: tuple[str, ...], gnupg: Path, work: Path) -> None:
    refused(run(*command, "absent", cwd=work), command[0], 1, "cannot open absent: No such file")
    refused(run(*command, "-o", "no/where", cwd=work), command[0], 1, "cannot create no/where: No such file")
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("command", READERS, ids=name_of)
def test_nothing_to_read(command: tuple[str, ...], work: Path) -> None:
    refused(run(*command, "absent", cwd=work), command[0], 1, "cannot open absent: No such file")
    refused(run(*command), command[0], 3, "the input is empty")


@pytest.mark.parametrize("command", FILTERS, ids=name_of)
def test_a_reader_that_goes_away(command: tuple[str, ...], samples: dict[tuple[str, ...], Path]) -> None:
    process = subprocess.Popen([*command, str(samples[command])], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == b""
        assert process.wait(30) == -signal.SIGPIPE
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_of_words_that_goes_away(command: str) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    done = run(command, "--help", stdout=ours)
    os.close(ours)
    if command in OF_A_GUEST:
        # Who owns a guest never dies of it.
        refused(done, command, 1, "the reader of standard output went away")
    else:
        assert (done.status, done.err) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize("command", FILTERS, ids=name_of)
def test_no_space_left(command: tuple[str, ...], samples: dict[tuple[str, ...], Path]) -> None:
    with open("/dev/full", "wb") as full:
        done = run(*command, samples[command], stdout=full)
    refused(done, command[0], 1, "No space left on device")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_that_cannot_be_written(command: str) -> None:
    with open("/dev/full", "wb") as full:
        refused(run(command, "--help", stdout=full), command, 1, "No space left on device")


@pytest.mark.parametrize("command", FILTERS, ids=name_of)
def test_progress_goes_to_standard_error_alone(
    command: tuple[str, ...], samples: dict[tuple[str, ...], Path], work: Path
) -> None:
    content = samples[command].read_bytes()
    shown = slowly([*command, "--progress"], content)
    assert re.search(rf"^{command[0]}: .* done, .*/s$", shown.err, re.MULTILINE), shown.err
    objects = slowly([*command, "--progress", "--json"], content)
    said = {"progress", "result"} if command == PASS else {"progress"}
    assert {json.loads(line)["type"] for line in objects.err.splitlines()} == said
    silent = run(*command, "--no-progress", samples[command])
    assert (silent.status, silent.err) == (0, "")
    if command != LOCK:
        assert shown.out == objects.out == silent.out


def slowly(command: list[str], content: bytes) -> Done:
    """The input takes a second, so that there is something to show."""
    reading, writing = os.pipe()

    def feed() -> None:
        with open(writing, "wb", buffering=0) as sink:
            half = len(content) // 2
            for piece in (content[:half], content[half:]):
                view = memoryview(piece)
                while view:
                    view = view[sink.write(view) :]
                time.sleep(0.6)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        done = run(*command, stdin=reading)
    finally:
        os.close(reading)
        feeder.join(10)
    assert done.status == 0, done.err
    return done
