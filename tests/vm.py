"""Guests for the tests: started, watched and surely ended, with nothing of the toolkit in between.

    with Guest(folder, "a").start() as guest:
        guest.wait_ready()

    state = saved_guest(cache)
    with start_from(state, folder, "b") as guest:
        assert guest.running()

Each guest has two monitors: FOLDER/NAME.qmp is for the tools under test, FOLDER/NAME.test for this library alone.
A guest dies with the thread that started it, so start none from a thread that ends before it.
What a guest's network card sends can be received on a datagram socket bound to FOLDER/NAME.wire.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
MAC = "52:54:00:00:00:01"
PR_SET_PDEATHSIG = 1
LONGEST_SOCKET_PATH = 107

LIBC = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


class QmpError(Exception):
    """QEMU refused a command; `kind` is its error class, `desc` its own words."""

    def __init__(self, kind: str, desc: str) -> None:
        super().__init__(f"{kind}: {desc}")
        self.kind = kind
        self.desc = desc


def until(check: Callable[[], T], timeout: float, what: str, context: Callable[[], str] = str) -> T:
    """The first true answer of `check`; TimeoutError with `what` and `context()` when there is none in time."""
    end = time.monotonic() + timeout
    while True:
        answer = check()
        if answer:
            return answer
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout} s; {context()}")
        time.sleep(0.01)


class Qmp:
    """A blocking QMP connection; no answer within `timeout` seconds raises TimeoutError, a lost one ConnectionError."""

    def __init__(self, path: str | Path, timeout: float = 10) -> None:
        self.timeout = timeout
        self.events: list[dict[str, Any]] = []
        self._received = b""
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            self._receive(time.monotonic() + timeout)
            self.cmd("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def cmd(self, name: str, /, **arguments: Any) -> Any:
        """What QEMU returns. A name with a hyphen is given as **{"max-bandwidth": 0}."""
        end = time.monotonic() + self.timeout
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while True:
            message = self._receive(end)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(message["error"]["class"], message["error"]["desc"])
            self.events.append(message)

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            more = self._socket.recv(65536)
            if not more:
                raise ConnectionError("the monitor closed the connection")
            self._received += more
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def image() -> Path:
    """The folder with vmlinuz, initrd.gz, agent.gz and metal.elf (VM_IMAGE, else .cache/guest), built if need be."""
    folder = Path(os.environ.get("VM_IMAGE") or ROOT / ".cache/guest")
    subprocess.run([ROOT / "tests/image/build", folder], check=True, stdin=subprocess.DEVNULL, timeout=600)
    return folder


def default_accel(kind: str, user: int | None = None) -> str:
    """VM_ACCEL, else kvm for a metal guest that can have it, else tcg: Linux may hang in a KVM that opens well."""
    chosen = os.environ.get("VM_ACCEL")
    if chosen:
        return chosen
    mine = user is None or user == os.getuid()
    return "kvm" if kind == "metal" and mine and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


def default_qemu() -> list[str]:
    return shlex.split(os.environ.get("VM_QEMU") or "qemu-system-x86_64")


class Guest:
    """One QEMU process. `start` starts it; `end`, or leaving the context, ends it with all its children."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        kind: str = "linux",
        machine: str = "q35",
        mem: int = 256,
        incoming: str | None = None,
        net: list[str] | None = None,
        disk: Path | None = None,
        agent: bool = False,
        append: str = "",
        extra: list[str] | None = None,
        accel: str | None = None,
        qemu: str | None = None,
        user: int | None = None,
    ) -> None:
        """`kind` is linux or metal; `mem` is in MiB; `net` replaces the arguments of the default card, [] is none;
        a `disk` (see make_disk) has Linux log its counts there; with `agent` it has a port for QEMU's guest agent,
        which runs in a Linux guest and is heard at FOLDER/NAME.agent; `user` is a uid, who then owns `folder`."""
        if kind not in ("linux", "metal"):
            raise ValueError(f"kind {kind!r}: linux or metal")
        self.folder, self.name, self.kind, self.machine, self.mem = Path(folder), name, kind, machine, mem
        self.incoming, self.disk, self.append, self.user = incoming, disk, append, user
        self.agent = agent
        self.net = self._default_net() if net is None else net
        self.extra = extra or []
        self.accel = accel or default_accel(kind, user)
        self.qemu = shlex.split(qemu) if qemu else default_qemu()
        self._process: subprocess.Popen[bytes] | None = None
        self._saved_sum: str | None = None

    # its command line

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    @property
    def qmp(self) -> str:
        """The monitor for the tools under test."""
        return str(self.path("qmp"))

    @property
    def args(self) -> list[str]:
        """The whole command line."""
        args = [*self.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-name", self.name]
        args += ["-machine", self.machine, "-accel", self.accel, "-m", str(self.mem)]
        args += ["-serial", f"file:{self.path('serial')}"]
        for suffix in ("qmp", "test"):
            args += ["-qmp", f"unix:{self.path(suffix)},server=on,wait=off"]
        args += [*self._kernel(), *self._disk(), *self.net, *self._agent(), *self.extra]
        return args + (["-incoming", self.incoming] if self.incoming else [])

    def _kernel(self) -> list[str]:
        if self.kind == "metal":
            # A simple CPU, else a KVM that lacks some feature of the default one has QEMU warn.
            return ["-cpu", "pentium3", "-kernel", str(self._image("metal.elf")), "-append", self.append]
        words = f"console=ttyS0 quiet loglevel=0 panic=1 {'disk ' if self.disk else ''}{self.append}"
        initrd = self._image("agent.gz" if self.agent else "initrd.gz")
        return ["-kernel", str(self._image("vmlinuz")), "-initrd", str(initrd), "-append", words.strip()]

    def _image(self, name: str) -> Path:
        """For another user a copy: the checkout may lie where nobody else can read."""
        if self.user is None:
            return image() / name
        copy = self.folder / name
        if not copy.exists():
            shutil.copy(image() / name, copy)
        return copy

    def _disk(self) -> list[str]:
        if not self.disk:
            return []
        form = "raw" if self.disk.suffix == ".raw" else "qcow2"
        drive = f"if=none,id=disk0,node-name=image0,format={form},file={self.disk}"
        return ["-drive", drive, "-device", "virtio-blk-pci,drive=disk0"]

    def _agent(self) -> list[str]:
        if not self.agent:
            return []
        socket_ = f"socket,id=agent0,path={self.path('agent')},server=on,wait=off"
        port = "virtserialport,chardev=agent0,name=org.qemu.guest_agent.0"
        return ["-chardev", socket_, "-device", "virtio-serial-pci", "-device", port]

    def _default_net(self) -> list[str]:
        # A wire into nothing: no privileges, no section in the stream (slirp has one), no warning (a hub gives one).
        wire = f"local.type=unix,local.path={self.path('net')},remote.type=unix,remote.path={self.path('wire')}"
        return ["-netdev", f"dgram,id=net0,{wire}", "-device", f"virtio-net-pci,netdev=net0,mac={MAC},romfile="]

    # its life

    def start(self, state: Path | None = None, timeout: float = 60) -> Guest:
        """Start it, from `state` if given, and wait until its monitor answers and the state is loaded and runs."""
        if state:
            self._saved_sum = state.with_suffix(".sum").read_text()
            if self.user is not None:
                # The other user may not look into where states lie.
                state = Path(shutil.copy(state, self.path("saved")))
                state.chmod(0o644)
            self.incoming = f"exec:cat {shlex.quote(str(state))}"
        try:
            self._spawn()
            self._wait_monitor(timeout)
            if state:
                self._run_loaded(timeout)
        except BaseException:
            self.end()
            raise
        return self

    def _spawn(self) -> None:
        if self._process:
            raise RuntimeError(f"{self.name} was started before")
        if len(os.fsencode(self.path("test"))) > LONGEST_SOCKET_PATH:
            raise ValueError(f"{self.path('test')}: longer than {LONGEST_SOCKET_PATH} bytes, too long for a socket")
        for suffix in ("qmp", "test", "serial"):
            self.path(suffix).unlink(missing_ok=True)
        identity: dict[str, Any] = {}
        if self.user is not None:
            os.chown(self.folder, self.user, -1)
            identity = {"user": self.user, "group": self.user, "extra_groups": []}
        with self.path("stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                self.args,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=functools.partial(_die_with, os.getpid()),
                **identity,
            )

    def _wait_monitor(self, timeout: float) -> None:
        until(lambda: self._answers() or not self.alive(), timeout, f"{self.name}: the monitor answers", self._context)
        if not self.alive():
            raise RuntimeError(f"{self.name} has ended at its start; {self._context()}")

    def _answers(self) -> bool:
        try:
            return self.path("test").exists() and bool(self.cmd("query-status"))
        except (ConnectionError, TimeoutError):
            return False

    def _run_loaded(self, timeout: float) -> None:
        until(lambda: self.status() != "inmigrate", timeout, f"{self.name}: the state is loaded", self._context)
        if self.status() == "paused":
            self.cmd("cont")
        self.wait_status("running", timeout=timeout)

    @property
    def pid(self) -> int:
        if not self._process:
            raise RuntimeError(f"{self.name} was not started")
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process is there; one that has ended stays a zombie until `end`, to keep its pid its own."""
        if not self._process or self._process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self) -> None:
        """SIGKILL to it and all its children."""
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(30)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.end()

    # its monitor

    def connect(self, timeout: float = 10) -> Qmp:
        """A connection to the monitor of the tests; who holds it keeps all methods here that ask QEMU waiting."""
        return Qmp(self.path("test"), timeout)

    def cmd(self, name: str, /, **arguments: Any) -> Any:
        with self.connect() as qmp:
            return qmp.cmd(name, **arguments)

    def status(self) -> str:
        """The run state in QEMU's words, or `gone`."""
        if not self.alive():
            return "gone"
        try:
            return str(self.cmd("query-status")["status"])
        except OSError:
            # It may have ended while it was asked, and a kill takes its time.
            end = time.monotonic() + 1
            while self.alive():
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
            return "gone"

    def wait_status(self, *names: str, timeout: float = 60) -> str:
        def arrived() -> str | None:
            status = self.status()
            return status if status in names else None

        return until(arrived, timeout, f"{self.name}: {' or '.join(names)}", self._context) or ""

    def wait_gone(self, timeout: float = 60) -> None:
        until(lambda: not self.alive(), timeout, f"{self.name}: gone", self._context)

    # what it says

    def _said(self, pattern: str) -> list[str]:
        # Whole lines only: the first one of a restored guest may be the rest of one begun before.
        try:
            serial = self.path("serial").read_bytes()
        except FileNotFoundError:
            return []
        return re.findall(pattern, serial.decode(errors="replace").replace("\r", ""), re.MULTILINE)

    def count(self) -> int | None:
        """The last count it printed."""
        counts = self._said(r"^count (\d+)\n")
        return int(counts[-1]) if counts else None

    def counts(self) -> list[int]:
        return [int(count) for count in self._said(r"^count (\d+)\n")]

    def wait_count(self, at_least: int, timeout: float = 60) -> int:
        until(lambda: (self.count() or 0) >= at_least, timeout, f"{self.name}: count {at_least}", self._context)
        return self.count() or 0

    def wait_ready(self, timeout: float = 60) -> str:
        """Its first checksum: as printed once it was up, or kept beside the state it was started from; metal: empty."""
        if self._saved_sum is not None:
            return self._saved_sum
        until(lambda: self._said(r"^ready.*\n"), timeout, f"{self.name}: ready", self._context)
        return self._said(r"^ready ?(.*)\n")[0]

    def sums(self) -> list[str]:
        """All checksums it computed later."""
        return self._said(r"^sum (\S+)\n")

    def wait_sum(self, timeout: float = 60) -> str:
        """The next checksum."""
        seen = len(self.sums())
        until(lambda: len(self.sums()) > seen, timeout, f"{self.name}: a new sum", self._context)
        return self.sums()[seen]

    def uptimes(self) -> list[float]:
        """The seconds since its start that stand before its counts; only with `agent`."""
        return [float(seconds) for seconds in self._said(r"^uptime (\S+)\n")]

    def errors(self) -> int:
        """How many writes to the disk failed."""
        return len(self._said(r"^disk error\n"))

    def running(self, timeout: float = 10) -> bool:
        """Whether QEMU says so and the counter advances."""
        if self.status() != "running":
            return False
        try:
            self.wait_advance(timeout)
        except TimeoutError:
            return False
        return self.status() == "running"

    def wait_advance(self, timeout: float = 10) -> int:
        """The next count."""
        before = self.count()
        until(lambda: self.count() != before, timeout, f"{self.name}: the counter goes on", self._context)
        return self.count() or 0

    def standing(self, seconds: float = 0.5) -> bool:
        """Whether the counter does not advance."""
        try:
            self.wait_advance(seconds)
        except TimeoutError:
            return True
        return False

    def stderr(self) -> str:
        """What QEMU has said on stdout and stderr."""
        path = self.path("stderr")
        return path.read_text(errors="replace") if path.exists() else ""

    def _context(self) -> str:
        serial = self.path("serial")
        said = serial.read_bytes()[-300:] if serial.exists() else b""
        state = "alive" if self.alive() else "ended"
        return f"QEMU {state}, said {self.stderr()!r}, the guest said {said!r}; {shlex.join(self.args)}"


def _die_with(parent: int) -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# Guests that need not boot


def saved_guest(cache: Path, **kwargs: Any) -> Path:
    """The state of a guest of these arguments, up, counting and then stopped; made once in `cache`."""
    if kwargs.get("disk"):
        raise ValueError("a saved guest would need its disk as it was then: boot it")
    cache.mkdir(parents=True, exist_ok=True)
    # Whoever runs it: a state has no owner.
    kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "user"}
    state = cache / f"{_key(kwargs)}.state"
    with made_once(state):
        if not (state.exists() and state.with_suffix(".sum").exists()):
            with tempfile.TemporaryDirectory(dir=cache, prefix="boot-") as folder:
                _boot_and_save(Path(folder), state, kwargs)
    return state


@contextlib.contextmanager
def made_once(path: Path) -> Iterator[None]:
    """Whoever else, of all workers, makes the same file waits meanwhile."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(given: dict[str, Any]) -> str:
    kind = given.get("kind", "linux")
    defaults = {"kind": kind, "accel": default_accel(kind), "qemu": shlex.join(default_qemu())}
    if "qemu" in given:
        # On whichever host: a worker's have names of their own.
        given = given | {"qemu": re.sub(r"^ip netns exec \S+ ", "", given["qemu"])}
    initrd = "agent.gz" if given.get("agent") else "initrd.gz"
    files = [image() / name for name in ("vmlinuz", initrd, "metal.elf")]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([defaults | given, stamps], sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _boot_and_save(folder: Path, state: Path, kwargs: dict[str, Any]) -> None:
    with Guest(folder, "saved", **kwargs).start() as guest:
        ready = guest.wait_ready()
        guest.wait_count(5)
        guest.cmd("stop")
        save(guest, folder / "state")
    (folder / "sum").write_text(ready)
    (folder / "sum").rename(state.with_suffix(".sum"))
    (folder / "state").rename(state)


def save(guest: Guest, state: Path, timeout: float = 120) -> None:
    """Write the guest's state to `state` by QEMU's own means, as fast as it can."""
    guest.cmd("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    guest.cmd("migrate", uri=f"exec:cat > {shlex.quote(str(state))}")
    outcome = until(lambda: _outcome(guest), timeout, f"{guest.name}: saved")
    if outcome != "completed":
        raise RuntimeError(f"{guest.name}: the migration ended as {outcome}; {guest.stderr()}")


def _outcome(guest: Guest) -> str | None:
    status = guest.cmd("query-migrate").get("status")
    return status if status in ("completed", "failed", "cancelled") else None


def start_from(state: Path, folder: Path, name: str, **kwargs: Any) -> Guest:
    """A guest that runs on from a state of `saved_guest`, which had the same arguments."""
    return Guest(folder, name, **kwargs).start(state)


# Disks


def make_disk(path: Path, mib: int = 64) -> None:
    """A qcow2 image with an empty ext4 file system on it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder) / "raw"
        with raw.open("wb") as file:
            file.truncate(mib << 20)
        # All of it now, else the guest's kernel goes on with it in the background.
        _run("/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(raw))
        _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), f"{folder}/qcow2")
        Path(folder, "qcow2").rename(path)


def fsck(path: Path) -> tuple[int, str]:
    """e2fsck's status and words on the file system in a qcow2 image, its journal replayed as a mount would do."""
    with _raw_copy(path) as raw:
        done = _run("/sbin/e2fsck", "-fn", str(raw), check=False)
    return done.returncode, done.stdout


def disk_counts(path: Path) -> list[int]:
    """The counts that a guest has logged on its disk."""
    with _raw_copy(path) as raw:
        said = _run("/sbin/debugfs", "-R", "cat /log", str(raw)).stdout
    return [int(line) for line in said.splitlines() if line.isdigit()]


@contextlib.contextmanager
def _raw_copy(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        raw = Path(folder) / "raw"
        _run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(path), str(raw))
        _run("/sbin/e2fsck", "-y", "-E", "journal_only", str(raw), check=False)
        yield raw


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: status {done.returncode}: {done.stdout}")
    return done
