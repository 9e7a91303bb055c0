"""How soon the network finds a guest again that has moved, by who announces it.

As for `gap` two hosts are namespaces with a switch between them, and one guest goes back and forth by QEMU's `tcp:`.
From the switch's place it is pinged without end.  What is measured begins where it runs at its new place, by QEMU's own
clock, and ends with the first answer to a ping, by the kernel's.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from lab import Events, Lab, outcome, tell
from measure import Row, end
from moves import DOWNTIME_MS, PORT, RATE, Crashed, Pair, Traveller, hear, listening, turn
from net.hosts import ADDRESS, GUEST
from net.wires import waits
from publish import ANNOUNCE_LIMIT
from vm import MAC, Guest, until

# Who has not answered by then does not answer because of an announcement.
LATEST = 2.0
SETTLED = 0.2
EXTRA = 0.030
FIRST_FRAME = 0.005
OURS, THEIRS, ARPING, NONE = "vm-announce", "QEMU's own", "arping -A", "no announcement"
QUIET = {"announce-rounds": 0}
RHYTHM = {"announce-initial": 50, "announce-max": 550, "announce-rounds": 5, "announce-step": 100}

# Pings at a fixed rate, not while it is hushed.  Told a time, it says how long after that the first answer came, or
# `none`.
PINGER = """
import os, select, socket, struct, sys, time
address, period, latest = sys.argv[1], 1 / float(sys.argv[2]), float(sys.argv[3])
link = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
link.setsockopt(socket.SOL_SOCKET, 35, 1)
link.setblocking(False)
mine = os.getpid() & 0xFFFF

def ping(number):
    total = 0x0800 + mine + (number & 0xFFFF)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">HHHH", 0x0800, ~total & 0xFFFF, mine, number & 0xFFFF)

arrivals, number, said, hushed, since, due = [], 0, False, False, None, time.monotonic()
while True:
    if time.monotonic() >= due and not hushed:
        try:
            link.sendto(ping(number), (address, 0))
        except OSError:
            pass
        number, due = number + 1, max(due + period, time.monotonic() - period)
    rest = None if hushed else max(0, due - time.monotonic())
    ready = select.select([link] if since else [link, sys.stdin], [], [], rest)[0]
    if link in ready:
        data, words, _, _ = link.recvmsg(256, 256)
        if data[20] == 0 and struct.unpack(">H", data[24:26])[0] == mine:
            seconds, nanoseconds = struct.unpack("qq", words[0][2][:16])
            arrivals.append(seconds + nanoseconds / 1e9)
    if sys.stdin in ready:
        word = sys.stdin.readline()
        hushed = word.strip() == "hush"
        since, due = None if hushed else float(word), time.monotonic()
    if not said and len(arrivals) > 20:
        said = True
        print("up", flush=True)
    if since:
        answers = [moment for moment in arrivals if moment > since]
        if answers or time.time() > since + latest:
            print(answers[0] - since if answers else "none", flush=True)
            break
"""

# Says when the first frame of a card came by an interface, by the kernel's clock.
WATCHER = """
import socket, struct, sys
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
link.setsockopt(socket.SOL_SOCKET, 35, 1)
link.bind((sys.argv[1], 0))
print("ready", flush=True)
while True:
    data, words, _, _ = link.recvmsg(256, 256)
    if data[6:12].hex(":") == sys.argv[2]:
        seconds, nanoseconds = struct.unpack("qq", words[0][2][:16])
        print(seconds + nanoseconds / 1e9, flush=True)
        break
"""

Speaker = Callable[[], object]


@contextlib.contextmanager
def by_us(traveller: Traveller) -> Iterator[Speaker]:
    """As at the end of a pipeline: it waits for the line, which comes as soon as the guest runs."""
    with waiting(traveller.pair.on(traveller.next, "vm-announce")) as process:
        yield lambda: give(process, f"{MAC} tap0 {GUEST}\n")
        process.wait(30)
    if process.returncode:
        raise RuntimeError(f"vm-announce ended with {process.returncode}")


@contextlib.contextmanager
def by_arping(traveller: Traveller) -> Iterator[Speaker]:
    """In the guest's name as far as it can be: the frame's sender is the bridge."""
    pair, started = traveller.pair, []
    pair.net.sh(traveller.next, "sysctl -qw net.ipv4.ip_nonlocal_bind=1")
    command = pair.on(traveller.next, "arping", "-q", "-A", "-c", "3", "-I", "br0", "-s", GUEST, GUEST)
    try:
        yield lambda: started.append(subprocess.Popen(command, start_new_session=True))
    finally:
        for process in started:
            end(process)


@contextlib.contextmanager
def by_nobody(_: Traveller) -> Iterator[Speaker]:
    yield lambda: None


WAYS = {OURS: (by_us, QUIET), THEIRS: (by_nobody, RHYTHM), ARPING: (by_arping, QUIET), NONE: (by_nobody, QUIET)}


@contextlib.contextmanager
def waiting(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A command that stands still until it is given a line."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        until(lambda: waits(process.pid), 20, f"{command!r} waits for a line")
        yield process
    finally:
        end(process)
        if process.stdin:
            process.stdin.close()


def give(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin
    process.stdin.write(line.encode())
    process.stdin.close()
    process.stdin = None


def found_again(name: str, traveller: Traveller, there: Guest) -> float:
    """Seconds from its running there to its first answer."""
    how, parameters = WAYS[name]
    there.cmd("migrate-set-parameters", **parameters)
    pair, ping = traveller.pair, [sys.executable, "-c", PINGER, GUEST, str(RATE), str(LATEST)]
    with listening(pair.on("S", *ping), "up") as pinger, how(traveller) as speak:
        # What it got last it would answer at its new place at first, and be found by that.
        tell_pinger(pinger, "hush")
        time.sleep(SETTLED)
        move(traveller, there, speak, lambda moment: tell_pinger(pinger, repr(moment)))
        said = hear(pinger, LATEST + 10)
    # So that the next one starts from a network that knows where it is.
    there.cmd("announce-self", **{name.removeprefix("announce-"): value for name, value in RHYTHM.items()})
    if not said:
        raise Crashed("who pings has ended")
    return LATEST if said == "none" else float(said)


def tell_pinger(pinger: subprocess.Popen[bytes], word: str) -> None:
    assert pinger.stdin
    pinger.stdin.write(f"{word}\n".encode())
    pinger.stdin.flush()


def move(traveller: Traveller, there: Guest, speak: Speaker, tell_since: Callable[[float], object]) -> None:
    """By QEMU's own; once the guest runs there somebody speaks, and the time of that is told."""
    uri = f"tcp:{ADDRESS[traveller.next]}:{PORT}"
    for guest in (traveller.here, there):
        guest.cmd("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}])
    there.cmd("migrate-incoming", uri=uri)
    limits = {"max-bandwidth": 0, "downtime-limit": DOWNTIME_MS}
    traveller.here.cmd("migrate-set-parameters", **limits)
    with Events(traveller.here.path("test"), 300) as monitor, Events(there.path("test"), 300) as other:
        tell(monitor, True)
        monitor.cmd("migrate", uri=uri)
        since = other.wait_for("RESUME")
        speak()
        tell_since(since)
        monitor.wait_for("MIGRATION", status="completed")
    outcome(traveller.here)


def first_frame(pair: Pair) -> float:
    """Seconds from a line to the first frame of it, by a command that waits for lines."""
    with (
        listening(pair.on("S", sys.executable, "-c", WATCHER, "vA", MAC), "ready") as watcher,
        waiting(pair.on("A", "vm-announce", "--rounds", "1")) as process,
    ):
        begun = time.time()
        give(process, f"{MAC} br0 {GUEST}\n")
        return float(hear(watcher, 10)) - begun


def announce(lab: Lab) -> Iterator[Row]:
    """From a guest that runs at its new place to its first answer."""
    rounds = 1 if lab.quick else 10
    with Pair(lab) as pair:
        first = [first_frame(pair) for _ in range(rounds)]
        with Traveller(pair, net=pair.net.tap(), append=f"ip={GUEST}/24") as traveller:
            ways = {name: functools.partial(found_again, name) for name in WAYS}
            taken = turn(rounds, traveller, ways, warm=not lab.quick)
    what, most = "from running to the first answer", [seconds + EXTRA for seconds in taken[THEIRS]]
    for name in (THEIRS, ARPING, NONE):
        words = what if name == THEIRS else f"{what}, {LATEST:g} s at most"
        yield Row("announce", OURS, name, words, "s", taken[OURS], taken[name])
    yield Row("announce", OURS, ANNOUNCE_LIMIT, what, "s", taken[OURS], most, 1)
    yield Row("announce", OURS, "5 ms", "from a line to its first frame", "s", first, [FIRST_FRAME], 1)


ANNOUNCING = {"announce": announce}
