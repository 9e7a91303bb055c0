"""A QEMU that `vm-restore -- QEMU ARG…` starts: waiting for a state, detached, its words kept."""

import contextlib
import os
import re
import signal
import socket
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ..deadline import Deadline
from ..errors import CannotDo, VmstateError, WrongUsage
from .monitor import Monitor

if TYPE_CHECKING:
    import subprocess

STARTS = 30.0
# Options under which a guest wants our terminal, or its life would not be ours to judge.
FORBIDDEN = {
    "-nographic": "use -display none",
    "-curses": "use -display none or -vnc",
    "-daemonize": "the guest is left running and detached anyway",
    "-incoming": "vm-restore adds -incoming defer itself",
}
STDIO = re.compile(r"^(mon:)?stdio\b|^stdio,|^curses\b")


def check_arguments(arguments: Sequence[str]) -> None:
    """WrongUsage for what cannot be among the arguments of QEMU."""
    for name, value in pairwise([*arguments, ""]):
        option = "-" + name.lstrip("-") if name.startswith("-") else ""
        if option in FORBIDDEN:
            raise WrongUsage(f"{name} cannot be among the arguments of QEMU here", FORBIDDEN[option])
        if option in ("-serial", "-monitor", "-qmp", "-chardev", "-parallel", "-display", "-mon") and STDIO.match(
            value
        ):
            hint = "QEMU's standard input and output are /dev/null; use a file: or unix: there"
            raise WrongUsage(f"{name} {value} cannot be among the arguments of QEMU here", hint)


def monitor_path(arguments: Sequence[str]) -> str | None:
    """The path of the first `-qmp unix:PATH` among the arguments."""
    for name, value in pairwise(arguments):
        if name in ("-qmp", "--qmp") and value.startswith("unix:"):
            return value[5:].split(",")[0]
    return None


class Process:
    """The started QEMU; `path` is that of its monitor, `log` that of its standard error."""

    def __init__(self, command: Sequence[str]) -> None:
        check_arguments(command[1:])
        given = monitor_path(command)
        self.added = given is None
        if given is None:
            import tempfile

            folder = tempfile.mkdtemp(prefix="vmstate-", dir=os.environ.get("XDG_RUNTIME_DIR"))
            given = os.path.join(folder, "guest.qmp")
            command = [*command, "-qmp", f"unix:{given},server=on,wait=off"]
        self.path = given
        self.log = f"{given}.stderr"
        try:
            _refuse_taken(given)
            self._process = self._start([*command, "-incoming", "defer"])
        except BaseException:
            if self.added:
                self._remove(self.log)
            raise

    def _start(self, command: list[str]) -> "subprocess.Popen[bytes]":
        import subprocess

        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            null = subprocess.DEVNULL
            return subprocess.Popen(command, stdin=null, stdout=null, stderr=log, start_new_session=True)
        except OSError as error:
            raise CannotDo(f"cannot start {command[0]}: {error.strerror}") from error
        finally:
            os.close(log)

    def wait_until_it_answers(self) -> None:
        """Return once its monitor can be reached; CannotDo with its words where it ends first."""
        for _ in Deadline(STARTS).tries(0.01):
            if _answers(self.path):
                return
            if self._process.poll() is not None:
                raise CannotDo(f"QEMU did not start: {self.words() or 'it said nothing'}")
        raise CannotDo(f"QEMU's monitor {self.path} did not appear in {STARTS:.0f} s")

    def alive(self) -> bool:
        """False once it has ended; one that is about to is given half a second."""
        import subprocess

        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        return self._process.poll() is None

    def words(self) -> str:
        """What it has written to its standard error, its end where that is long."""
        try:
            with open(self.log, encoding="utf-8", errors="backslashreplace") as file:
                return "; ".join(line.strip() for line in file.read().splitlines()[-8:] if line.strip())
        except OSError:
            return ""

    def end(self) -> None:
        """End it, and take away what only it needed."""
        import subprocess

        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._remove(self.path, self.log)

    def _remove(self, *paths: str) -> None:
        """These files, and the folder that was made for them."""
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self.added:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(self.path))


def _answers(path: str) -> bool:
    if not os.path.exists(path):
        return False
    try:
        with Monitor(path, 1):
            return True
    except VmstateError:
        return False


def _refuse_taken(path: str) -> None:
    """A QEMU takes the path of a running guest's monitor away from it without asking."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except BlockingIOError:
            pass
        except OSError:
            return
    raise CannotDo(f"{path} is the monitor of a running guest", "give the new one a path of its own")
