"""Moves from host to host, beside QEMU's own: the gap that the network sees, the rate over ssh, a slow network.

The hosts are network namespaces with a switch between them and a real sshd on each.  One guest goes back and forth,
each time into a fresh QEMU, so that it boots once for all rounds; the order of the ways turns with the rounds, so that
each goes in both directions.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from conftest import run
from lab import Events, Lab, outcome, tell
from measure import Row, end, pipeline
from net.hosts import ADDRESS, GUEST, Hosts, hosts, ip
from publish import GAP_LIMIT
from vm import MAC, Guest, _die_with, until
from vmstate.migrate.uri import QUICK

PORT = 4444
DOWNTIME_MS = 300
QUIET = 0.5
LONG_AT_REST = 0.03
# As in GAP_LIMIT.
FACTOR, EXTRA = 1.3, 0.020
TCP = "migrate tcp:"
# Rewritten again and again; it fits into the downtime limit of any link but a slow one.
DIRTY_MIB = 24
# Pings a second.  Each is answered by the guest's kernel, and none waits for one before it, as TCP would.
RATE = 500
SLOW = "100mbit"

TRIES = 3

# Sends pings at a fixed rate, and takes the kernel's time of each answer; at the end of its input it goes on until the
# answers come evenly again, and then says what it has seen.
PINGER = """
import contextlib, json, os, select, socket, struct, sys, time
address, period = sys.argv[1], 1 / float(sys.argv[2])
with contextlib.suppress(OSError):
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
SO_TIMESTAMPNS = 35
link = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
link.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
link.setblocking(False)
mine = os.getpid() & 0xFFFF

def ping(number):
    words = (0x0800, mine, number & 0xFFFF)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">HHHH", 0x0800, ~total & 0xFFFF, mine, number & 0xFFFF)

def hear():
    data, ancillary, _, _ = link.recvmsg(256, 256)
    kind, _, _, ident, _ = struct.unpack(">BBHHH", data[20:28])
    if kind == 0 and ident == mine:
        seconds, nanoseconds = struct.unpack("qq", ancillary[0][2][:16])
        arrivals.append(seconds + nanoseconds / 1e9)

arrivals, sent, number, stall, over, said = [], [], 0, 0.0, None, False
due = last = time.monotonic()
while True:
    now = time.monotonic()
    stall, last = max(stall, now - last), now
    if now >= due:
        # A ping that is refused, for want of a route or a buffer, is one without an answer.
        with contextlib.suppress(OSError):
            link.sendto(ping(number), (address, 0))
        number, due = number + 1, max(due + period, now - 5 * period)
    heard = [link] if over else [link, sys.stdin]
    ready = select.select(heard, [], [], max(0, due - time.monotonic()))[0]
    if sys.stdin in ready:
        over = time.time()
    if link in ready:
        hear()
    if not said and len(arrivals) > 50:
        said = True
        print("up", flush=True)
    if over and len(arrivals) > 50 and arrivals[-50] > over and arrivals[-1] - arrivals[-50] < 200 * period:
        break
arrivals.sort()
gaps = sorted(after - before for before, after in zip(arrivals, arrivals[1:]))
usual = gaps[len(gaps) // 2]
print(json.dumps({"gap": gaps[-1], "second": gaps[-2], "usual": usual, "stall": stall, "sent": number,
                  "heard": len(arrivals)}))
"""

# What inetd would do: the receiver speaks on the connection itself.
LISTENER = """
import os, socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("listens", flush=True)
link, _ = server.accept()
server.close()
for number in (0, 1):
    os.dup2(link.fileno(), number)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Pair:
    """Two hosts A and B that reach each other over ssh as hosta and hostb; nothing of theirs is left at the end."""

    def __init__(self, lab: Lab) -> None:
        self.folder = lab.folder
        self._made = contextlib.ExitStack()
        self._ssh = os.environ.get("VM_SSH")
        self.config = self.folder / "ssh_config"

    def __enter__(self) -> Pair:
        try:
            self.net: Hosts = self._made.enter_context(hosts(self.folder))
            self._made.callback(self._end_all)
            ip(f"-n {self.net.name('S')} neigh replace {GUEST} lladdr {MAC} dev br0 nud permanent")
            self._configure()
            for host in "AB":
                self._sshd(host)
            os.environ["VM_SSH"] = f"ssh -F {self.config}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()
        os.environ.pop("VM_SSH", None)
        if self._ssh is not None:
            os.environ["VM_SSH"] = self._ssh

    def on(self, host: str, *command: str) -> list[str]:
        """A command line that runs this command on a host."""
        return ["ip", "netns", "exec", self.net.name(host), *command]

    def slow(self, rate: str) -> None:
        """From now on no host sends more than this, in tc's words."""
        for host in "AB":
            queue = ["tbf", "rate", rate, "burst", "128kb", "latency", "50ms"]
            done = run("tc", "-n", self.net.name(host), "qdisc", "add", "dev", "eth0", "root", *queue)
            if done.status:
                raise RuntimeError(f"this kernel cannot limit a link's rate: {done.err.strip()}")

    def _configure(self) -> None:
        folder, words = self.folder, []
        for name in ("host", "user"):
            path = folder / name
            for old in (path, path.with_suffix(".pub"), folder / "known"):
                old.unlink(missing_ok=True)
            done = run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)
            if done.status:
                raise RuntimeError(f"ssh-keygen: {done.err.strip()}")
        for host in "AB":
            words += [f"Host host{host.lower()}", f"  HostName {ADDRESS[host]}"]
        words += ["Host *", f"  IdentityFile {folder}/user", "  IdentitiesOnly yes", "  LogLevel ERROR"]
        words += [f"  UserKnownHostsFile {folder}/known", "  StrictHostKeyChecking accept-new"]
        self.config.write_text("\n".join(words) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        words = ["Port 22", f"HostKey {folder}/host", f"AuthorizedKeysFile {folder}/user.pub", "StrictModes no"]
        words += ["UsePAM no", "PidFile none", f"SetEnv PATH={os.environ['PATH']}"]
        (folder / "sshd_config").write_text("\n".join(words) + "\n")

    def _sshd(self, host: str) -> None:
        log = (self.folder / f"sshd{host}.log").open("wb")
        command = self.on(host, "/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "sshd_config"))
        die = functools.partial(_die_with, os.getpid())
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=die
        )
        log.close()
        self._made.callback(end, daemon)
        until(lambda: ":22 " in self.net.sh(host, "ss -ltn").text, 20, f"sshd listens on {host}")
        # Its host key is known from then on.
        pipeline(self.on("A" if host == "B" else "B", "ssh", "-F", str(self.config), f"host{host.lower()}", "true"))

    def _end_all(self) -> None:
        """Everything that runs on the hosts: a session of sshd has a process group of its own."""
        for host in "ABS":
            for pid in map(int, run("ip", "netns", "pids", self.net.name(host)).text.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class Crashed(Exception):
    """The guest was moved, and its kernel has crashed there.

    Under TCG QEMU 7.2 was seen to lose what a running guest wrote while it was sent, the more often the longer that
    took, also by QEMU's own `migrate tcp:` alone.
    """


def loses_pages(guest: Guest) -> bool:
    """As `Crashed` says; it was never seen with QEMU 10.0."""
    return int(guest.cmd("query-version")["qemu"]["major"]) < 10


class Traveller:
    """A guest that goes from host to host; `here` is its QEMU, on `host`."""

    def __init__(self, pair: Pair, **options: Any) -> None:
        self.pair, self.host = pair, "A"
        self._options = options
        self._numbers = itertools.count(1)
        self.here = self._qemu(self.host)
        self.there: Guest | None = None

    def __enter__(self) -> Traveller:
        try:
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for guest in (self.here, self.there):
            if guest:
                guest.end()

    def _qemu(self, host: str, **options: Any) -> Guest:
        return Guest(
            self.pair.folder, f"g{next(self._numbers)}", qemu=self.pair.net.qemu(host), **self._options, **options
        )

    @property
    def next(self) -> str:
        return "B" if self.host == "A" else "A"

    def _boot(self) -> None:
        self.here.start().wait_ready(180)
        self.here.wait_count(5)

    def move(self, way: Way, standing: bool = False) -> float:
        """What `way` gives, which takes the guest to a QEMU that waits on the other host; it surely goes on there.

        standing: it is stopped before, and let run on there.
        """
        for _ in range(TRIES):
            try:
                return self._move(way, standing)
            except Crashed as error:
                warn(f"{error}; this round does not count, and is done again with a guest that boots anew")
            for guest in (self.there, self.here):
                if guest:
                    self._forget(guest)
            self.here, self.there = self._qemu(self.host), None
            self._boot()
        raise RuntimeError(f"{TRIES} guests have crashed, one after the other")

    def _move(self, way: Way, standing: bool) -> float:
        self.there = there = self._qemu(self.next, incoming="defer").start()
        if standing:
            self.here.cmd("stop")
        given = way(self, there)
        if standing:
            there.wait_status("paused")
            there.cmd("cont")
        self._judge(there)
        self._forget(self.here)
        self.here, self.host, self.there = there, self.next, None
        return given

    def _judge(self, there: Guest) -> None:
        """It stands here, and counts there from where it stood here."""
        stood, status = self.here.count() or 0, self.here.status()
        if status != "postmigrate":
            raise RuntimeError(f"the guest was moved, and is {status!r} at its source")
        try:
            until(lambda: len(there.counts()) > 2, 60, f"{there.name}: the moved guest counts", there.stderr)
        except TimeoutError as error:
            raise Crashed(str(error)) from error
        first = there.counts()[0]
        if first not in range(stood, stood + 3):
            # Its kernel has had it boot.
            raise Crashed(f"the guest stood at {stood} and went on at {first}")
        if not there.running() or self.here.count() != stood:
            raise RuntimeError(f"the guest that was moved is {there.status()!r}, or counts on both sides")

    @staticmethod
    def _forget(guest: Guest) -> None:
        guest.end()
        for suffix in ("qmp", "test", "serial", "stderr"):
            guest.path(suffix).unlink(missing_ok=True)


# the ways, each with the seconds that it takes

Way = Callable[[Traveller, Guest], float]


def by_qemu(traveller: Traveller, there: Guest) -> float:
    """QEMU's own, as one sets it up who wants to know whether the guest has arrived; until it runs there, if it ran."""
    uri = f"tcp:{ADDRESS[traveller.next]}:{PORT}"
    here, word = traveller.here, [{"capability": "return-path", "state": True}]
    runs = here.status() == "running"
    for guest in (here, there):
        guest.cmd("migrate-set-capabilities", capabilities=word)
    there.cmd("migrate-incoming", uri=uri)
    here.cmd("migrate-set-parameters", **{"max-bandwidth": 0, "downtime-limit": DOWNTIME_MS})
    with Events(here.path("test"), 300) as monitor, Events(there.path("test"), 300) as other:
        tell(monitor, True)
        begun = time.perf_counter()
        monitor.cmd("migrate", uri=uri)
        monitor.wait_for("MIGRATION", status="completed")
        if runs:
            other.wait_for("RESUME")
        seconds = time.perf_counter() - begun
    outcome(here)
    return seconds


def _ours(traveller: Traveller, uri: str, *options: str) -> float:
    # Each round more is one more in which such a guest can crash: there ours takes as few as QEMU's own.
    few = ["--downtime", str(DOWNTIME_MS)] if loses_pages(traveller.here) else []
    words = ["vm-migrate", "-q", *few, *options, traveller.here.qmp, uri]
    return pipeline(traveller.pair.on(traveller.host, *words))


def by_tcp(traveller: Traveller, there: Guest) -> float:
    uri = f"tcp:{ADDRESS[traveller.next]}:{PORT}"
    there.cmd("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}])
    there.cmd("migrate-incoming", uri=uri)
    return _ours(traveller, uri)


def by_ssh(traveller: Traveller, there: Guest, *options: str) -> float:
    return _ours(traveller, f"ssh://host{traveller.next.lower()}{there.qmp}", *options)


def by_link(traveller: Traveller, there: Guest) -> float:
    """Over nc, to a receiver that a server of the other host's starts for each connection."""
    address, pair = ADDRESS[traveller.next], traveller.pair
    words = [sys.executable, "-c", LISTENER, address, str(PORT), "vm-restore", "--receive", there.qmp]
    with listening(pair.on(traveller.next, *words), "listens"):
        return _ours(traveller, f"link:nc -N {address} {PORT}")


@contextlib.contextmanager
def listening(command: list[str], word: str) -> Iterator[subprocess.Popen[bytes]]:
    """While a process of this command runs, once it has said this word."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout
        said = hear(process, 30)
        if said != word:
            raise RuntimeError(f"{command!r} said {said!r} instead of {word!r}")
        yield process
    finally:
        end(process)
        for stream in (process.stdin, process.stdout):
            if stream:
                stream.close()


def hear(process: subprocess.Popen[bytes], seconds: float) -> str:
    """The next line of its output, without its end; it is ended when there is none in time."""
    import threading

    assert process.stdout
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        return process.stdout.readline().decode().strip()
    finally:
        timer.cancel()


# the gap


def seen(way: Way, traveller: Traveller, there: Guest) -> float:
    """The longest time without an answer to pings from the switch's place, while the guest is moved that way."""
    found = pinged(traveller.pair, lambda: way(traveller, there))
    longest, held, other = found["gap"], found["stall"], found["second"]
    if held > max(0.01, longest / 10):
        warn(f"who pings was held up himself, for {held * 1000:.0f} ms")
    if other > max(0.05, longest / 2):
        warn(f"two gaps, of {longest * 1000:.0f} and {other * 1000:.0f} ms")
    return longest


def at_rest(traveller: Traveller, times: int) -> None:
    """A guest that is not moved has short gaps as well, and more of them where others use the processors."""
    longest = sorted(pinged(traveller.pair, lambda: time.sleep(1))["gap"] for _ in range(times))
    if longest[times // 2] > LONG_AT_REST:
        warn(f"a guest that is not moved does not answer for {longest[times // 2] * 1000:.0f} ms either")


def pinged(pair: Pair, work: Callable[[], object]) -> dict[str, float]:
    """What has been seen from the switch's place while `work` ran, and until the answers came evenly again."""
    with listening(pair.on("S", sys.executable, "-c", PINGER, GUEST, str(RATE)), "up") as pinger:
        time.sleep(QUIET)
        work()
        time.sleep(QUIET)
        assert pinger.stdin
        pinger.stdin.close()
        pinger.stdin = None
        said = hear(pinger, 30)
    if not said:
        raise Crashed("the guest answers no more pings")
    found: dict[str, float] = json.loads(said)
    return found


def warn(text: str) -> None:
    print(f"run: warning: {text}", file=sys.stderr)


GAPS = {TCP: by_qemu, "vm-migrate ssh://": by_ssh, "vm-migrate link:": by_link, "vm-migrate tcp:": by_tcp}
LOADS = {"idle": "", "dirtying": f"dirty={DIRTY_MIB}"}


def gap(lab: Lab) -> Iterator[Row]:
    """How long the guest does not answer in the network, idle and while it rewrites its memory."""
    rounds = 1 if lab.quick else 10
    for load, word in LOADS.items():
        with Pair(lab) as pair:
            options = {"net": pair.net.tap(), "append": f"ip={GUEST}/24 {word}".strip()}
            with Traveller(pair, **options) as traveller:
                at_rest(traveller, 1 if lab.quick else 3)
                runners = {name: functools.partial(seen, way) for name, way in GAPS.items()}
                taken = turn(rounds, traveller, runners, warm=not lab.quick)
        for name in GAPS:
            if name != TCP:
                what = f"gap in the network, {load} guest"
                yield Row("gap", name, TCP, what, "s", taken[name], taken[TCP])
                most = [FACTOR * seconds + EXTRA for seconds in taken[TCP]]
                wanted = None if name == "vm-migrate tcp:" else 1
                yield Row("gap", name, GAP_LIMIT, what, "s", taken[name], most, wanted)


def turn(
    rounds: int, traveller: Traveller, ways: Mapping[str, Way], *, warm: bool = True, standing: bool = False
) -> dict[str, list[float]]:
    """What each way gives in each round: A B C, B C A, C A B …  warm: a round before the first does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-1 if warm else 0, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = traveller.move(ways[name], standing)
            if number >= 0:
                taken[name].append(seconds)
    return taken


# the rates


def ssh_throughput(lab: Lab) -> Iterator[Row]:
    """A whole guest over ssh, beside the same with a one-way stream."""
    mine, to, pipe = "vm-migrate ssh://", "vm-dump --to 'ssh …'", "vm-dump | ssh …"
    with Pair(lab) as pair, Traveller(pair, **lab.options("linux")) as traveller:
        ways = {mine: by_ssh, to: _dump_to, pipe: _dump_and_pipe}
        taken = turn(1 if lab.quick else 6, traveller, ways, warm=not lab.quick, standing=True)
    for name in (to, pipe):
        what = f"whole command, standing guest, {lab.size('linux')}"
        yield Row("ssh-throughput", mine, name, what, "s", taken[mine], taken[name], 0.8)


def _ssh(traveller: Traveller, there: Guest) -> list[str]:
    # With the cipher that ours asks for, as an expert would.
    config = str(traveller.pair.config)
    return ["ssh", "-F", config, *QUICK, f"host{traveller.next.lower()}", f"vm-restore -q {there.qmp}"]


def _dump_to(traveller: Traveller, there: Guest) -> float:
    import shlex

    to = shlex.join(_ssh(traveller, there))
    return pipeline(traveller.pair.on(traveller.host, "vm-dump", "-q", "--to", to, traveller.here.qmp))


def _dump_and_pipe(traveller: Traveller, there: Guest) -> float:
    pair, host = traveller.pair, traveller.host
    dump = pair.on(host, "vm-dump", "-q", traveller.here.qmp)
    return pipeline(dump, pair.on(host, *_ssh(traveller, there)))


def through_100mbit(lab: Lab) -> Iterator[Row]:
    """Over a network of 100 Mbit/s, packed on the way; QEMU's own as it is."""
    mine, packed = "vm-migrate --through vm-compress ssh://", functools.partial(by_ssh_through, "vm-compress")
    with Pair(lab) as pair, Traveller(pair, **lab.options("linux")) as traveller:
        pair.slow(SLOW)
        taken = turn(1 if lab.quick else 3, traveller, {mine: packed, TCP: by_qemu}, warm=False, standing=True)
    what = f"standing guest, {lab.size('linux')}, 100 Mbit a second"
    yield Row("through-100mbit", mine, TCP, what, "s", taken[mine], taken[TCP], round(1 / 0.45, 2))


def by_ssh_through(command: str, traveller: Traveller, there: Guest) -> float:
    return by_ssh(traveller, there, "--through", command)


MOVES: dict[str, Callable[[Lab], Iterator[Row]]] = {
    "gap": gap,
    "ssh-throughput": ssh_throughput,
    "through-100mbit": through_100mbit,
}
