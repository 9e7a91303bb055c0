"""vm-restore --lazy: the guest runs first and gets its memory later, and never a wrong byte of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Done, Guests, run, shell
from unit.streams import state as stream
from vm import Guest, saved_guest, start_from, until
from vmstate.errors import Damaged
from vmstate.qemu import userfault
from vmstate.stream.page_map import NORMAL
from vmstate.vmz.vmz_file import VmzFile

from guest.judge import as_it_was, still_waits, went_on

LAZY_FAULT = Path(__file__).with_name("lazy_fault.py")
pytestmark = pytest.mark.timeout(60)
LINES = "52:54:00:00:00:01 -\n"
POSTCOPY = ["-global", "migration.x-postcopy-ram=on"]


class Saved:
    """Files of one guest that ran, and what it had counted: s.state, s.vmz; other: later; paused: it was."""

    def __init__(self, folder: Path, states: Path) -> None:
        self.folder = folder
        state = saved_guest(states)
        (folder / "paused").symlink_to(state)
        with start_from(state, folder, "a") as source:
            source.wait_count(1)
            assert shell("vm-dump -q -o s.state a.qmp && vm-compress -q -1 -o s.vmz s.state", folder).status == 0
            self.count = source.count() or 0
            assert shell("vm-cont a.qmp && vm-dump -q -o other a.qmp", folder).status == 0


@pytest.fixture(scope="module")
def files(states: Path) -> Iterator[Saved]:
    with tempfile.TemporaryDirectory(prefix="vm-") as folder:
        yield Saved(Path(folder), states)


@pytest.fixture
def saved(files: Saved, work: Path) -> Saved:
    """Its files in the work folder, too; who changes one makes a copy of it."""
    for name in ("s.state", "s.vmz", "other", "paused"):
        (work / name).symlink_to(files.folder / name)
    return files


class Server:
    """A vm-restore in the background; `err`: what it has said there."""

    def __init__(self, work: Path, *options: str, state: str = "s.vmz", guest: str = "b.qmp") -> None:
        self._err = work / f"{guest}.err"
        with (work / state).open("rb") as source, self._err.open("wb") as words:
            self.process = subprocess.Popen(
                ["vm-restore", *options, guest],
                cwd=work,
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=words,
                start_new_session=True,
            )

    @property
    def err(self) -> str:
        return self._err.read_text()

    def lines(self) -> str:
        """All of its standard output, up to its end."""
        assert self.process.stdout
        return self.process.stdout.read().decode()

    def result(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.err.splitlines()[-1])
        return found

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdout
        self.process.stdout.close()


Serve = Callable[..., Server]


@pytest.fixture
def serve(work: Path) -> Iterator[Serve]:
    made: list[Server] = []

    def serving(*options: str, **kwargs: str) -> Server:
        made.append(Server(work, *options, **kwargs))
        return made[-1]

    yield serving
    for server in made:
        server.end()


def lazily(work: Path, *options: str, state: str = "s.vmz", guest: str = "b.qmp") -> Done:
    return shell(shlex.join(["vm-restore", "--lazy", *options, guest]) + f" < {state}", work)


def refused(done: Done, status: int, words: str) -> None:
    assert done.status == status, done.err
    assert re.search(words, done.err), done.err
    assert done.out == b""


def migration(guest: Guest) -> str:
    return str(guest.cmd("query-migrate").get("status", "none"))


def lost(guest: Guest) -> None:
    """It has seen that its server is gone."""

    def seen() -> bool:
        try:
            with guest.connect(5) as qmp:
                return bool(qmp.cmd("query-migrate").get("status") == "postcopy-paused")
        except TimeoutError:
            # QEMU itself waits for a page.
            return userfault.waits(guest.pid)

    until(seen, 20, "it has seen that its server is gone")


def dies(work: Path, count: int, *words: str, state: str = "s.vmz", since: str = "b.test") -> None:
    """A vm-restore that is killed after so many bytes, counted from the moment at which the guest runs."""
    with (work / state).open("rb") as source:
        done = run(sys.executable, LAZY_FAULT, since, count, *words, cwd=work, stdin=source)
    assert done.status == -signal.SIGKILL, done.err


def unmarked(guest: Guest) -> None:
    left = [entry["name"] for entry in guest.cmd("qom-list", path="/objects") if "vmstate" in entry["name"]]
    assert not [name for name in left if not name.startswith("vmstate-claim-")]


def arrived(guest: Guest, saved: Saved) -> None:
    """It has all of its memory, goes on from where it stood, and nothing is left in its QEMU."""
    assert migration(guest) == "completed"
    unmarked(guest)
    guest.wait_count(saved.count + 1)
    assert guest.counts()[0] in range(saved.count, saved.count + 3)
    as_it_was(guest)


def whole(guest: Guest, saved: Saved) -> None:
    """The same, and its memory is what it was."""
    arrived(guest, saved)
    went_on(saved.count, guest)


def taken_up(work: Path, guest: Guest, saved: Saved, state: str = "s.vmz") -> None:
    """By the command that vm-status prints."""
    status = shell("vm-status b.qmp", work)
    said = status.text + status.err
    assert re.search(r"b.qmp: .*, and lacks a part of its memory: |b.qmp stands still: it waits for a page", said), said
    found = re.search(r"(vm-restore --resume .*) < STATE.vmz$", said, re.MULTILINE)
    assert found, said
    command = found[1].replace("--on-demand ", "")
    done = shell(f"{command} < {state}", work)
    assert (done.status, done.out, done.err) == (0, b"", "")
    whole(guest, saved)


# What it gives


@pytest.mark.parametrize("state", ["s.vmz", "s.state"])
def test_a_guest_runs_and_gets_its_memory(guests: Guests, work: Path, saved: Saved, state: str) -> None:
    guest = guests.waiting()
    done = lazily(work, state=state)
    assert (done.status, done.text, done.err) == (0, LINES, "")
    whole(guest, saved)
    assert shell("vm-status b.qmp", work).text == "b.qmp: runs\n"


def test_starting_the_guest(guests: Guests, work: Path, saved: Saved) -> None:
    guest = Guest(work, "c")
    try:
        done = shell(f"vm-restore --lazy -- {shlex.join(guest.args)} < s.vmz; vm-status c.qmp", work)
        assert (done.status, done.err) == (0, "")
        assert done.text == f"{LINES}c.qmp: runs\n"
        guest.wait_count(saved.count + 1)
        assert guest.counts()[0] in range(saved.count, saved.count + 3)
    finally:
        shell(f"pkill -9 -f '{work}/c[.]qmp'", work)


def test_qemu_runs_it_itself(guests: Guests, work: Path, saved: Saved) -> None:
    guest = guests.start("b", incoming=f"exec:cd {work} && vm-restore --lazy --stdio s.vmz", extra=POSTCOPY)
    guest.wait_status("running")
    until(lambda: migration(guest) == "completed", 20, "all of it is there", guest.stderr)
    went_on(saved.count, guest)
    assert "vm-restore" not in guest.stderr()


def test_qemu_runs_it_itself_without_postcopy(guests: Guests, work: Path, saved: Saved) -> None:
    guest = guests.start("b", incoming=f"exec:cd {work} && sleep 0.5 && vm-restore --lazy --stdio s.vmz")
    until(lambda: "-global migration.x-postcopy-ram=on" in guest.stderr(), 20, "it says what is wrong", guest.stderr)
    assert "vm-restore: error: QEMU does not take the state" in guest.stderr()
    assert guest.count() is None


def test_run_and_paused(guests: Guests, work: Path, saved: Saved) -> None:
    guest, second, third = guests.waiting(), guests.waiting("c"), guests.waiting("d")
    done = lazily(work, state="paused")
    assert (done.status, done.out) == (0, b"")
    assert "hint: the guest stands paused; to let it run: vm-cont b.qmp" in done.err
    assert (guest.status(), migration(guest)) == ("paused", "completed")
    done = lazily(work, "--run", state="paused", guest="c.qmp")
    assert (done.status, done.text, done.err) == (0, LINES, "")
    assert second.running()
    done = lazily(work, "--paused", guest="d.qmp")
    assert (done.status, done.out) == (0, b"")
    assert third.status() == "paused"
    assert third.count() is None
    assert shell("vm-cont d.qmp", work).status == 0
    arrived(third, saved)


def test_it_is_the_memory_that_an_eager_restore_gives(guests: Guests, work: Path, saved: Saved) -> None:
    """Page by page, of guests that have not run since."""
    guests.waiting("b")
    guests.waiting("c")
    script = """
        set -e
        vm-restore -q --paused --lazy b.qmp < s.vmz; vm-restore -q --paused c.qmp < s.vmz
        vm-dump -q b.qmp > b.state; vm-dump -q c.qmp > c.state; vm-inspect --json --diff b.state c.state
    """
    done = shell(script, work)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["pages"]["pc.ram"] == []
    assert not any(found["pages"].values()), found["pages"]


def test_the_lines_end_when_the_guest_runs(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    """Who reads them need not wait for the memory."""
    guest = guests.waiting()
    server = serve("--lazy", "--on-demand")
    assert server.lines() == LINES
    assert server.process.poll() is None
    assert guest.running()
    assert server.kill(signal.SIGTERM) == 0
    arrived(guest, saved)


def test_json(guests: Guests, work: Path, saved: Saved) -> None:
    guests.waiting()
    done = lazily(work, "--json", "--progress")
    assert done.status == 0, done.err
    (first,) = map(json.loads, done.out.splitlines())
    assert (first["type"], first["state"], first["saved"], first["status"]) == ("running", "running", "running", 0)
    assert first["nics"] == [{"mac": "52:54:00:00:00:01", "iface": None, "addresses": []}]
    assert first["bytes"] == (work / "s.state").stat().st_size
    assert 0 < first["seconds"] < 30
    last = json.loads(done.err.splitlines()[-1])
    assert (last["type"], last["status"], last["guest"]) == ("result", 0, "b.qmp")
    assert 0 < last["asked"] <= last["sent"]
    assert 0 <= last["wait_median"] <= last["wait_p99"]
    done = shell("vm-restore --lazy --json b.qmp < s.vmz", work)
    assert json.loads(done.err)["status"] == done.status == 1


def test_nobody_takes_the_lines(guests: Guests, work: Path, saved: Saved) -> None:
    guest = guests.waiting()
    done = shell("vm-restore --lazy b.qmp < s.vmz > /dev/full", work)
    assert done.status == 0, done.err
    assert "could not be written to standard output" in done.err
    arrived(guest, saved)


# On demand


def test_only_what_is_asked_for(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    guest = guests.waiting()
    server = serve("--lazy", "--on-demand", "--json")
    server.lines()
    guest.wait_sum()
    first, holder = shell("vm-status b.qmp", work).text.splitlines()
    assert first == "b.qmp: runs while its memory is being brought from a file"
    assert holder.startswith("in the hands of vm-restore (process ")
    guest.end()
    # It is served as long as it lives, and no longer.
    assert server.process.wait(30) == 0
    found = server.result()
    assert 0 < found["sent"] <= found["asked"]
    assert found["bytes"] < (work / "s.state").stat().st_size // 2


def test_the_rest_on_a_signal(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    guest = guests.waiting()
    server = serve("--lazy", "--on-demand", "--json")
    server.lines()
    guest.wait_advance()
    assert server.kill(signal.SIGTERM) == 0
    found = server.result()
    assert found["asked"] < found["sent"]
    assert found["bytes"] > (work / "s.state").stat().st_size * 3 // 4
    arrived(guest, saved)


def test_a_signal_as_soon_as_qemu_has_begun(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    """The guest may run already, and then lacks everything."""
    guest = guests.waiting()
    server = serve("--lazy", "--on-demand")
    with guest.connect() as qmp:
        until(lambda: qmp.cmd("query-migrate").get("status", "none") != "none", 20, "it has begun")
    assert server.kill(signal.SIGTERM) == 0, server.err
    arrived(guest, saved)


def test_what_cannot_be_done_meanwhile(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    guest = guests.waiting()
    guests.waiting("c")
    server = serve("--lazy", "--on-demand")
    server.lines()
    for command in (
        "vm-dump b.qmp > t",
        "vm-dump --snapshot b.qmp > t",
        "vm-migrate b.qmp 'link:vm-restore --receive c.qmp'",
    ):
        done = shell(command, work)
        assert done.status == 1, (command, done.err)
        assert "its memory is still being brought" in done.err, (command, done.err)
    assert shell("vm-restore --resume b.qmp < s.vmz", work).status == 1
    # It can stand and run as any other.
    assert shell("vm-stop b.qmp", work).status == 0
    assert guest.status() == "paused"
    assert shell("vm-cont b.qmp", work).status == 0
    assert guest.running()
    assert server.kill(signal.SIGTERM) == 0
    arrived(guest, saved)


def test_ten_clones_of_one_file(guests: Guests, work: Path, states: Path, serve: Serve) -> None:
    state = saved_guest(states, kind="metal", mem=64)
    assert shell(f"vm-compress -q -o s.vmz {state}", work).status == 0
    clones = [guests.waiting(f"c{number}", kind="metal", mem=64) for number in range(10)]
    servers = [serve("--lazy", "--on-demand", "--run", guest=f"c{number}.qmp") for number in range(10)]
    for server in servers:
        assert server.lines() == LINES, server.err
    for guest, server in zip(clones, servers, strict=True):
        assert guest.running()
        assert server.process.poll() is None
    for guest, server in zip(clones, servers, strict=True):
        guest.end()
        assert server.process.wait(30) == 0, server.err


# In an order that was learnt


def test_record_and_prefetch(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    first, second = guests.waiting(), guests.waiting("c")
    server = serve("--lazy", "--on-demand", "--json", "--record", "order")
    server.lines()
    first.wait_sum()
    first.end()
    assert server.process.wait(30) == 0
    lines = (work / "order").read_text().splitlines()
    assert lines[0] == "vmstate order 1"
    wanted = sum(int(line.split()[-1]) for line in lines[1:])
    assert wanted == server.result()["asked"] > 100
    done = lazily(work, "--json", "--prefetch", "order", guest="c.qmp")
    assert done.status == 0, done.err
    arrived(second, saved)
    (work / "order").write_text("pc.ram 1 1\n")
    refused(lazily(work, "--prefetch", "order", guest="e.qmp"), 3, "order is no record of vm-restore --record")


# In the background


def test_detached(guests: Guests, work: Path, saved: Saved) -> None:
    guest = guests.waiting()
    done = lazily(work, "--detach", "-v", "--on-demand", "--log", "log")
    assert (done.status, done.text, done.err) == (0, LINES, "")
    assert guest.running()
    assert migration(guest) == "postcopy-active"
    server = int(
        shell(f"pgrep -f -- 'vm-restore --lazy --detach' | xargs pwdx | grep '{work}$'", work).text.split(":")[0]
    )
    os.kill(server, signal.SIGTERM)
    until(lambda: migration(guest) == "completed", 20, "all of it is there")
    until(lambda: "pages brought" in (work / "log").read_text(), 20, "it says so")
    until(lambda: not alive(server), 20, "it has ended")
    arrived(guest, saved)


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_detached_and_refused(guests: Guests, work: Path, saved: Saved) -> None:
    """What happens before the guest runs is said, and counts, as ever."""
    guests.running("b")
    refused(lazily(work, "--detach"), 1, "error: the guest at b.qmp does not wait for a state")
    refused(lazily(work, "--detach", guest="no.qmp"), 1, "no guest at no.qmp")
    refused(lazily(work, "--detach", "--log", "no/log", guest="c.qmp"), 1, "cannot write to no/log: No such file")


def test_detached_from_a_qemu_that_it_starts(guests: Guests, work: Path, saved: Saved) -> None:
    guest = Guest(work, "c")
    try:
        done = shell(f"vm-restore --lazy --detach -- {shlex.join(guest.args)} < s.vmz | cat", work)
        assert (done.status, done.text, done.err) == (0, LINES, "")
        guest.wait_count(saved.count + 1)
        until(lambda: shell("vm-status c.qmp", work).text == "c.qmp: runs\n", 20, "all of it is there")
    finally:
        shell(f"pkill -9 -f '{work}/c[.]qmp'", work)


# Whose server has died


@pytest.mark.parametrize("count", [0, 13, 2000, 10_000_003])
def test_killed_at_any_byte(guests: Guests, work: Path, saved: Saved, count: int) -> None:
    """Between pages, in a header, in a page."""
    guest = guests.waiting()
    dies(work, count, "--lazy", "b.qmp")
    lost(guest)
    taken_up(work, guest, saved)


@pytest.mark.parametrize("count", [-1, 4])
def test_killed_before_the_guest_runs(guests: Guests, work: Path, saved: Saved, count: int) -> None:
    """As a load that fails, and the state is in its file; or just after, as above."""
    guest = guests.waiting()
    dies(work, count, "--lazy", "b.qmp", since="-")

    assert ends_unless_lost(guest) or count > 0
    if guest.alive():
        return taken_up(work, guest, saved)
    assert guest.count() is None
    return None


def ends_unless_lost(guest: Guest) -> bool:
    """Whether a load that has lost its channel has failed: QEMU has ended, or waits for ever for a page of a device."""
    silent = 0

    def settled() -> str | None:
        nonlocal silent
        try:
            with guest.connect(1) as qmp:
                found = str(qmp.cmd("query-migrate").get("status"))
                return found if found in ("failed", "postcopy-paused") else None
        except TimeoutError:
            silent += 1
        except OSError:
            pass
        return "gone" if silent > 2 or not guest.alive() else None

    if until(settled, 20, "it has seen it") == "postcopy-paused":
        return False
    guest.end()
    return True


def abandoned(guests: Guests, serve: Serve) -> Guest:
    """One that has run for a while, and has lost its server."""
    guest = guests.waiting()
    server = serve("--lazy", "--on-demand")
    server.lines()
    guest.wait_advance()
    server.kill()
    lost(guest)
    return guest


def test_killed_twice_and_taken_up_from_another_file(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    """The same state in other frames, then not packed at all."""
    guest = abandoned(guests, serve)
    assert shell("vm-compress -q -5 -o slow.vmz s.state; ! cmp -s s.vmz slow.vmz", work).status == 0
    dies(work, 3_000_017, "--resume", "b.qmp", state="slow.vmz")
    lost(guest)
    refused(shell("vm-restore --resume b.qmp < other", work), 4, "not the state that the guest at b.qmp runs on")
    taken_up(work, guest, saved, "s.state")


def test_taken_up_on_demand(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    guest = guests.waiting()
    server = serve("--lazy", "--on-demand")
    server.lines()
    server.kill()
    lost(guest)
    said = shell("vm-status b.qmp", work).text
    assert said.endswith(
        "lacks a part of its memory: who brought it has ended\n"
        "next: vm-restore --resume --on-demand b.qmp < STATE.vmz\n"
    ), said
    second = serve("--resume", "--on-demand")
    assert second.lines() == ""
    guest.wait_advance()
    assert migration(guest) in ("postcopy-active", "postcopy-recover")
    guest.end()
    assert second.process.wait(30) == 0, second.err


@pytest.fixture
def silent(guests: Guests, work: Path, saved: Saved, serve: Serve) -> Guest:
    """A guest whose server died, and whose QEMU itself waits for a page: of the firmware, which nobody looks at."""
    guest = abandoned(guests, serve)
    with contextlib.suppress(TimeoutError), guest.connect(1) as qmp:
        qmp.cmd("human-monitor-command", **{"command-line": "xp /1wx 0x100000"})
        pytest.fail("this page was there")
    return guest


def test_a_qemu_that_waits_itself(silent: Guest, work: Path, saved: Saved) -> None:
    """Nothing reaches it by its monitor; it is given what it lacks from outside."""
    for command in ("vm-status", "vm-cont", "vm-dump -q -o x"):
        refused(shell(f"{command} b.qmp", work), 1, "the QEMU of the guest at b.qmp stands still: it waits for a page")
    refused(shell("vm-restore --resume b.qmp < other", work), 4, "not the state that QEMU .process .* runs on, or its")
    taken_up(work, silent, saved)


def test_a_rescue_that_dies_in_the_middle(silent: Guest, work: Path, saved: Saved) -> None:
    """QEMU answers then, and does not know what it was given."""
    with (work / "s.vmz").open("rb") as source:
        done = run(sys.executable, LAZY_FAULT, "fill", 20_000, "--resume", "b.qmp", cwd=work, stdin=source)
    assert done.status == -signal.SIGKILL, done.err
    taken_up(work, silent, saved)


def test_a_rescue_with_a_damaged_file(silent: Guest, work: Path, saved: Saved) -> None:
    damaged(work, random)
    refused(shell("vm-restore --resume b.qmp < t.vmz", work), 3, "page .* of RAM block 'pc.ram' cannot be read")
    taken_up(work, silent, saved)


@pytest.mark.root
def test_a_rescue_by_somebody_else(silent: Guest, work: Path, saved: Saved) -> None:
    """Who may not look into QEMU does not see why it is silent."""
    # A checkout may lie where another user cannot read.
    may_read = "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    nobody = f"setpriv --reuid 65534 --clear-groups {may_read}"
    script = f"chmod 755 . && chmod 777 b.qmp && {nobody} vm-restore --resume b.qmp < s.vmz"
    refused(shell(script, work), 1, "the monitor b.qmp does not answer")
    taken_up(work, silent, saved)


def test_the_server_that_qemu_runs_itself_dies(guests: Guests, work: Path, saved: Saved) -> None:
    """Its guest bears no mark of the state: whoever takes it up must know."""
    command = f"exec:cd {work} && echo $$ > pid && exec vm-restore --lazy --stdio --on-demand s.vmz"
    guest = guests.start("b", incoming=command, extra=POSTCOPY)
    guest.wait_status("running")
    guest.wait_count(saved.count + 2)
    os.kill(int((work / "pid").read_text()), signal.SIGKILL)
    lost(guest)
    refused(shell("vm-restore --resume b.qmp < s.vmz", work), 1, "not being restored lazily")
    done = shell("vm-restore --resume --force-unmarked b.qmp < s.vmz", work)
    assert (done.status, done.err) == (0, "")
    went_on(saved.count, guest)


def test_nothing_to_take_up(guests: Guests, work: Path, saved: Saved) -> None:
    guest = guests.waiting()
    refused(shell("vm-restore --resume b.qmp < s.vmz", work), 1, r"not being restored lazily \(inmigrate, none\)")
    still_waits(guest)
    assert lazily(work).status == 0
    refused(shell("vm-restore --resume b.qmp < s.vmz", work), 1, r"not being restored lazily \(running, completed\)")
    arrived(guest, saved)


def test_qemu_ends_in_the_middle(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    guest = guests.waiting()
    dies(work, 2000, "--lazy", "b.qmp")
    lost(guest)
    guest.end()
    done = shell("vm-restore --resume b.qmp < s.vmz", work)
    refused(done, 1, "no guest at b.qmp: nobody listens there")


# Files that are not what they were


def damaged(work: Path, which: Callable[[int, int], bool], most: int = 1 << 30) -> None:
    """A copy of s.vmz, t.vmz, with a bit changed in the frames that `which` chooses by packed and whole size."""
    data = bytearray((work / "s.vmz").read_bytes())
    with (work / "s.vmz").open("rb") as file:
        packed = VmzFile(file.fileno())
        for group in range(len(packed.tally.contents)):
            offsets, table = packed._table(group)
            for offset, size in zip(offsets, table.sizes, strict=False):
                if most and which(size, packed.tally.size):
                    data[offset + size // 2] ^= 4
                    most -= 1
    (work / "t.vmz").write_bytes(data)


def unreadable(work: Path) -> int:
    """A page of t.vmz."""
    with (work / "t.vmz").open("rb") as file:
        packed = VmzFile(file.fileno())
        for start, count, kind, _ in packed.blocks[b"pc.ram"].runs():
            for number in range(start, start + count, 16) if kind & NORMAL else ():
                try:
                    packed.page(b"pc.ram", number)
                except Damaged:
                    return number
    raise AssertionError("all of t.vmz can be read")


# The frames of the random block, of which the guest makes a sum every other second.
def random(size: int, whole: int) -> bool:
    return size > whole * 0.97


def test_damage_that_nobody_has_asked_for(guests: Guests, work: Path, saved: Saved) -> None:
    """Of one frame, which is wanted first; the guest is stopped, unless it has come upon it itself by then."""
    guest = guests.waiting()
    damaged(work, random, 1)
    (work / "order").write_text(f"vmstate order 1\npc.ram {unreadable(work)} 1\n")
    done = lazily(work, "--prefetch", "order", state="t.vmz")
    assert (done.status, done.text) == (3, LINES), done.err
    pages = r"error: 0x[0-9a-f]+ to 0x[0-9a-f]+ of RAM block 'pc.ram' cannot be read: .* at offset \d+.*"
    assert re.search(pages + "; the guest at b.qmp (was stopped|stands still)", done.err), done.err
    assert "with a good copy of this state: vm-restore --resume b.qmp < STATE.vmz" in done.err
    lost(guest)
    if "was stopped" in done.err:
        assert guest.status() == "paused"
        assert "lacks a part of its memory: the file could not be read" in shell("vm-status b.qmp", work).text
        refused(shell("vm-cont b.qmp", work), 1, "is migrating .postcopy-paused")
    taken_up(work, guest, saved)


def test_damage_in_a_page_that_is_asked_for(guests: Guests, work: Path, saved: Saved) -> None:
    """It stands still, as a guest whose disk does not answer, until it is served again."""
    guest = guests.waiting()
    damaged(work, random)
    done = lazily(work, "--on-demand", state="t.vmz")
    assert (done.status, done.text) == (3, LINES), done.err
    assert "stands still as soon as it needs a page that it lacks" in done.err
    assert "vm-restore --resume --on-demand b.qmp < STATE.vmz" in done.err
    taken_up(work, guest, saved)


def test_damage_before_it_runs(guests: Guests, work: Path, saved: Saved) -> None:
    """The devices look at the memory, too, while they are loaded; then it is as a load that fails."""
    guest = guests.waiting()
    damaged(work, lambda size, whole: not random(size, whole))
    refused(lazily(work, state="t.vmz"), 3, "corrupt frame|cannot be read")
    until(lambda: not guest.alive() or guest.status() == "inmigrate", 20, "it has seen it")
    assert guest.count() is None


def test_a_file_that_shrinks(guests: Guests, work: Path, saved: Saved, serve: Serve) -> None:
    guest = guests.waiting()
    (work / "t.state").write_bytes((work / "s.state").read_bytes())
    server = serve("--lazy", "--on-demand", state="t.state")
    server.lines()
    os.truncate(work / "t.state", 30_000_000)
    assert server.kill(signal.SIGTERM) == 3
    assert "the file has become shorter" in server.err
    lost(guest)
    taken_up(work, guest, saved)


def test_a_disk_that_cannot_be_read(guests: Guests, work: Path, saved: Saved) -> None:
    """A place of the file gives an error: not every kernel can have a disk do that, so the system call does it."""
    guest = guests.waiting()
    with (work / "s.state").open("rb") as source:
        done = run(sys.executable, LAZY_FAULT, "eio", 60_000_000, "--lazy", "b.qmp", cwd=work, stdin=source)
    refused(
        Done(done.status, b"", done.err), 3, "of RAM block 'pc.ram' cannot be read: .*Input/output error; the guest"
    )
    assert "with a good copy of this state: vm-restore --resume b.qmp" in done.err
    lost(guest)
    taken_up(work, guest, saved)


# What is refused while the guest waits


def test_what_is_no_input_for_it(guests: Guests, work: Path, saved: Saved) -> None:
    guest = guests.waiting()
    shell("zstd -q -c -1 < s.state > zst; echo | gzip > gz; head -c -1 s.vmz > cut; head -c -1000 s.state > cut2", work)
    data = bytearray((work / "s.vmz").read_bytes())
    with (work / "s.vmz").open("rb") as file:
        data[VmzFile(file.fileno()).end + 100] ^= 1
    (work / "end").write_bytes(data)
    for script, status, words in (
        ("cat s.vmz | vm-restore --lazy b.qmp", 2, r"cannot seek\n.*hint: .*vm-restore --lazy GUEST < STATE.vmz"),
        ("vm-restore --lazy b.qmp < zst", 2, "has no index of its pages\n.*hint: .*vm-compress"),
        ("vm-restore --lazy b.qmp < gz", 2, "has no index of its pages\n.*hint: "),
        ("vm-restore --lazy b.qmp < /dev/null", 3, "the input is empty"),
        ("vm-restore --lazy b.qmp < cut", 3, "truncated at offset"),
        ("vm-restore --lazy b.qmp < cut2", 3, "truncated at offset"),
        ("vm-restore --lazy b.qmp < end", 3, "end record|seek table"),
        ("vm-restore --lazy --stdio zst", 2, "has no index"),
    ):
        refused(shell(script, work), status, words)
    still_waits(guest)
    assert lazily(work).status == 0
    arrived(guest, saved)


@pytest.mark.parametrize("name", ["xbzrle-7.2", "xbzrle-10.0", "ignore-shared-10.0", "compress-7.2", "block-7.2"])
def test_states_that_postcopy_cannot_take(work: Path, name: str) -> None:
    """Said of the state, before the guest is looked for."""
    (work / "s").write_bytes(stream(name))
    words = {
        "xbzrle": "differences",
        "ignore-shared": "x-ignore-shared",
        "compress": "packed",
        "block": "more than RAM",
    }
    refused(shell("vm-restore --lazy no.qmp < s", work), 1, words[name.rpartition("-")[0]])
    shell("vm-compress -q -o s.vmz s", work)
    refused(shell("vm-restore --lazy no.qmp < s.vmz", work), 1, words[name.rpartition("-")[0]])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"machine": "pc"}, "of machine type 'pc-q35"),
        ({"extra": ["-smp", "2"]}, "the state has 1 vCPUs, the guest at b.qmp has 2"),
        ({"extra": ["-device", "virtio-rng-pci"]}, "at PCI address .* the state has nothing"),
        ({"net": []}, "at PCI address .* has nothing"),
        ({"mem": 320}, "'pc.ram' has 268435456 bytes in the state"),
    ],
)
def test_another_guest(guests: Guests, work: Path, saved: Saved, other: dict[str, object], words: str) -> None:
    guest = guests.waiting(**other)
    refused(lazily(work), 4, words)
    still_waits(guest)


@pytest.mark.parametrize("kind", ["vmz", "state"])
def test_memory_that_others_share(guests: Guests, work: Path, saved: Saved, kind: str) -> None:
    memory = ["-object", "memory-backend-memfd,id=pc.ram,share=on,size=256M", "-machine", "memory-backend=pc.ram"]
    guest = guests.waiting(extra=memory)
    done = lazily(work, state=f"s.{kind}")
    refused(done, 1, r"RAM that others share \(pc.ram\)")
    assert "--lazy-or-eager" in done.err
    still_waits(guest)
    done = shell(f"vm-restore --lazy-or-eager b.qmp < s.{kind}", work)
    assert (done.status, done.text) == (0, LINES), done.err
    assert "warning: restored as a whole before it runs, since the guest at b.qmp has RAM that others share" in done.err
    went_on(saved.count, guest)


@pytest.fixture
def huge(work: Path) -> Iterator[Path]:
    """A file system of huge pages, with room for a guest."""
    wanted = Path("/proc/sys/vm/nr_hugepages")
    before = wanted.read_text()
    folder = work / "huge"
    folder.mkdir()
    wanted.write_text(str(int(before) + 140))
    try:
        assert run("mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", folder).status == 0
        yield folder
    finally:
        run("umount", "-l", folder)
        wanted.write_text(before)


@pytest.mark.root
def test_memory_of_huge_pages(huge: Path, guests: Guests, work: Path, saved: Saved) -> None:
    """A page of 2 MiB cannot come in parts."""
    memory = [
        "-object",
        f"memory-backend-file,id=pc.ram,mem-path={huge},size=256M",
        "-machine",
        "memory-backend=pc.ram",
    ]
    guest = guests.waiting(extra=memory)
    done = lazily(work)
    refused(done, 1, r"has pages that are not of 4 KiB: pc.ram")
    assert "--lazy-or-eager" in done.err
    still_waits(guest)
    done = shell("vm-restore --lazy-or-eager b.qmp < s.vmz", work)
    assert (done.status, done.text) == (0, LINES), done.err
    went_on(saved.count, guest)
    guest.end()


def test_a_qemu_in_a_sandbox(guests: Guests, work: Path, saved: Saved) -> None:
    """Its filter of system calls has userfaultfd in it."""
    guest = guests.waiting(
        extra=["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    )
    done = lazily(work)
    assert (done.status, done.text, done.err) == (0, LINES, "")
    whole(guest, saved)


@pytest.mark.parametrize("source", ["cat s.state |", "zstd -q -1 -c < s.state > z; < z", "< s.vmz"])
def test_eager_where_it_cannot_be_lazy(guests: Guests, work: Path, saved: Saved, source: str) -> None:
    guest = guests.waiting()
    done = shell(f"{source} vm-restore --lazy-or-eager b.qmp", work)
    assert (done.status, done.text) == (0, LINES), done.err
    assert ("warning: restored as a whole before it runs, since" in done.err) == ("vmz" not in source)
    went_on(saved.count, guest)


@pytest.mark.root
@pytest.mark.nobody
def test_a_host_that_forbids_it(guests: Guests, work: Path, saved: Saved, forbidden: None) -> None:
    """Without the rights for userfaultfd: a reason, and nothing has begun; or an eager restore."""
    os.chmod(work, 0o755)
    guest = guests.waiting(user=65534)
    done = lazily(work)
    refused(done, 1, "this QEMU cannot load lazily here: .*\n.*hint: .*sysctl vm.unprivileged_userfaultfd=1")
    still_waits(guest)
    done = shell("vm-restore --lazy-or-eager b.qmp < s.vmz", work)
    assert (done.status, done.text) == (0, LINES), done.err
    went_on(saved.count, guest)


def test_one_that_does_not_wait(guests: Guests, work: Path, saved: Saved) -> None:
    guest = guests.running("b")
    refused(lazily(work), 1, "does not wait for a state: it is 'running'")
    as_it_was(guest)
