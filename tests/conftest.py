"""What all tests share: the commands, a shell with a deadline, guests that surely end, and skips that are counted."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The tier that runs (tests/tier): quick, check, or rest, which is what of all tests is not in `check`; unset: all.
TIER = os.environ.get("VM_TIER", "")
# Whether what is tried in numbers is to be tried in full ones.
IN_NUMBERS = TIER in ("", "rest")
# A machine that is slow is no fault.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
# Where the commands are; the bench has them installed.
BIN = Path(os.environ.get("VM_BIN") or Path(sys.executable).parent)
os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin"
os.environ.setdefault("LC_ALL", "C.UTF-8")
# It would have the commands write at once what else is in a buffer until they end.
os.environ.pop("PYTHONUNBUFFERED", None)

from vm import Guest, default_qemu, made_once, make_disk, save, saved_guest, start_from  # noqa: E402

# The environment of a user, for tests of what is done by default on any QEMU.
AS_TYPED = dict(os.environ)
LIVE_SCRIPT = """#!/bin/sh
case " $* " in
*' --stop '* | *' --snapshot'* | *' --disks-commit '* | *' --recover '*) exec {command} "$@" ;;
esac
exec {command} --live-anyway "$@"
"""


def _loses_pages() -> bool:
    """Whether the guests' QEMU loses pages in a live migration: before 9.0, without KVM."""
    if os.environ.get("VM_ACCEL", "tcg") != "tcg":
        return False
    try:
        said = subprocess.run([*default_qemu(), "--version"], stdout=subprocess.PIPE, text=True, timeout=30).stdout
    except OSError:
        return False
    version = re.search(r"version (\d+)", said)
    return bool(version) and int(version[1]) < 9


def _live_all_the_same() -> None:
    """In front of the commands: those that send a guest live do so where QEMU would have them pause it first."""
    folder = tempfile.mkdtemp(prefix="live-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("vm-dump", "vm-migrate"):
        script = Path(folder, name)
        script.write_text(LIVE_SCRIPT.format(command=BIN / name))
        script.chmod(0o755)
    os.chmod(folder, 0o755)
    os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"


# What a live migration is to be given where QEMU may lose pages.
LIVE = "--live-anyway" if _loses_pages() else ""
if LIVE:
    _live_all_the_same()


@dataclass
class Done:
    """A command that has ended: its exit status (negative: the signal), and what it said."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode(errors="replace")


def run(*command: str | Path, timeout: float = 60, **kwargs: Any) -> Done:
    """Run a command in a process group that surely ends.  Standard input is empty unless given."""
    if "stdin" not in kwargs and "input" not in kwargs:
        kwargs["stdin"] = subprocess.DEVNULL
    data = kwargs.pop("input", None)
    if data is not None:
        kwargs["stdin"] = subprocess.PIPE
    kwargs.setdefault("stdout", subprocess.PIPE)
    with tempfile.TemporaryFile() as words:
        kwargs.setdefault("stderr", words)
        process = subprocess.Popen([str(c) for c in command], start_new_session=True, **kwargs)
        try:
            out, _ = process.communicate(data, timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        words.seek(0)
        return Done(process.returncode, out or b"", words.read().decode(errors="replace"))


def shell(script: str, folder: Path, timeout: float = 90, **kwargs: Any) -> Done:
    """A pipeline as one would type it in `folder`: bash with pipefail."""
    return run("bash", "-o", "pipefail", "-c", script, cwd=folder, timeout=timeout, **kwargs)


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder with a short path (a socket's has at most 107 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="vm-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where states of guests lie that were booted once a run, by whichever worker."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "states"
    folder.mkdir(exist_ok=True)
    return folder


class Guests:
    """Starts guests in one folder; all of them end with the test."""

    def __init__(self, folder: Path, states: Path) -> None:
        self.folder = folder
        self._states = states
        self._started: list[Guest] = []

    def running(self, name: str = "a", **kwargs: Any) -> Guest:
        """A Linux guest that is up and counting, from a state made once a run."""
        guest = start_from(saved_guest(self._states, **kwargs), self.folder, name, **kwargs)
        self._started.append(guest)
        guest.wait_count(1)
        return guest

    def with_disk(self, disk: Path, name: str = "a", **kwargs: Any) -> Guest:
        """One that is up and counting, also on a disk of its own (raw by its suffix), from a state made once a run."""
        image = self._states / "disk.qcow2"
        with made_once(image):
            if not image.exists():
                _boot_with_disk(self._states, image)
        if disk.suffix == ".raw":
            assert run("qemu-img", "convert", "-O", "raw", image, disk).status == 0
        else:
            shutil.copy(image, disk)
        guest = start_from(image.with_suffix(".state"), self.folder, name, disk=disk, **kwargs)
        self._started.append(guest)
        return guest

    def dumped(self, path: Path, **kwargs: Any) -> int:
        """A state that vm-dump has made of one that ran, once a run, as the file `path`; the count where it stood."""
        kept = saved_guest(self._states, **kwargs).with_suffix(".dump")
        with made_once(kept):
            if not kept.exists():
                _run_and_dump(kept, kwargs)
        shutil.copy(kept, path)
        return int(kept.with_suffix(".count").read_text())

    def booted(self, name: str = "a", **kwargs: Any) -> Guest:
        """One that boots (it has a disk, or options of its own)."""
        guest = self.start(name, **kwargs)
        guest.wait_ready()
        return guest

    def waiting(self, name: str = "b", **kwargs: Any) -> Guest:
        return self.start(name, incoming="defer", **kwargs)

    def start(self, name: str, **kwargs: Any) -> Guest:
        guest = Guest(self.folder, name, **kwargs)
        self._started.append(guest)
        return guest.start()

    def end(self) -> None:
        for guest in self._started:
            guest.end()


def _run_and_dump(kept: Path, kwargs: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="vm-") as folder:
        with start_from(kept.with_suffix(".state"), Path(folder), "a", **kwargs) as source:
            source.wait_count(1)
            done = run("vm-dump", "-q", "-o", "s", "a.qmp", cwd=folder)
            assert done.status == 0, done.err
            kept.with_suffix(".count").write_text(str(source.count()))
        shutil.move(Path(folder, "s"), kept)


def _boot_with_disk(states: Path, image: Path) -> None:
    """Its state, its sum, and last the disk as it was then."""
    with tempfile.TemporaryDirectory(dir=states) as folder:
        disk = Path(folder) / "disk"
        make_disk(disk)
        with Guest(Path(folder), "a", disk=disk).start() as guest:
            image.with_suffix(".sum").write_text(guest.wait_ready())
            guest.wait_count(2)
            guest.cmd("stop")
            save(guest, image.with_suffix(".state"))
        disk.rename(image)


@pytest.fixture
def guests(work: Path, states: Path) -> Iterator[Guests]:
    made = Guests(work, states)
    yield made
    made.end()


@pytest.fixture
def disk(work: Path) -> Path:
    path = work / "disk.qcow2"
    make_disk(path)
    return path


@pytest.fixture(scope="session")
def gnupg() -> Iterator[Path]:
    """A GnuPG home with a key pair for me@example.org, its agent ended at the end."""
    folder = Path(tempfile.mkdtemp(prefix="gpg-"))
    os.environ["GNUPGHOME"] = str(folder)
    made = run("gpg", "--batch", "--passphrase", "", "--quick-gen-key", "me@example.org", "default", "default", "never")
    assert made.status == 0, made.err
    yield folder
    run("gpgconf", "--kill", "all")
    del os.environ["GNUPGHOME"]
    shutil.rmtree(folder, ignore_errors=True)


# What some tests need and this system does not give: their mark, and why it is missing.
MISSING = pytest.StashKey[dict[str, str]]()


def _missing() -> dict[str, str]:
    """Found out once, by doing it: else a hundred tests would fail for one reason."""
    if os.getuid() != 0:
        return {"root": "not available here: root, for namespaces and taps"}
    found = {}
    # `ip netns` wants a root that is a mount point, which a plain chroot has not.
    name = f"vm-try-{os.getpid()}"
    done = run("bash", "-c", f"ip netns add {name} && ip netns exec {name} true; s=$?; ip netns del {name}; exit $s")
    if done.status:
        found["netns"] = f"not available here: network namespaces: {_first_line(done)}"
    # Below a folder like /root nobody else can run what VM_QEMU names.
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
    done = run(*nobody, *default_qemu(), "--version")
    if done.status:
        found["nobody"] = f"not available here: a QEMU for the user nobody: {_first_line(done)}"
    return found


def _first_line(done: Done) -> str:
    return (done.err.strip() or f"status {done.status}").splitlines()[0]


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", None)
    config.stash[MISSING] = given["missing"] if given else _missing()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """For the workers of xdist."""
    node.workerinput["missing"] = node.config.stash[MISSING]


def pytest_report_header(config: pytest.Config) -> list[str]:
    return list(config.stash[MISSING].values())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if {"namespaces", "two"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("netns")
    if TIER in ("quick", "check", "rest"):
        left_out = [item for item in items if bool(item.get_closest_marker("more")) != (TIER == "rest")]
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skipped here, they are one line for each reason at the end."""
    for mark, reason in item.config.stash[MISSING].items():
        if item.get_closest_marker(mark):
            pytest.skip(reason)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skip is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


Run = Callable[..., Done]
