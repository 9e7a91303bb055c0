"""Moves over a link: the guest runs at exactly one side, whatever dies, and at whatever moment (docs/link.md)."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Done, Guests, shell
from vm import Guest, QmpError, until
from vmstate.migrate import link as protocol

from guest.judge import as_it_was, ram, same_memory, used_up, went_on
from guest.test_migrate import MIB, migrating
from guest.test_restore import SMALL

LINK_FAULT = Path(__file__).with_name("link_fault.py")
RECEIVER = "vm-restore --receive b.qmp"


HELLO = {"version": 1, "purpose": "move", "move": "0123456789abcdef", "secret": "0" * 64}


def link(command: str = RECEIVER) -> str:
    return f"link:{command}"


def gated(kind: str, when: str, deed: str, whom: str = "-", count: int = 1) -> str:
    words = (sys.executable, LINK_FAULT, "once", kind, count, when, deed, whom, "--")
    return link(" ".join(map(str, words)) + f" {RECEIVER}")


# In the rounds of a short pause the TCG of QEMU 7.2 loses pages.
FEW_ROUNDS = ("--downtime", "300")


def move(work: Path, uri: str, *options: str) -> Done:
    few = () if "--downtime" in options else FEW_ROUNDS
    return shell(shlex.join(["vm-migrate", *few, *options, "a.qmp", uri]), work)


def test_a_guest_is_moved(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.waiting()
    done = move(work, link())
    assert (done.status, done.out, done.err) == (0, b"", "")
    assert source.status() == "postmigrate"
    went_on(source.counts()[-1], there)
    for guest in (source, there):
        assert not [c for c in guest.cmd("query-migrate-capabilities") if c["state"]]
    assert there.cmd("query-migrate-parameters")["announce-rounds"] == 5

    # It runs there, so it must not run here.
    text = shell("vm-status a.qmp", work).text
    assert text.startswith("a.qmp: was moved, and has been heard to run there\nnext: vm-cont --force a.qmp")
    assert "--recover" not in text
    done = shell("vm-cont a.qmp", work)
    assert done.status == 5
    assert "a.qmp was moved, and is where it was sent to" in done.err
    done = shell("vm-migrate --recover a.qmp 'link:vm-restore --receive b.qmp'", work)
    assert (done.status, done.text) == (0, "a.qmp: the guest is on the other side, and 'running'\n")
    assert (source.status(), there.running()) == ("postmigrate", True)
    there.end()
    assert shell("vm-migrate --recover a.qmp 'link:vm-restore --receive b.qmp'", work).status == 5
    assert shell("vm-cont --force a.qmp", work).status == 0
    assert source.running()


def test_back_and_forth(guests: Guests, work: Path) -> None:
    """Each time into a new QEMU, started by the receiver."""
    source = guests.running()
    for number in range(3):
        there = guests.waiting(f"b{number}")
        shell(f"ln -sf b{number}.qmp b.qmp", work)
        shell(f"ln -sf {source.name}.qmp a.qmp", work) if number else None
        done = move(work, link(), "--after", "quit")
        assert done.status == 0, done.err
        source.wait_gone()
        assert there.running()
        source = there
    went_on(0, source) if source.counts()[0] == 0 else source.wait_sum()


def test_a_paused_guest_arrives_paused(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.waiting()
    source.wait_sum()
    source.cmd("stop")
    assert move(work, link()).status == 0
    assert (source.status(), there.status()) == ("postmigrate", "paused")
    assert shell("vm-cont b.qmp", work).status == 0
    same_memory(source, there)


def test_the_receiver_starts_the_qemu(guests: Guests, work: Path) -> None:
    source = guests.running()
    there = Guest(work, "b")
    try:
        done = move(work, link(f"vm-restore --receive -- {shlex.join(there.args)}"), "--json")
        assert done.status == 0, done.err
        values = json.loads(done.out)
        assert (values["there"], values["state"], values["type"]) == ("running", "paused", "result")
        until(lambda: "count" in (work / "b.serial").read_text(), 20, "it counts there")
        assert source.status() == "postmigrate"
    finally:
        shell(f"pkill -9 -f '{work}/b[.]qmp'", work)


@pytest.mark.parametrize("filters", ["vm-compress", "gzip -1", "vm-compress | vm-encrypt -r me@example.org"])
def test_through_filters(guests: Guests, work: Path, gnupg: Path, filters: str) -> None:
    """A guest that stands: a slow way has many rounds, in which the TCG of QEMU 7.2 loses pages of one that runs."""
    source, there = guests.running(**SMALL), guests.waiting(**SMALL)
    source.cmd("stop")
    done = move(work, link(), "--through", filters)
    assert (done.status, done.err) == (0, "")
    assert there.status() == "paused"
    assert ram(there) == ram(source)
    assert shell("vm-cont b.qmp", work).status == 0
    assert there.running()


def test_a_filter_that_the_receiver_was_told_to_undo(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.waiting()
    done = move(work, link(), "--through", "rev -0")
    assert done.status == 1
    assert "what undoes the filter 'rev' is not known here" in done.err
    assert "vm-restore --receive --through 'COMMAND' GUEST" in done.err
    as_it_was(source)
    done = move(
        work,
        link("vm-restore --receive --through 'tr A-Za-z N-ZA-Mn-za-m' b.qmp"),
        "--through",
        "tr a-zA-Z n-za-mN-ZA-M",
    )
    assert done.status == 0, done.err
    went_on(source.counts()[-1], there)


def test_a_filter_that_ends_early_is_named(guests: Guests, work: Path) -> None:
    source = guests.running()
    guests.waiting()
    done = move(work, link("vm-restore --receive --through cat b.qmp"), "--through", "head -c 300000")
    assert done.status == 1
    assert "the filter 'head -c 300000' ended before it had taken everything; the guest runs on" in done.err
    as_it_was(source)


@pytest.mark.parametrize("filters", ["head -c 3000000", "vm-compress | false", "gzip -1 | head -c 3000000"])
def test_a_filter_fails(guests: Guests, work: Path, filters: str) -> None:
    source = guests.running()
    guests.waiting()
    known = "vm-restore --receive --through cat b.qmp" if "head" in filters.split("|")[0] else RECEIVER
    known = "vm-restore --receive --through 'gzip -dc' b.qmp" if "|" in filters else known
    done = move(work, link(known), "--through", filters)
    assert done.status in (1, 3, 4), done.err
    assert "the guest runs on" in done.err
    as_it_was(source)


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("vm-restore --receive no.qmp", 1, "the other side: no guest at no.qmp"),
        ("vm-restore --receive a.qmp", 1, "does not wait for a state: it is 'running'"),
        ("exit 3", 1, "the link is lost: its command ended with status 3"),
        ("no-such-command", 1, "127 is a shell's: vm-restore is not found there"),
        ("cat", 3, "expected"),
        ("echo hello there, this is a shell", 3, "the other side does not speak as vmstate does"),
        ("vm-restore --receive c.qmp", 4, "machine"),
    ],
)
def test_what_is_refused_before_a_byte_is_sent(
    guests: Guests, work: Path, command: str, status: int, said: str
) -> None:
    source = guests.running()
    if "c.qmp" in command:
        guests.waiting("c", kind="metal", machine="pc", mem=64)
    done = move(work, link(command))
    assert done.status == status, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    as_it_was(source)


def test_a_dry_run(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.waiting()
    done = move(work, link(), "--dry-run")
    assert done.status == 0, done.err
    assert re.search(r"^about [0-9.]+ MiB to send, .* or more\n0 reasons against the move$", done.text, re.M), done.text
    as_it_was(source)
    assert there.cmd("query-migrate").get("status", "none") == "none"
    guests.waiting("c", mem=512)
    done = move(work, link("vm-restore --receive c.qmp"), "--dry-run")
    assert done.status == 4, done.text
    assert "error: RAM block 'pc.ram'" in done.text
    assert move(work, link()).status == 0


# What can happen


STEPS = [("A", "before"), ("D", "before"), ("D", "after"), ("L", "before"), ("L", "after")]
STEPS += [("G", "before"), ("G", "after"), ("N", "before")]
DEEDS = ["source", "receiver", "a", "b", "cut"]
# Thirty here, of which `make check` has each death at the decision, and two in turn at each other step; all of them,
# and hundreds at any moment, in tests/long.
FAULTS = [
    pytest.param(kind, when, deed, marks=() if kind == "G" or (at + nth) % 5 in (0, 2) else pytest.mark.more)
    for at, (kind, when) in enumerate(STEPS[1:7])
    for nth, deed in enumerate(DEEDS)
]


def runs(guest: Guest) -> bool:
    try:
        return guest.alive() and guest.status() == "running"
    except (OSError, QmpError):
        return False


def processes(work: Path, name: str) -> list[int]:
    """Those of this test: they have its folder as theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if (entry / "cwd").readlink() == work and any(w.endswith(name.encode()) for w in words[:3]):
                found.append(int(entry.name))
    return found


def settled(work: Path, source: Guest, there: Guest) -> list[str]:
    """Take the ways out that are printed, until the guest runs somewhere; what was printed."""
    said = []
    for guest in (source, there, source):
        if runs(source) or runs(there):
            break
        found = shell(f"vm-status {guest.name}.qmp", work).text
        said.append(found)
        for command in re.findall(r"^next: (vm-(?:migrate --recover|cont).*?)(?:    .*)?$", found, re.M):
            # What only a person knows: that it is gone there, or here.
            if "--force" in command and there.alive():
                continue
            if not source.alive():
                command = command.replace("URI-OF-THE-SOURCE", "--force")
            command = command.replace("URI-OF-THE-SOURCE", shlex.quote(link("vm-restore --receive a.qmp")))
            done = shell(command, work)
            said.append(f"{command}: {done.status} {done.text} {done.err}")
    return said


def outcome_of(work: Path, uri: str, source: Guest, there: Guest, *options: str) -> tuple[int, str, bool]:
    """Status and words of a move, and whether the two have ever been seen running at once."""
    words = work / "words"
    both = False
    with words.open("w") as file:
        command = ["vm-migrate", "--timeout-handover", "3", *FEW_ROUNDS, *options, "a.qmp", uri]
        process = subprocess.Popen(command, cwd=work, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            # The one first that may begin to run: else it could be both one after the other.
            both = both or (runs(there) and runs(source))
            time.sleep(0.05)
        process.kill()
    # The receiver may have something to put back, too.
    until(lambda: not processes(work, "vm-restore"), 30, "the receiver has ended")
    return process.wait(10), words.read_text(), both or (runs(there) and runs(source))


def judge_fault(work: Path, uri: str, source: Guest, there: Guest, *options: str) -> None:
    stood = source.counts()[-1]
    status, words, both = outcome_of(work, uri, source, there, *options)
    assert not both, words
    assert status in (0, 1, 3, 4, 5, -signal.SIGKILL), words
    # What QEMU does by itself when its socket closes takes a moment.
    with_patience = time.monotonic() + 3
    while not (runs(source) or runs(there)) and time.monotonic() < with_patience and status in (1, -signal.SIGKILL):
        time.sleep(0.05)
    context = f"status {status}, said {words}"
    if status == 0:
        assert runs(there) or not there.alive(), context
    if status in (1, 3, 4):
        assert runs(source) or not source.alive(), context
    said: list[str] = []
    if not source.alive() and (not there.alive() or there.status() == "inmigrate"):
        # It has died with its QEMU, before it was anywhere else.
        return
    if not runs(source) and not runs(there):
        assert status in (0, 5, -signal.SIGKILL), context
        said = settled(work, source, there)
    context += "\n".join(["", *said])
    assert runs(source) != runs(there), f"{source.status()} {there.status()} {context}"
    guest = source if runs(source) else there
    guest.wait_advance()
    assert guest.counts()[-1] >= stood, context
    assert guest.wait_sum() == source.wait_ready(), context


def fault_uri(kind: str, when: str, deed: str, source: Guest, there: Guest) -> str:
    # In the midst of the data, unless before all of them.
    count = 20 if (kind, when) == ("D", "after") else 1
    if deed in ("cut", "flip"):
        return gated(kind, when, deed, count=count)
    return gated(kind, when, "kill", {"a": str(source.pid), "b": str(there.pid)}.get(deed, deed), count)


@pytest.mark.parametrize(("kind", "when", "deed"), FAULTS)
def test_it_dies(guests: Guests, work: Path, kind: str, when: str, deed: str) -> None:
    source, there = guests.running(), guests.waiting()
    judge_fault(work, fault_uri(kind, when, deed, source, there), source, there)


@pytest.mark.parametrize(
    ("when", "deed"), [("before", "source"), ("after", "receiver"), ("after", "a"), ("after", "cut")]
)
def test_it_dies_when_the_filters_have_ended(guests: Guests, work: Path, when: str, deed: str) -> None:
    source, there = guests.running(), guests.waiting()
    judge_fault(work, fault_uri("E", when, deed, source, there), source, there, "--through", "vm-compress")


@pytest.mark.parametrize("kind", ["D", "L", "G"])
def test_the_link_stands_still(guests: Guests, work: Path, kind: str) -> None:
    source, there = guests.running(), guests.waiting()
    # While the guest runs on it may stand as long as it likes, unless there is a limit.
    limit = ("--timeout", "2") if kind == "D" else ()
    judge_fault(work, gated(kind, "before", "stall"), source, there, *limit)


@pytest.mark.parametrize("kind", ["D", "L", "G", "N"])
def test_the_link_pauses(guests: Guests, work: Path, kind: str) -> None:
    source, there = guests.running(), guests.waiting()
    done = move(work, gated(kind, "before", "pause", "2"))
    assert done.status == 0, done.err
    went_on(source.counts()[-1], there)


@pytest.mark.parametrize("kind", ["A", "D", "L", "G"])
def test_a_bit_is_flipped(guests: Guests, work: Path, kind: str) -> None:
    source, there = guests.running(), guests.waiting()
    judge_fault(work, gated(kind, "before", "flip"), source, there)


def test_a_receiver_that_speaks_in_riddles(guests: Guests, work: Path) -> None:
    """What comes from the other side is not trusted."""
    source = guests.running()
    for words in ('{"status": [1], "hints": 5}', "[" * 100000, '{"message": "\\u001b[2J", "status": 1}', "{}"):
        say = f"import sys; sys.path.insert(0, {str(ROOT / 'lib')!r}); from vmstate.migrate import link; import zlib\n"
        say += f"p = {words!r}.encode(); h = link.HEAD.pack(b'vml1', ord('R'), 1, len(p))\n"
        say += "sys.stdout.buffer.write(h + link.SUM.pack(zlib.crc32(p, zlib.crc32(h))) + p)"
        (work / "say.py").write_text(say)
        done = move(work, link(f"{sys.executable} say.py"))
        assert done.status in (1, 3), done.err
        assert done.err.startswith("vm-migrate: error: ")
        assert "Traceback" not in done.err
        assert "\x1b" not in done.err
        assert "internal error" not in done.err
    as_it_was(source)


@pytest.mark.parametrize(
    "hello",
    [
        '{"version": 1, "purpose": "move"}',
        '{"version": 1, "purpose": "move", "move": 5}',
        '{"version": 1, "purpose": "move", "move": "0123456789abcdef"}',
        '{"version": 1, "purpose": "move", "move": "0123456789abcdef", "secret": "5"}',
        json.dumps({**HELLO, "through": ["; touch x"]}),
        json.dumps({**HELLO, "through": 7}),
        '{"version": 1, "purpose": "grant", "move": ["x"]}',
        '{"version": 1, "purpose": "resume", "move": "0123456789abcdef"}',
        '{"version": 2}',
        '{"version": 1, "purpose": ["move"]}',
        "[]",
    ],
)
def test_a_source_that_speaks_in_riddles(guests: Guests, work: Path, hello: str) -> None:
    there = guests.waiting("b", kind="metal", mem=64)
    payload = hello.encode()
    head = protocol.HEAD.pack(protocol.MAGIC, protocol.HELLO, 1, len(payload))
    (work / "hello").write_bytes(head + protocol.SUM.pack(zlib.crc32(payload, zlib.crc32(head))) + payload)
    done = shell("vm-restore --receive b.qmp < hello > answer", work)
    assert done.status in (1, 3), done.err
    assert "internal error" not in done.err
    assert "Traceback" not in done.err
    assert there.status() == "inmigrate"
    assert not (work / "x").exists()


def test_a_flipped_bit_is_named(guests: Guests, work: Path) -> None:
    source = guests.running()
    guests.waiting()
    done = move(work, gated("D", "before", "flip", count=20))
    assert done.status == 3
    assert "the other side: the link has changed bytes on their way" in done.err
    assert "; the guest runs on" in done.err
    as_it_was(source)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels(guests: Guests, work: Path, number: signal.Signals) -> None:
    source, there = guests.running(), guests.waiting()
    with migrating(work, source, link(), "--speed", "20m") as moving:
        moving.send_signal(number)
        moving.communicate(timeout=30)
    assert moving.returncode == -number
    as_it_was(source)
    # It may not have begun to load.
    over = (None, "failed")
    until(lambda: not there.alive() or there.cmd("query-migrate").get("status") in over, 10, "it is not left loading")


def test_vm_cancel_ends_it(guests: Guests, work: Path) -> None:
    source = guests.running()
    guests.waiting()
    with migrating(work, source, link(), "--speed", "20m") as moving:
        assert shell("vm-cancel a.qmp", work).status == 0
        _, err = moving.communicate(timeout=30)
    assert moving.returncode == 1
    assert b"; the guest runs on" in err
    as_it_was(source)


def test_it_takes_too_long(guests: Guests, work: Path) -> None:
    source = guests.running()
    guests.waiting()
    done = move(work, link(), "--speed", "10m", "--downtime", "1", "--timeout", "1")
    assert done.status == 1, done.err
    assert "the move was not over in 1 s" in done.err
    assert "; the guest runs on\n" in done.err
    as_it_was(source)


def test_detached(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.waiting()
    begun = time.monotonic()
    done = move(work, link(), "-d", "--speed", "40m", "--log", f"{work}/log")
    assert (done.status, done.err) == (0, "vm-migrate: hint: to see how far it is: vm-status a.qmp\n")
    assert source.cmd("query-migrate")["status"] in ("setup", "active")
    assert time.monotonic() - begun < 20
    done = shell("vm-status --watch a.qmp", work)
    assert done.status == 0, done.err
    there.wait_status("running")
    until(lambda: "running" in (work / "log").read_text(), 10, "the last words")
    assert (work / "log").read_text() == "a.qmp: the guest is on the other side, and 'running'\n"
    assert "ends with: a.qmp: the guest is on the other side" in shell("vm-status a.qmp", work).text
    went_on(source.counts()[-1], there)


def test_whoever_waits_for_its_words_waits_no_longer(guests: Guests, work: Path) -> None:
    """No process that goes on holds the caller's output open."""
    source, there = guests.running(), guests.waiting()
    begun = time.monotonic()
    done = shell(f"x=$(vm-migrate -q -d --speed 10m a.qmp '{link()}' 2>&1); echo \"<$x>\"", work)
    assert (done.status, done.text) == (0, "<>\n")
    assert source.cmd("query-migrate")["status"] in ("setup", "active"), time.monotonic() - begun
    assert shell("vm-speed a.qmp 0", work).status == 0
    there.wait_status("running")


def test_interrupted_before_it_has_begun(guests: Guests, work: Path) -> None:
    source = guests.running()
    process = subprocess.Popen(["vm-migrate", "-d", "a.qmp", link("sleep 30")], cwd=work, stderr=subprocess.PIPE)
    until(lambda: processes(work, "sleep"), 20, "it waits for the other side")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT, err
    as_it_was(source)
    until(lambda: not processes(work, "vm-migrate"), 10, "nothing is left")


def test_detached_and_refused_at_once(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = move(work, link("vm-restore --receive no.qmp"), "-d")
    assert done.status == 1
    assert "the other side: no guest at no.qmp" in done.err
    as_it_was(source)


def test_detached_and_the_other_side_dies(guests: Guests, work: Path) -> None:
    source, there = guests.running(), guests.waiting()
    done = move(work, link(), "-d", "--speed", "20m", "--log", f"{work}/log")
    assert done.status == 0
    there.end()
    until(lambda: "the guest runs on" in (work / "log").read_text(), 20, "the last words")
    as_it_was(source)


# The way out, by hand


def test_two_monitors_and_one_decision(guests: Guests, work: Path) -> None:
    """Whoever asks by another monitor finds it decided."""
    source, there = given_away(guests, work)
    assert source.cmd("qom-list", path="/objects/vmstate-decided")
    with pytest.raises(QmpError, match="duplicate"):
        source.cmd("object-add", **{"qom-type": "secret", "id": "vmstate-decided", "data": "x"})
    done = shell("vm-migrate --recover a.test", work)
    assert done.status == 5
    assert (source.status(), there.status()) == ("postmigrate", "paused")


def test_one_that_was_kept_is_not_granted(guests: Guests, work: Path) -> None:
    """Somebody has decided that it stays, and died before it ran."""
    source, there = given_away(guests, work)
    move = json.loads(source.cmd("qom-get", path="/objects/vmstate-decided", property="data"))["move"]
    source.cmd("object-del", id="vmstate-decided")
    words = json.dumps({"move": move, "what": "kept"})
    source.cmd("object-add", **{"qom-type": "secret", "id": "vmstate-decided", "data": words})
    done = shell("vm-migrate --recover b.qmp 'link:vm-restore --receive a.qmp'", work)
    assert done.status == 5, done.err
    assert "this copy is of no use" in done.err
    assert there.status() == "paused"
    assert shell("vm-migrate --recover a.qmp", work).text == "a.qmp: the guest is here, and 'running'\n"
    assert source.running()


def given_away(guests: Guests, work: Path) -> tuple[Guest, Guest]:
    """Granted, and nobody left who could say go."""
    source, there = guests.running(), guests.waiting()
    done = outcome_of(work, gated("G", "before", "end", "source"), source, there)
    assert done[0] == -signal.SIGKILL
    until(lambda: "is held until" in shell("vm-status b.qmp", work).text, 10, "held")
    assert (source.status(), there.status()) == ("postmigrate", "paused")
    return source, there


def test_what_is_said_of_one_given_away(guests: Guests, work: Path) -> None:
    source, there = given_away(guests, work)
    text = shell("vm-status a.qmp", work).text
    assert "a.qmp: was moved and stands paused here\n" in text
    assert "next: vm-migrate --recover a.qmp 'link:" in text
    assert "next: vm-migrate --recover b.qmp URI-OF-THE-SOURCE" in shell("vm-status b.qmp", work).text
    for name in ("a", "b"):
        assert shell(f"vm-cont {name}.qmp", work).status == 5
        # Nor can it be saved or moved on, as if it were one like any other.
        assert shell(f"vm-dump {name}.qmp > s", work).status in (1, 5)
    assert (source.status(), there.status()) == ("postmigrate", "paused")
    done = shell("vm-migrate --recover a.qmp", work)
    assert done.status == 5
    assert "may run where it was sent to (not asked)" in done.err
    assert shell(f"vm-migrate --recover a.qmp 'link:{RECEIVER}'", work).status == 0
    assert (source.status(), there.running()) == ("postmigrate", True)
    assert "has been heard to run there" in shell("vm-status a.qmp", work).text
    for guest in (source, there):
        assert not [c for c in guest.cmd("query-migrate-capabilities") if c["state"]]
    assert there.cmd("query-migrate-parameters")["announce-rounds"] == 5


def test_the_destination_asks(guests: Guests, work: Path) -> None:
    source, there = given_away(guests, work)
    done = shell("vm-migrate --recover b.qmp", work)
    assert done.status == 5
    assert "whether its source has let it go is not known" in done.err
    assert "vm-migrate --recover --force b.qmp" in done.err
    done = shell("vm-migrate --recover b.qmp 'link:vm-restore --receive no.qmp'", work)
    assert done.status == 5, "a wrong path looks like a source that is gone"
    assert "what was asked knows nothing of it" in done.err
    assert there.status() == "paused"
    assert shell("vm-migrate --recover b.qmp 'link:vm-restore --receive a.qmp'", work).status == 0
    assert (source.status(), there.running()) == ("postmigrate", True)


def test_the_destination_asks_for_one_that_is_gone(guests: Guests, work: Path) -> None:
    """It may have run on there before it ended: a person has to know."""
    source, there = given_away(guests, work)
    source.end()
    done = shell("vm-migrate --recover b.qmp 'link:vm-restore --receive a.qmp'", work)
    assert done.status == 5
    assert "what was asked knows nothing of it" in done.err
    assert there.status() == "paused"
    assert "only if it has not gone on at its source: vm-migrate --recover --force b.qmp" in done.err
    assert shell("vm-migrate --recover --force b.qmp", work).status == 0
    assert there.running()


def test_the_destination_asks_another_guest(guests: Guests, work: Path) -> None:
    """One that was started since at the same place knows nothing of the move: this copy may be the last."""
    source, there = given_away(guests, work)
    source.end()
    guests.running("a2")
    shell("ln -sf a2.qmp a.qmp", work)
    done = shell("vm-migrate --recover b.qmp 'link:vm-restore --receive a.qmp'", work)
    assert done.status == 5
    assert "knows nothing of it" in done.err
    assert there.status() == "paused"


def test_by_someone_who_is_sure(guests: Guests, work: Path) -> None:
    _source, there = given_away(guests, work)
    assert shell("vm-migrate --recover --force b.qmp", work).status == 0
    assert there.running()


def test_a_copy_of_no_use(guests: Guests, work: Path) -> None:
    """Loaded, but the source has taken its guest back: it must never run."""
    source, there = guests.running(), guests.waiting()
    status, words, _ = outcome_of(work, gated("L", "before", "cut"), source, there)
    assert status == 1, words
    as_it_was(source)
    assert there.status() == "paused"
    # Later, too, when its own move is long forgotten.
    assert shell("vm-stop a.qmp && vm-cont a.qmp", work).status == 0
    done = shell("vm-migrate --recover b.qmp 'link:vm-restore --receive a.qmp'", work)
    assert done.status == 5
    assert "this copy is of no use" in done.err
    assert shell("vm-cont b.qmp", work).status == 5
    assert (source.running(), there.status()) == (True, "paused")


def test_one_that_is_here_is_settled(guests: Guests, work: Path) -> None:
    guests.running()
    done = shell("vm-migrate --recover a.qmp", work)
    assert (done.status, done.text) == (0, "a.qmp: the guest is here, and 'running'\n")
    guests.waiting(kind="metal")
    done = shell("vm-migrate --recover b.qmp", work)
    assert (done.status, done.text) == (0, "b.qmp: no guest has come: it waits for a state\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a.qmp link:", "is no place"),
        ("a.qmp ssh://", "is no place"),
        ("a.qmp ssh://host", "is no place"),
        ("a.qmp ssh://-oProxyCommand=x/b.qmp", "is no place"),
        ("a.qmp ssh://host:port/b.qmp", "is no place"),
        ("--dry-run a.qmp unix:b", "--dry-run is for link: and ssh://"),
        ("--through gzip a.qmp unix:b", "--through is for link: and ssh://"),
        ("--through 'gzip; ls' a.qmp link:x", "expected a pipeline of filters"),
        ("--through 'gzip |' a.qmp link:x", "a filter is missing"),
        ("--log x a.qmp link:x", "--log is for -d"),
        ("--recover --dry-run a.qmp link:x", "--dry-run does not go with --recover"),
        ("--recover a.qmp unix:b", "leads to no vm-restore --receive"),
        ("--timeout-handover 0 a.qmp link:x", "--timeout-handover: expected"),
    ],
)
def test_wrong_usage(work: Path, words: str, said: str) -> None:
    done = shell(f"vm-migrate {words}", work)
    assert done.status == 2, done.err
    assert said in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--receive --run b.qmp", "--receive does not go with"),
        ("--through cat b.qmp", "are for --receive"),
    ],
)
def test_wrong_usage_of_the_receiver(work: Path, words: str, said: str) -> None:
    done = shell(f"vm-restore {words} </dev/null", work)
    assert done.status == 2, done.err
    assert said in done.err


def test_bytes_that_are_no_link(guests: Guests, work: Path) -> None:
    there = guests.waiting()
    for text in ("", "hello, this is nothing of the kind", "vml1" * 100, "QEVM"):
        done = shell(f"printf '{text}' | vm-restore --receive b.qmp | cat > answer", work)
        assert done.status in (1, 3), (text, done.err)
        assert "Traceback" not in done.err
    assert there.status() == "inmigrate"
    assert os.path.exists(there.qmp)


# A stranger: a key that may send a guest, and has not sent this one


def mark(guest: Guest, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(guest.cmd("qom-get", path=f"/objects/vmstate-{name}", property="data"))
    return values


def stranger(work: Path, name: str, **hello: Any) -> tuple[int, list[protocol.LinkFrame], str]:
    """Whatever is asked, it is followed by all that might count for something; status, answers and words."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ["vm-restore", "-v", "--receive", f"{name}.qmp"], cwd=work, stdin=pipe, stdout=pipe, stderr=pipe
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        there = protocol.Link(process.stdout.fileno(), process.stdin.fileno())
        with contextlib.suppress(OSError):
            there.send(protocol.HELLO, **{"version": 1, **hello})
            if hello.get("nonce"):
                there.send(protocol.PROOF, proof="0" * 64)
            there.send(protocol.GO, move=hello.get("move") or "0" * 16, proof="0" * 64)
            there.send(protocol.CANCEL)
        process.stdin.close()
        frames = list(iter(there.receive, None))
        return process.wait(30), frames, process.stderr.read().decode()


def refused(work: Path, name: str, known: dict[str, Any], **hello: Any) -> None:
    """A stranger is, and hears nothing.  known: the marker of the guest that he asks for."""
    for more in ({}, {"nonce": "0" * 64}, {"nonce": "0" * 64, "secret": "0" * 64}):
        status, frames, err = stranger(work, name, **{**more, **hello})
        # A move is refused for what the QEMU is, the others for want of the secret.
        said = [frame.kind for frame in frames]
        assert (status, said[-1]) == (1, protocol.REFUSE), (status, said, err)
        assert set(said[:-1]) <= {protocol.CHALLENGE}
        words = json.dumps([frame.values for frame in frames]) + err
        if hello["purpose"] != "move":
            assert "no guest of this migration is here, or its secret was not proven" in words
            assert name + ".qmp" not in words
        for fact in ("move", "secret", "path", "uri"):
            assert not known.get(fact) or known[fact] not in words


@pytest.mark.parametrize("deed", [pytest.param("stall", marks=pytest.mark.more), "pause"])
def test_a_stranger_has_no_held_guest_run(guests: Guests, work: Path, deed: str) -> None:
    """What the receiver has to say is slow to come: meanwhile its guest is loaded, and no other's."""
    source, there = guests.running(), guests.waiting()
    uri = gated("L", "before", deed, *(("12",) if deed == "pause" else ()))
    command = ["vm-migrate", "--timeout-handover", "25" if deed == "pause" else "12", *FEW_ROUNDS, "a.qmp", uri]
    with subprocess.Popen(command, cwd=work, stderr=subprocess.PIPE, start_new_session=True) as moving:
        until(lambda: (source.status(), there.status()) == ("finish-migrate", "paused"), 30, "it is held")
        known = mark(there, "taken")
        for move in (None, known["move"]):
            refused(work, "b", known, purpose="settle", **({"move": move} if move else {}))
        assert (source.status(), there.status()) == ("finish-migrate", "paused")
        _, err = moving.communicate(timeout=60)
    if deed == "stall":
        assert moving.returncode == 1, err
        as_it_was(source)
        assert there.status() == "paused"
    else:
        assert moving.returncode == 0, err
        went_on(source.counts()[-1], there)
        assert source.status() == "postmigrate"
        # Nor is he told later where it is.
        refused(work, "b", known, purpose="settle", move=known["move"])
        refused(work, "a", mark(source, "moved"), purpose="grant", move=known["move"])


def test_a_stranger_has_no_guest_granted_or_ended(guests: Guests, work: Path) -> None:
    """He may call both sides, and answer in the place of either."""
    source, there = guests.running(), guests.waiting()
    status, words, _ = outcome_of(work, gated("L", "before", "cut"), source, there)
    assert status == 1, words
    kept, taken = mark(source, "decided"), mark(there, "taken")
    assert kept["secret"] == taken["secret"]
    refused(work, "a", kept, purpose="grant", move=kept["move"])
    refused(work, "b", taken, purpose="move", move=taken["move"], secret="0" * 64)
    assert (source.running(), there.status()) == (True, "paused")

    say = f"import sys; sys.path.insert(0, {str(ROOT / 'lib')!r}); from vmstate.migrate import link\n"
    say += "there = link.Link(0, 1); there.receive(); there.send(link.CHALLENGE, nonce='0' * 64)\n"
    say += "proof = there.receive().values['proof']\n"
    say += "there.send(link.ACCEPT, state=sys.argv[1], run='', proof=proof); there.receive()"
    (work / "impostor").write_text(say)
    for state in ("granted", "here"):
        done = shell(f"vm-migrate -v --recover b.qmp 'link:{sys.executable} impostor {state}'", work)
        assert done.status == 5, done.err
        assert "the peer that answered does not have the secret of this migration" in done.err
        assert "of no use" not in done.err
        assert taken["secret"] not in done.err + done.text
        assert (source.running(), there.status()) == (True, "paused")
    done = shell("vm-migrate --recover b.qmp 'link:vm-restore --receive a.qmp'", work)
    assert (done.status, "this copy is of no use" in done.err) == (5, True), done.err


def test_a_marker_of_an_older_version(guests: Guests, work: Path) -> None:
    """It has no secret, so nobody is asked: who has not granted the guest takes it back, and else a person decides."""
    source, there = given_away(guests, work)
    for guest, name in ((source, "moved"), (there, "taken")):
        values = mark(guest, name)
        del values["secret"]
        guest.cmd("object-del", id=f"vmstate-{name}")
        guest.cmd("object-add", **{"qom-type": "secret", "id": f"vmstate-{name}", "data": json.dumps(values)})
    for words in ("a.qmp 'link:vm-restore --receive b.qmp'", "b.qmp 'link:vm-restore --receive a.qmp'"):
        done = shell(f"vm-migrate --recover {words}", work)
        assert done.status == 5
        assert "its migration was begun by an older vmstate, which drew no secret for it" in done.err
    assert (source.status(), there.status()) == ("postmigrate", "paused")
    source.cmd("object-del", id="vmstate-decided")
    assert shell("vm-migrate --recover a.qmp 'link:vm-restore --receive b.qmp'", work).status == 0
    assert (source.running(), there.status()) == (True, "paused")


def test_its_secret_is_said_nowhere(guests: Guests, work: Path) -> None:
    """In no status, log, argument, environment or file, before and after."""
    source, there = guests.running(), guests.waiting()
    said = []
    with migrating(work, source, link(RECEIVER.replace("--receive", "-v --receive")), "-v", "--speed", "20m") as moving:
        secret = mark(source, "moved")["secret"]
        said += [shell(f"vm-status {words} a.qmp", work).text for words in ("", "--json", "-v")]
        for entry in Path("/proc").iterdir():
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    said.append((entry / name).read_text(errors="replace"))
        moving.terminate()
        _, err = moving.communicate(timeout=30)
    as_it_was(source)
    there.wait_gone() if there.alive() and there.status() != "inmigrate" else there.end()
    there = guests.waiting("c")
    done = move(work, link("vm-restore -v --receive c.qmp"), "-v", "-d", "--log", f"{work}/log")
    until(lambda: "on the other side" in (work / "log").read_text(), 60, "it is there")
    secrets = secret, mark(source, "moved")["secret"]
    assert mark(there, "arrived")["secret"] == secrets[1] != secret
    said += [str(err), done.text, done.err]
    for name in ("a", "c"):
        said += [shell(f"vm-status {words} {name}.qmp", work).text for words in ("", "--json", "-v")]
        done = shell(f"vm-cont -v {name}.qmp; vm-dump -v {name}.qmp > state.{name}; vm-cancel -v {name}.qmp", work)
        said += [done.text, done.err]
    said += [path.read_text(errors="replace") for path in work.iterdir() if path.is_file()]
    for one in secrets:
        assert re.fullmatch("[0-9a-f]{64}", one)
        assert not [text for text in said if one in text]


# Postcopy: a guest that dirties its memory faster than the wire


METAL = {"kind": "metal", "mem": 80, "append": "dirty=4000"}


def busy(guests: Guests) -> tuple[Guest, Guest]:
    return guests.running("a", **METAL), guests.waiting("b", **METAL)


def test_postcopy(guests: Guests, work: Path) -> None:
    source, there = busy(guests)
    done = move(work, link(), "--json", "--postcopy", "--speed", "40m", "--downtime", "1")
    assert done.status == 0, done.err
    assert json.loads(done.out)["there"] == "running"
    assert source.cmd("query-migrate")["ram"]["postcopy-bytes"] > 0
    there.wait_advance()
    counts = there.counts()
    assert counts[0] in range(source.counts()[-1], source.counts()[-1] + 3)
    assert there.running()
    assert source.status() == "postmigrate"
    assert shell("vm-cont a.qmp", work).status == 5
    done = shell("vm-migrate --recover a.qmp", work)
    assert done.status == 5, "nobody may take it back"
    for guest in (source, there):
        assert not [c for c in guest.cmd("query-migrate-capabilities") if c["state"]]


def test_without_postcopy_it_is_cancelled(guests: Guests, work: Path) -> None:
    source, _ = busy(guests)
    done = move(work, link(), "--max-rounds", "2", "--speed", "40m", "--downtime", "1")
    assert done.status == 1
    assert "hint: a higher --downtime, --auto-converge, --postcopy or vm-speed may help" in done.err
    assert source.running()


def test_the_pause_begins_short_and_grows(guests: Guests, work: Path) -> None:
    source, _ = busy(guests)
    seen: list[int] = []

    def look() -> bool:
        seen.append(source.cmd("query-migrate-parameters")["downtime-limit"])
        return seen[-1] >= 160

    with migrating(work, source, link(), "--speed", "40m") as moving:
        until(look, 30, "the limit grows", lambda: str(seen))
        moving.send_signal(signal.SIGTERM)
        moving.communicate(timeout=30)
    assert seen[0] < 160
    assert max(seen) <= 300
    as_it_was(source)


def test_postcopy_that_is_not_needed(guests: Guests, work: Path) -> None:
    """Everything is there before the switchover: two phases as in any move."""
    source, there = guests.running(), guests.waiting()
    done = move(work, link(), "--postcopy", "--max-rounds", "500")
    assert done.status == 0, done.err
    assert source.cmd("query-migrate")["ram"]["postcopy-bytes"] == 0
    went_on(source.counts()[-1], there)


def test_a_paused_guest_crosses_over(guests: Guests, work: Path) -> None:
    source, there = busy(guests)
    source.cmd("stop")
    count = source.count()
    done = move(work, link(), "--postcopy", "--speed", "20m", "--timeout", "1")
    assert done.status == 0, done.err
    assert there.status() == "paused"
    assert shell("vm-cont b.qmp", work).status == 0
    assert (there.wait_advance() or 0) - (count or 0) in range(4)


@pytest.mark.parametrize("deed", ["cut", "receiver", "source"])
def test_the_link_is_lost_in_postcopy(guests: Guests, work: Path, deed: str) -> None:
    source, there = busy(guests)
    source.cmd("migrate-set-parameters", **{"max-postcopy-bandwidth": 20 * MIB})
    # A moment behind the switchover, when the guest is there and most of its pages are not.
    uri = gated("S", "later", *((deed,) if deed == "cut" else ("kill", deed)))
    command = ["vm-migrate", "--postcopy", "--speed", "30m", "--downtime", "1", "a.qmp", uri]
    with (work / "words").open("w") as words:
        process = subprocess.Popen(command, cwd=work, stderr=words, start_new_session=True)
        status = process.wait(60)
    said = (work / "words").read_text()
    assert status in (5, -signal.SIGKILL), said
    until(lambda: source.cmd("query-migrate")["status"] == "postcopy-paused", 20, "it notices")
    # Who has not sent it takes up nothing.
    refused(work, "b", mark(there, "arrived"), purpose="resume", move=mark(source, "moved")["move"])
    assert source.cmd("query-migrate")["status"] == "postcopy-paused"
    text = shell("vm-status a.qmp", work).text
    assert "the link was lost" in text, text
    (command,) = re.findall(r"^next: (vm-migrate --recover .*)$", text, re.M)
    done = shell(command, work, timeout=40)
    assert (done.status, done.text) == (0, "a.qmp: the guest is on the other side, and 'running'\n"), done.err
    assert there.running()
    assert source.status() == "postmigrate"


class Firmware(Guest):
    """No OS and no disk: the firmware, in real mode, looks for something to boot."""

    def _kernel(self) -> list[str]:
        debug = f"file,id=debug,path={self.path('debug')}"
        return ["-chardev", debug, "-device", "isa-debugcon,iobase=0x402,chardev=debug"]

    def said(self) -> str:
        return self.path("debug").read_text(errors="replace")


def test_a_guest_in_its_firmware(work: Path) -> None:
    # A nested KVM emulates real mode, which takes it longer than TCG.
    with Firmware(work, "a", kind="metal", accel="tcg").start() as source:
        until(lambda: "No bootable device" in source.said(), 30, "it has nothing to boot")
        with Firmware(work, "b", kind="metal", accel="tcg", incoming="defer").start() as there:
            done = move(work, link())
            assert (done.status, done.err) == (0, "")
            assert there.status() == "running"
            assert there.said() == ""
            there.cmd("system_reset")
            until(lambda: "No bootable device" in there.said(), 30, "it goes on there")


# no wait without an end


@pytest.mark.parametrize("command", ["cat > /dev/null", "sleep 100", "head -c 1 | cat; sleep 100"])
def test_a_link_that_never_answers(guests: Guests, work: Path, command: str) -> None:
    """It takes bytes, or not even these: a signal ends the wait for its first word."""
    source = guests.start("a", kind="metal")
    process = subprocess.Popen(["vm-migrate", "a.qmp", f"link:{command}"], cwd=work, stderr=subprocess.PIPE)
    try:
        time.sleep(3)
        assert process.poll() is None
        process.terminate()
        assert process.wait(5) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait(10)
    assert source.status() == "running"
    assert not [found for found in source.cmd("query-migrate-capabilities") if found["state"]]


def test_a_filter_that_does_not_end(guests: Guests, work: Path) -> None:
    """The guest stands still meanwhile."""
    source, there = guests.start("a", kind="metal"), guests.waiting("b", kind="metal")
    (work / "stuck").write_text("#!/bin/sh\ncat\nexec sleep 100\n")
    (work / "stuck").chmod(0o755)
    receiver = "vm-restore --receive --no-announce --through cat b.qmp"
    started = time.monotonic()
    done = move(work, link(receiver), "--through", "./stuck", "--timeout-handover", "3")
    assert time.monotonic() - started < 30
    assert done.status == 1, done.err
    assert "nothing has passed over the link for 3 s" in done.err
    assert source.status() == "running"
    until(lambda: not there.alive() or used_up(there), 20, "the other one is given up")
