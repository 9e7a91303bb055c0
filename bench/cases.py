"""The comparisons, by name: each gives the rows it found.  What is decoded and compared is not timed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from announcing import ANNOUNCING
from lab import Events, Lab, judge_state, load, migrate, outcome
from lazily import clones, lazy
from measure import SINK, Row, busy, interleave, peak, pipeline, same
from moves import MOVES
from packed import packed
from pauses import pause
from vm import Guest

RECIPIENT = "bench@example.org"
GPG = ["gpg", "-q", "--batch", "-e", "-r", RECIPIENT]
OURS_BACK, GPG_BACK = ["vm-encrypt", "-d"], ["gpg", "-q", "--batch", "-d"]
PART = 512 << 20
LIMIT_START = 0.1
LIMIT_MEMORY = 256 << 20
COMMANDS = sorted(path.name for path in Path(__file__).resolve().parent.parent.joinpath("bin").glob("vm-*"))
CAT = "cat > /dev/null"
# QEMU's pipe has 64 KiB; its reader can make it larger.
WIDEN = "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETPIPE_SZ, 1 << 20); os.execvp('cat', ['cat'])"
WIDE_CAT = f'{sys.executable} -c "{WIDEN}" > /dev/null'
NARROW, WIDE = "exec:cat", "exec:cat, 1 MiB pipe"


def dump(lab: Lab) -> Iterator[Row]:
    """A guest that stands, into `cat > /dev/null`."""
    for kind, inside_wanted, whole_wanted in (("linux", 1.3, None), ("metal", None, 1.0)):
        guest, size = lab.guest(kind), lab.size(kind)
        inside, whole = _dumps(lab, guest, lab.rounds * 2)
        for peer in (NARROW, WIDE):
            # QEMU's own clock for both, from `migrate` to the word of whoever takes the state that it has all of it.
            what, wanted = f"from migrate to the end of data, {size}", inside_wanted if peer == NARROW else None
            yield Row("dump", "vm-dump", peer, what, "s", inside["vm-dump"], inside[peer], wanted)
            what, wanted = f"whole command with Python's start, {size}", whole_wanted if peer == NARROW else None
            yield Row("dump", "vm-dump", peer, what, "s", whole["vm-dump"], whole[peer], wanted)
        if kind == "linux":
            yield from _same_states(lab, guest)
            with busy():
                inside, _ = _dumps(lab, guest, lab.rounds)
            for peer in (NARROW, WIDE):
                what = "the first, while another process keeps a core busy"
                yield Row("dump", "vm-dump", peer, what, "s", inside["vm-dump"], inside[peer])


Times = dict[str, list[float]]


def _dumps(lab: Lab, guest: Guest, rounds: int) -> tuple[Times, Times]:
    """Seconds by QEMU's clock and those of the whole command, of our way and of QEMU's two."""
    inside: Times = {}
    sent: dict[str, int] = {}

    def measured(name: str, work: Callable[[], float]) -> float:
        lab.stand(guest)
        seconds = work()
        guest.wait_status("postmigrate")
        info = outcome(guest)
        inside.setdefault(name, []).append(info["total-time"] / 1000)
        sent[name] = info["ram"]["transferred"]
        return seconds

    ways = {
        "vm-dump": lambda: pipeline(["vm-dump", "-q", guest.qmp], SINK),
        NARROW: lambda: migrate(guest, CAT),
        WIDE: lambda: migrate(guest, WIDE_CAT),
    }
    runners = {name: lambda name=name, way=way: measured(name, way) for name, way in ways.items()}
    interleave(1, runners)
    inside.clear()
    whole = interleave(rounds, runners)
    if max(sent.values()) - min(sent.values()) > max(sent.values()) // 50:
        raise RuntimeError(f"not the same work: {sent}")
    return inside, whole


def _same_states(lab: Lab, guest: Guest) -> Iterator[Row]:
    """Both ways write whole states of one size."""
    one, other = lab.folder / "one", lab.folder / "other"
    lab.stand(guest)
    pipeline(["vm-dump", "-q", guest.qmp], ["cat"], sink=one)
    lab.stand(guest)
    migrate(guest, f"cat > {other}")
    (size, end), (their_size, their_end) = judge_state(one), judge_state(other)
    if end.devices != their_end.devices:
        raise RuntimeError(f"{end.devices} devices and {their_end.devices}")
    lab.forget("one", "other")
    yield Row("dump", "vm-dump", "exec:cat", "size of the state", "B", [size], [their_size])


def compress(lab: Lab) -> Iterator[Row]:
    """A guest that stands into a compressed file."""
    guest = lab.guest("linux")
    one, other = lab.folder / "one.zst", lab.folder / "other.gz"

    def ours() -> float:
        lab.stand(guest)
        return pipeline(["vm-dump", "-q", guest.qmp], ["vm-compress"], sink=one)

    def theirs() -> float:
        lab.stand(guest)
        return migrate(guest, f"gzip -c > {other}")

    taken = interleave(lab.rounds, {"ours": ours, "theirs": theirs})
    judge_state(one, ["zstd", "-dc"])
    judge_state(other, ["gzip", "-dc"])
    what, sizes = "a guest into a file", ([one.stat().st_size], [other.stat().st_size])
    lab.forget("one.zst", "other.gz")
    yield Row("compress", "vm-dump | vm-compress", "exec:gzip -c", what, "s", taken["ours"], taken["theirs"], 10)
    yield Row("compress", "vm-dump | vm-compress", "exec:gzip -c", "size", "B", *sizes, target=0.93)


def _packers() -> dict[str, tuple[list[str], list[str]]]:
    """How to pack and unpack, by name."""
    packers = {"vm-compress": (["vm-compress"], ["vm-compress", "-d"])}
    packers |= {f"zstd -{n} -T0": (["zstd", "-q", f"-{n}", "-T0", "-c"], ["zstd", "-q", "-d", "-c"]) for n in (1, 2, 3)}
    packers["gzip -1"] = (["gzip", "-1", "-c"], ["gzip", "-d", "-c"])
    packers["lz4"] = (["lz4", "-q", "-c"], ["lz4", "-q", "-d", "-c"])
    return {name: pair for name, pair in packers.items() if shutil.which(pair[0][0])}


def filters(lab: Lab) -> Iterator[Row]:
    """Packers over one and the same saved state."""
    state, packers = lab.state("linux"), _packers()
    lab.drop("linux")
    packed = {name: lab.folder / f"packed.{number}" for number, name in enumerate(packers)}
    plain = lab.folder / "plain"

    def pack(name: str) -> float:
        return pipeline(packers[name][0], source=state, sink=packed[name])

    def unpack(name: str) -> float:
        return pipeline(packers[name][1], source=packed[name], sink=plain)

    def checked(name: str) -> float:
        seconds = unpack(name)
        same(plain, state)
        return seconds

    packing = interleave(lab.rounds, {name: lambda name=name: pack(name) for name in packers})
    unpacking = interleave(lab.rounds, {name: lambda name=name: checked(name) for name in packers})
    sizes = {name: [path.stat().st_size] for name, path in packed.items()}
    # The foreign tool on our own file, whose content it must give back too.
    theirs = interleave(lab.rounds, {"": lambda: pipeline(["zstd", "-qdc"], source=packed["vm-compress"], sink=plain)})
    same(plain, state)
    lab.forget("plain", *(path.name for path in packed.values()))
    mine = "vm-compress"
    for name in list(packers)[1:]:
        yield Row("filters", mine, name, "pack a state", "s", packing[mine], packing[name])
        yield Row("filters", mine, name, "size", "B", sizes[mine], sizes[name])
        if name not in ("zstd -1 -T0", "zstd -2 -T0"):
            back = f"{name.split()[0]} -d"
            yield Row("filters", f"{mine} -d", back, "unpack its own", "s", unpacking[mine], unpacking[name])
    yield Row("filters", f"{mine} -d", "zstd -d", "unpack the same", "s", unpacking[mine], theirs[""])


def verify(lab: Lab) -> Iterator[Row]:
    """The judge over whole states, beside what only moves the bytes."""
    for kind, wanted in (("metal", 1.0), ("linux", None)):
        state = lab.state(kind)
        lab.drop(kind)

        def ours(state: Path = state) -> float:
            return pipeline(["vm-verify"], source=state)

        def theirs(state: Path = state) -> float:
            return pipeline(["cat", str(state)], SINK)

        taken = interleave(lab.rounds, {"ours": ours, "theirs": theirs})
        size = lab.size(kind)
        yield Row("verify", "vm-verify", "cat F | cat", size, "s", taken["ours"], taken["theirs"], wanted)
        if wanted:
            needed = peak(["vm-verify"], source=state)
            yield Row("verify", "vm-verify", "128 MiB", "peak memory", "B", [needed], [128 << 20], 1)
    seen = interleave(lab.rounds, {"": lambda: pipeline(["vm-inspect"], SINK, source=lab.state("linux"))})
    yield Row("verify", "vm-inspect", "cat F | cat", lab.size("linux"), "s", seen[""], taken["theirs"])


class Keys:
    """A GnuPG home with one key, its agent surely ended."""

    def __init__(self, lab: Lab) -> None:
        self._home = lab.folder / "keys"
        self._before = os.environ.get("GNUPGHOME")

    def __enter__(self) -> None:
        self._home.mkdir(mode=0o700)
        os.environ["GNUPGHOME"] = str(self._home)
        words = ["--quick-gen-key", RECIPIENT, "default", "default", "never"]
        subprocess.run(
            ["gpg", "--batch", "-q", "--passphrase", "", *words], check=True, timeout=60, capture_output=True
        )

    def __exit__(self, *_: object) -> None:
        subprocess.run(["gpgconf", "--kill", "all"], check=False, timeout=30)
        shutil.rmtree(self._home, ignore_errors=True)
        if self._before is None:
            del os.environ["GNUPGHOME"]
        else:
            os.environ["GNUPGHOME"] = self._before


def encrypt(lab: Lab) -> Iterator[Row]:
    """At least 2 GiB, which cannot be compressed: what comes to it has been packed before."""
    state, part = lab.state("metal"), lab.folder / "part"
    lab.drop("metal")
    # gpg's own way would take minutes for all of it.
    with state.open("rb") as whole, part.open("wb") as out:
        os.sendfile(out.fileno(), whole.fileno(), None, PART)
    mine, plain, packing = (["vm-encrypt", "-r", RECIPIENT], [*GPG, "-z", "0"], GPG)
    with Keys(lab):
        fast = interleave(lab.rounds, {"ours": _encrypter(lab, mine, state), "theirs": _encrypter(lab, plain, state)})
        slow = interleave(lab.rounds, {"ours": _encrypter(lab, mine, part), "theirs": _encrypter(lab, packing, part)})
        pipeline(mine, source=state, sink=lab.folder / "message")
        backwards = interleave(lab.rounds, {"ours": _decrypter(lab, OURS_BACK), "theirs": _decrypter(lab, GPG_BACK)})
        lab.forget("message", "part")
        chain = _chain(lab)
    size, less = lab.size("metal"), "a part of it, 512 MiB at most"
    yield Row("encrypt", "vm-encrypt", "gpg -e -z 0", size, "s", fast["ours"], fast["theirs"], 0.95)
    yield Row("encrypt", "vm-encrypt", "gpg -e", less, "s", slow["ours"], slow["theirs"], 6)
    yield Row("encrypt", "vm-encrypt -d", "gpg -d", size, "s", backwards["ours"], backwards["theirs"], 0.95)
    yield chain


def _chain(lab: Lab) -> Row:
    """A guest that stands into a packed and encrypted file."""
    guest = lab.guest("linux")
    one, other, home = lab.folder / "one.gpg", lab.folder / "other.gpg", os.environ["GNUPGHOME"]

    def ours() -> float:
        lab.stand(guest)
        return pipeline(["vm-dump", "-q", guest.qmp], ["vm-compress"], ["vm-encrypt", "-r", RECIPIENT], sink=one)

    def theirs() -> float:
        lab.stand(guest)
        # QEMU was started before there was a key.
        return migrate(guest, f"gzip -c | {' '.join(GPG)} --homedir {home} > {other}")

    taken = interleave(lab.rounds, {"ours": ours, "theirs": theirs})
    for path, unpack in ((one, "zstd -qdc"), (other, "gzip -dc")):
        judge_state(path, ["bash", "-o", "pipefail", "-c", f"{' '.join(GPG_BACK)} | {unpack}"])
    lab.forget("one.gpg", "other.gpg")
    names = ("vm-dump | vm-compress | vm-encrypt", "exec:gzip -c | gpg -e")
    return Row("encrypt", *names, "a guest into a file", "s", taken["ours"], taken["theirs"], 8)


def _encrypter(lab: Lab, command: list[str], source: Path) -> Callable[[], float]:
    """A runner; the first message that it makes is decrypted by the other of the two and compared."""
    message, plain = lab.folder / "message", lab.folder / "plain"
    back = OURS_BACK if command[0] == "gpg" else GPG_BACK
    compared = False

    def runner() -> float:
        nonlocal compared
        seconds = pipeline(command, source=source, sink=message)
        if not compared:
            pipeline(back, source=message, sink=plain)
            same(plain, source)
            compared = True
        lab.forget("message", "plain")
        return seconds

    return runner


def _decrypter(lab: Lab, command: list[str]) -> Callable[[], float]:
    return lambda: pipeline(command, SINK, source=lab.folder / "message")


def restore(lab: Lab) -> Iterator[Row]:
    """The same file into a QEMU that waits, until its guest runs."""
    for kind in ("linux", "metal"):
        state = lab.state(kind)
        lab.drop(kind)

        def ours(kind: str = kind, state: Path = state) -> float:
            return _until_it_runs(lab, kind, lambda guest: _restored(guest, state))

        def theirs(kind: str = kind, state: Path = state) -> float:
            return _until_it_runs(lab, kind, lambda guest: load(guest, state))

        taken = interleave(lab.rounds, {"ours": ours, "theirs": theirs})
        what = f"whole command until the guest runs, {lab.size(kind)}"
        yield Row("restore", "vm-restore", "-incoming exec:cat", what, "s", taken["ours"], taken["theirs"])


def _restored(guest: Guest, state: Path) -> float:
    with Events(guest.path("test")) as events:
        begun = time.time()
        pipeline(["vm-restore", "-q", guest.qmp], source=state)
        return events.wait_for("RESUME") - begun


def _until_it_runs(lab: Lab, kind: str, work: Callable[[Guest], float]) -> float:
    with lab.waiting(kind) as guest:
        seconds = work(guest)
        if not guest.running():
            raise RuntimeError("the restored guest does not run")
        return seconds


def start(lab: Lab) -> Iterator[Row]:
    """`--help` of every command, beside a Python that does nothing."""
    runners = {name: lambda name=name: pipeline([name, "--help"]) for name in COMMANDS}
    runners["python3"] = lambda: pipeline([sys.executable, "-c", "pass"])
    taken = interleave(2 if lab.quick else 11, runners)
    for name in COMMANDS:
        yield Row("start", f"{name} --help", "100 ms", "start-up", "s", taken[name], [LIMIT_START], 1)
    heaviest = max(COMMANDS, key=lambda name: min(taken[name]))
    yield Row("start", f"{heaviest} --help", "python3 -c pass", "start-up", "s", taken[heaviest], taken["python3"])


def memory(lab: Lab) -> Iterator[Row]:
    """The most memory that a command and its children need, each at the largest job here."""
    needed: dict[str, int] = {}
    guest = lab.guest("metal")
    guest.cmd("cont")
    needed["vm-status"] = peak(["vm-status", guest.qmp])
    needed["vm-stop"] = peak(["vm-stop", guest.qmp])
    needed["vm-cont"] = peak(["vm-cont", guest.qmp])
    needed["vm-dump"] = peak(["vm-dump", "-q", guest.qmp], SINK)
    lab.stand(guest)
    sink = ["vm-dump", "-q", "--stop", "--to", CAT, guest.qmp]
    needed["vm-dump --to"] = peak(sink)
    state = lab.state("metal")
    lab.drop("metal")
    with lab.waiting("metal") as target:
        needed["vm-restore"] = peak(["vm-restore", "-q", target.qmp], source=state)
    needed["vm-announce"] = peak(["vm-announce", "-n"])
    packed, message = lab.folder / "packed", lab.folder / "message"
    needed["vm-compress"] = peak(["vm-compress"], source=state, sink=packed)
    needed["vm-compress -9"] = peak(["vm-compress", "-9"], source=lab.state("linux"))
    needed["vm-compress -d"] = peak(["vm-compress", "-d"], SINK, source=packed)
    with Keys(lab):
        needed["vm-encrypt"] = peak(["vm-encrypt", "-r", RECIPIENT], source=state, sink=message)
        needed["vm-encrypt -d"] = peak(["vm-encrypt", "-d"], SINK, source=message)
    needed["vm-inspect"] = peak(["vm-inspect"], source=state)
    lab.forget("packed", "message")
    for name, count in needed.items():
        yield Row("memory", name, "256 MiB", "peak memory", "B", [count], [LIMIT_MEMORY], 1)


CASES: dict[str, Callable[[Lab], Iterator[Row]]] = {
    case.__name__: case
    for case in (start, dump, pause, compress, packed, restore, lazy, clones, filters, verify, memory, encrypt)
} | MOVES
CASES |= ANNOUNCING
# Only root can make the hosts of these.
OF_ROOT = {*MOVES, *ANNOUNCING}
