"""A short conversation with a guest's QMP socket: connect, ask, read every answer, leave.  The one home of `qemu.qmp`.

The monitor talks to one client at a time, so nobody may keep it: a conversation waits up to `PATIENCE` seconds for its
turn and holds the monitor only as long as its `with` block.
"""

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError
from qemu.qmp.qmp_client import NegotiationError

from ..errors import CannotDo, GuestGone, Refused
from . import userfault

T = TypeVar("T")
# So that with the start of Python the answer of a command comes within 5 s.
PATIENCE = 4.75
# An answer comes at once, or QEMU stands still (a page fault, a dead disk).
ANSWER = 60.0

for _name in ("qemu.qmp", "asyncio"):
    logging.getLogger(_name).addHandler(logging.NullHandler())
    logging.getLogger(_name).propagate = False


class StandsStill(CannotDo):
    """QEMU, process `pid`, answers nothing: it waits for a page of its guest, which nobody brings.

    protected: it may not write into it, since a snapshot has not come so far yet, or was lost.
    """

    def __init__(self, path: str, pid: int) -> None:
        self.pid, self.protected = pid, userfault.protected(pid)
        text = f"the QEMU of the guest at {path} stands still: it waits for a page, and nobody brings it"
        hint = f"where a lazy restore has lost its vm-restore: vm-restore --resume {path} < STATE.vmz"
        if self.protected:
            text = f"the QEMU of the guest at {path} stands still: it waits for its snapshot to go on"
            hint = f"its sink is slow; or, where no vm-dump is at work any more: vm-cont --force {path}"
        super().__init__(text, hint)


class Monitor:
    """One conversation, as a context manager.

    Raises CannotDo where nobody listens or another client holds the monitor for `patience` seconds, StandsStill where
    it is QEMU that does not answer, GuestGone where the guest ends in the middle, Refused where QEMU refuses a command.
    """

    def __init__(self, path: str, patience: float = PATIENCE) -> None:
        self._path = path
        self._patience = patience
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("vmstate")
        self._socket = _new_socket()

    def __enter__(self) -> "Monitor":
        try:
            self._connect()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._leave()

    def leave(self) -> None:
        """As the end of the `with` block; of one that has been left already nothing happens."""
        if not self._loop.is_closed():
            self._leave()

    def ask(self, command: str, **arguments: Any) -> Any:
        """The answer to a command; arguments with '_' for '-'."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._wait(self._client.execute(command, named or None), ANSWER)
        except ExecuteError as error:
            raise Refused(command, str(error)) from error
        except TimeoutError as error:
            raise CannotDo(f"no answer to '{command}' from {self._path} in {ANSWER:.0f} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise GuestGone(f"the guest at {self._path} went away during '{command}'") from error

    def ask_oob(self, command: str, **arguments: Any) -> Any:
        """As `ask`, past a QEMU that stands still, where this one can do that (out of band)."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._wait(self._client.execute(command, named or None, oob=True), ANSWER)
        except (ExecuteError, QMPError, TimeoutError, OSError, EOFError):
            return self.ask(command, **arguments)

    def event(self, patience: float) -> dict[str, Any] | None:
        """The next thing that QEMU has told in this conversation without being asked; None where nothing comes."""
        try:
            return dict(self._wait(self._client.events.get(), patience))
        except TimeoutError:
            return None

    def human(self, line: str) -> str:
        """The answer of the human monitor to a line."""
        return str(self.ask("human-monitor-command", command_line=line))

    def send_fd(self, name: str, fd: int) -> None:
        """Hand a descriptor to QEMU, which keeps it as `name` until it is used."""
        try:
            self._client.send_fd_scm(fd)
        except OSError as error:
            raise GuestGone(f"the guest at {self._path} went away") from error
        self.ask("getfd", fdname=name)

    def pid(self) -> int:
        """The process that listens on the socket."""
        answer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("3i", answer)[0])

    def _connect(self) -> None:
        give_up = time.monotonic() + self._patience
        while not self._try_to_connect(give_up):
            self._client = QMPClient("vmstate")
            self._socket.close()
            self._socket = _new_socket()

    def _try_to_connect(self, give_up: float) -> bool:
        """True once connected; False where it is worth another try."""
        _reach(self._socket, self._path, give_up)
        # A try that is given up closes it.
        pid = self.pid()
        try:
            self._wait(self._client.connect(self._socket), max(0.01, give_up - time.monotonic()))
        except TimeoutError as error:
            raise (StandsStill(self._path, pid) if userfault.waits(pid) else _busy(self._path)) from error
        except (QMPError, OSError, EOFError) as error:
            if _an_event_came_first(error) and time.monotonic() < give_up:
                return False
            raise GuestGone(f"the guest at {self._path} went away") from error
        return True

    def _wait(self, what: Coroutine[Any, Any, T], patience: float) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(what, patience))

    def _leave(self) -> None:
        # Whatever was to be learnt has been answered; an end that goes wrong changes nothing.
        try:
            with contextlib.suppress(Exception):
                self._wait(self._client.disconnect(), 2)
        finally:
            self._socket.close()
            self._loop.close()


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


def _an_event_came_first(error: BaseException) -> bool:
    # QEMU may send an event between its greeting and its answer to qmp_capabilities; qemu.qmp takes it for the answer.
    return (
        isinstance(error, ConnectError)
        and isinstance(error.exc, NegotiationError)
        and isinstance(error.exc.exc, AssertionError)
    )


def _reach(end: socket.socket, path: str, give_up: float) -> None:
    """Connect, waiting for a place in the queue of a busy monitor."""
    hint = "GUEST is the path of a QMP socket: -qmp unix:PATH,server,nowait"
    while True:
        try:
            return end.connect(path)
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise _busy(path) from None
            time.sleep(0.02)
        except ConnectionRefusedError as error:
            text = f"no guest at {path}: nobody listens there"
            raise GuestGone(text, "its QEMU has ended; or " + hint) from error
        except OSError as error:
            family = GuestGone if isinstance(error, FileNotFoundError) else CannotDo
            raise family(f"no guest at {path}: {error.strerror or error}", hint) from error


def _busy(path: str) -> CannotDo:
    return CannotDo(
        f"the monitor {path} does not answer: another client holds it",
        "a QMP socket talks to one client at a time; end that one, or give QEMU a second -qmp",
    )
