"""A short conversation with a guest's QMP socket: connect, ask, read every answer, leave.

The monitor talks to one client at a time, so nobody may keep it: a conversation waits up to `PATIENCE` seconds for its
turn and holds the monitor only as long as its `with` block.

Source: QEMU's docs/interop/qmp-spec.rst: JSON objects, a greeting, then answers, each with the id of its command, and
events between them.
"""

import codecs
import contextlib
import json
import select
import socket
import struct
import time
from collections import deque
from typing import Any

from ..deadline import Deadline
from ..errors import CannotDo, GuestGone, Refused
from . import userfault

# So that with the start of Python the answer of a command comes within 5 s.
PATIENCE = 4.75
# An answer comes at once, or QEMU stands still (a page fault, a dead disk).
ANSWER = 60.0
CHUNK = 64 << 10
# The longest answers, those of hundreds of devices, have some hundred kB.
LONGEST = 4 << 20
# Events that nobody has asked for yet; of more, the oldest are forgotten.
EVENTS = 1000


class Busy(CannotDo):
    """No answer now: another client holds the monitor, or QEMU is at something long.  Later there may be one."""


class StandsStill(Busy):
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


class Malformed(ValueError):
    """What came is no QMP."""


class Decoder:
    """JSON objects out of bytes that come in pieces, whatever blanks and newlines are in them (`pretty=on`)."""

    def __init__(self) -> None:
        self._json = json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        # Not to be tried again before there is so much of it, or it ends as an object does.
        self._enough = 0

    def feed(self, data: bytes) -> None:
        self._text += self._utf8.decode(data)
        if len(self._text) > LONGEST:
            raise Malformed(f"a message of more than {LONGEST} bytes")

    def take(self) -> dict[str, Any] | None:
        """The next object; None where it has not come as a whole.  Malformed where it is none."""
        text = self._text = self._text.lstrip()
        if not text or (len(text) < self._enough and not text.rstrip().endswith("}")):
            return None
        if not text.startswith("{"):
            raise Malformed(f"expected an object, found {text[:20]!r}")
        try:
            value, end = self._json.raw_decode(text)
        except RecursionError:
            raise Malformed("a message that is nested too deeply") from None
        except ValueError:
            # It may go on; if it does not, the limit or the deadline ends it.
            self._enough = len(text) + len(text) // 2
            return None
        self._text, self._enough = text[end:], 0
        assert isinstance(value, dict)
        return value


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


class Monitor:
    """One conversation, as a context manager.

    Raises CannotDo where nobody listens or another client holds the monitor for `patience` seconds, StandsStill where
    it is QEMU that does not answer, GuestGone where the guest ends in the middle, Refused where QEMU refuses a command.
    """

    def __init__(self, path: str, patience: float = PATIENCE) -> None:
        self._path = path
        self._patience = patience
        self._socket = _socket()
        self._decoder = Decoder()
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._last = 0
        self._oob = False

    def __enter__(self) -> "Monitor":
        try:
            self._connect()
        except BaseException:
            self.leave()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.leave()

    def leave(self) -> None:
        """As the end of the `with` block; of one that has been left already nothing happens."""
        self._socket.close()

    def step_aside(self, seconds: float) -> None:
        """Let others have the monitor for so long, and go on in a conversation of its own."""
        self.leave()
        time.sleep(seconds)
        self._socket, self._decoder = _socket(), Decoder()
        self._events.clear()
        self.__enter__()

    def hang_up(self) -> None:
        """From another thread: whoever is in this conversation finds that the guest went away."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def ask(self, command: str, **arguments: Any) -> Any:
        """The answer to a command; arguments with '_' for '-'."""
        return self._ask("execute", command, arguments)

    def ask_oob(self, command: str, **arguments: Any) -> Any:
        """As `ask`, past a QEMU that stands still, where this one can do that (out of band)."""
        if self._oob:
            try:
                return self._ask("exec-oob", command, arguments)
            except Refused:
                # Not every command can be given so.
                pass
        return self.ask(command, **arguments)

    def event(self, patience: float) -> dict[str, Any] | None:
        """The next thing that QEMU has told in this conversation without being asked; None where nothing comes."""
        deadline = Deadline(patience)
        try:
            while not self._events:
                self._sort(self._message(deadline))
        except TimeoutError:
            return None
        return self._events.popleft()

    def send_fd(self, name: str, fd: int) -> None:
        """Hand a descriptor to QEMU, which keeps it as `name` until it is used."""
        try:
            self._wait(select.POLLOUT, Deadline(ANSWER))
            # It comes with the byte before the command that names it.
            socket.send_fds(self._socket, [b" "], [fd])
        except TimeoutError:
            raise CannotDo(f"{self._path} takes nothing more") from None
        except OSError as error:
            raise GuestGone(f"the guest at {self._path} went away") from error
        self.ask("getfd", fdname=name)

    def pid(self) -> int:
        """The process that listens on the socket."""
        answer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int(struct.unpack("3i", answer)[0])

    # the talk

    def _connect(self) -> None:
        deadline = Deadline(self._patience)
        _reach(self._socket, self._path, deadline)
        # Whoever has got in at the last moment is heard.
        deadline = Deadline(max(deadline.left, 0.01))
        pid = self.pid()
        try:
            self._negotiate(self._message(deadline), deadline)
        except TimeoutError:
            # A QEMU that stands still may greet; it does not negotiate.
            raise (StandsStill(self._path, pid) if userfault.waits(pid) else _busy(self._path)) from None

    def _negotiate(self, greeting: dict[str, Any], deadline: Deadline) -> None:
        offered = greeting.get("QMP")
        if not isinstance(offered, dict):
            raise self._no_qmp(f"found {str(greeting)[:60]}")
        capabilities = offered.get("capabilities")
        self._oob = isinstance(capabilities, list) and "oob" in capabilities
        self._answer("execute", "qmp_capabilities", {"enable": ["oob"] if self._oob else []}, deadline)

    def _ask(self, how: str, command: str, arguments: dict[str, Any]) -> Any:
        try:
            return self._answer(how, command, arguments, Deadline(ANSWER))
        except TimeoutError:
            raise Busy(f"no answer to '{command}' from {self._path} in {ANSWER:.0f} s") from None

    def _answer(self, how: str, command: str, arguments: dict[str, Any], deadline: Deadline) -> Any:
        """TimeoutError where none has come by then."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._last += 1
        try:
            self._send(json.dumps({how: command, "arguments": named, "id": self._last}).encode(), deadline)
            while (answer := self._sort(self._message(deadline))) is None:
                pass
        except GuestGone as error:
            raise GuestGone(f"the guest at {self._path} went away during '{command}'") from error
        if "return" in answer:
            return answer["return"]
        raise Refused(command, _words_of_error(answer))

    def _sort(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """The message, where it is the answer to the last command."""
        if "event" in message:
            self._events.append(message)
        elif ("return" in message or "error" in message) and message.get("id", self._last) == self._last:
            return message
        return None

    def _send(self, data: bytes, deadline: Deadline) -> None:
        view = memoryview(data)
        try:
            while view:
                self._wait(select.POLLOUT, deadline)
                view = view[self._socket.send(view) :]
        except TimeoutError:
            raise
        except OSError as error:
            raise GuestGone(f"the guest at {self._path} went away") from error

    def _message(self, deadline: Deadline) -> dict[str, Any]:
        """The next one; TimeoutError where none has come by then."""
        try:
            while (message := self._decoder.take()) is None:
                self._wait(select.POLLIN, deadline)
                data = self._socket.recv(CHUNK)
                if not data:
                    raise GuestGone(f"the guest at {self._path} went away")
                self._decoder.feed(data)
        except Malformed as error:
            raise self._no_qmp(str(error)) from error
        except TimeoutError:
            raise
        except OSError as error:
            raise GuestGone(f"the guest at {self._path} went away") from error
        return message

    def _wait(self, what: int, deadline: Deadline) -> None:
        if self._socket.fileno() < 0:
            raise ConnectionError("the conversation was left")
        poll = select.poll()
        poll.register(self._socket, what)
        if not poll.poll(deadline.left * 1000):
            raise TimeoutError

    def _no_qmp(self, why: str) -> CannotDo:
        hint = "GUEST is the path of a QMP socket: -qmp unix:PATH,server,nowait"
        return CannotDo(f"{self._path} does not speak QMP: {why}", hint)


def _words_of_error(answer: dict[str, Any]) -> str:
    error = answer.get("error")
    return str(error.get("desc", error)) if isinstance(error, dict) else str(error)


def _reach(end: socket.socket, path: str, deadline: Deadline) -> None:
    """Connect, waiting for a place in the queue of a busy monitor."""
    hint = "GUEST is the path of a QMP socket: -qmp unix:PATH,server,nowait"
    for _ in deadline.tries(0.02):
        try:
            return end.connect(path)
        except BlockingIOError:
            continue
        except ConnectionRefusedError as error:
            text = f"no guest at {path}: nobody listens there"
            raise GuestGone(text, "its QEMU has ended; or " + hint) from error
        except OSError as error:
            family = GuestGone if isinstance(error, FileNotFoundError) else CannotDo
            raise family(f"no guest at {path}: {error.strerror or error}", hint) from error
    raise _busy(path)


def _busy(path: str) -> Busy:
    return Busy(
        f"the monitor {path} does not answer: another client holds it",
        "a QMP socket talks to one client at a time; end that one, or give QEMU a second -qmp",
    )
