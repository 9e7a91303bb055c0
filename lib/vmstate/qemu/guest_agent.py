"""The talk with a guest's agent (qemu-ga), over the socket that QEMU keeps for it: the guest's clock, its addresses.

The agent greets nobody, talks to one client at a time, and may not run at all: then the socket takes every word and
stays silent.  So all has a deadline, and no command leaves before the agent has answered `guest-sync-delimited`: none
is left in the port to be carried out at another time.  What it answers is the guest's word, not QEMU's.

`monitor` is of no use here: an agent sends 0xFF before an answer, and errors that another client has left.
"""

import contextlib
import ipaddress
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

from ..deadline import Deadline
from ..errors import CannotDo
from ..fields import Fields, objects_of
from . import answers
from .monitor import Monitor

PORT = "org.qemu.guest_agent.0"
# A serial line has no name; so is the one of the agent called, it or its character device.
SERIAL = (PORT, "qga0")
PATIENCE = 3.0
MOST = 1 << 20
SECOND = 10**9
_SOCKET = re.compile(r"(?:disconnected:)?unix:(.+),server=on", re.DOTALL)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def path_of(monitor: Monitor) -> str | None:
    """The UNIX socket of a guest's agent; None where the guest has no port for one, or it leads elsewhere."""
    files = answers.chardevs(monitor)
    for place in ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"):
        for child in answers.children(monitor, place):
            label = _label(monitor, place, child.name, child.type)
            if label and (found := _SOCKET.fullmatch(files.get(label, ""))):
                return _absolute(found[1], monitor)
    return None


def _label(monitor: Monitor, place: str, name: str, kind: str) -> str | None:
    """The character device behind a device, if that is the agent's port."""
    if kind not in ("child<virtserialport>", "child<isa-serial>"):
        return None
    path = f"{place}/{name}"
    label = answers.qom_text(monitor, path, "chardev")
    if kind == "child<isa-serial>":
        return label if {label, name} & set(SERIAL) else None
    return label if answers.qom_text(monitor, path, "name") == PORT else None


def _absolute(path: str, monitor: Monitor) -> str:
    """A path as QEMU was given it, seen from where QEMU was started."""
    with contextlib.suppress(OSError):
        return os.path.join("" if path.startswith("/") else os.readlink(f"/proc/{monitor.pid()}/cwd"), path)
    return path


class Agent:
    """One conversation, as a context manager; all of it takes at most `patience` seconds.

    Raises CannotDo where nobody answers, another client holds the socket, or the agent refuses.
    """

    def __init__(self, path: str, patience: float = PATIENCE) -> None:
        self._path = path
        self._patience = patience
        self._deadline = Deadline(patience)
        self._received = b""
        self._socket = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> "Agent":
        self._deadline = Deadline(self._patience)
        try:
            self._connect()
            self._sync()
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        """The answer to a command; arguments with '_' for '-'."""
        self._send(command, {name.replace("_", "-"): value for name, value in arguments.items()})
        line = self._line()
        answer = _message(line)
        if "return" in answer:
            return answer["return"]
        error = answer.get("error")
        said = error.get("desc") if isinstance(error, dict) else line
        raise CannotDo(f"the agent at {self._path} refuses '{command}': {ascii(said):.200}")

    def _connect(self) -> None:
        while True:
            with self._in_time(), contextlib.suppress(BlockingIOError):
                return self._socket.connect(self._path)
            # Others wait there as well.
            time.sleep(0.02)

    def _sync(self) -> None:
        """See that the agent is there, and that what comes next answers us and no client before."""
        number = int.from_bytes(os.urandom(6), "big")
        # The byte has the agent forget the half of a command that such a client may have left.
        self._send("guest-sync-delimited", {"id": number}, b"\xff")
        while True:
            _, mark, line = self._line().rpartition(b"\xff")
            if mark and _message(line).get("return") == number:
                return

    def _send(self, command: str, arguments: dict[str, Any], before: bytes = b"") -> None:
        message = json.dumps({"execute": command, "arguments": arguments})
        with self._in_time():
            self._socket.sendall(before + message.encode() + b"\n")

    def _line(self) -> bytes:
        while b"\n" not in self._received:
            with self._in_time():
                more = self._socket.recv(1 << 16)
            self._received += more
            if not more or len(self._received) > MOST:
                raise CannotDo(f"the talk with the agent at {self._path} broke off in the middle of an answer")
        line, _, self._received = self._received.partition(b"\n")
        return line

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        try:
            if self._deadline.over:
                raise TimeoutError
            self._socket.settimeout(self._deadline.left)
            yield
        except TimeoutError as error:
            text = f"the agent at {self._path} does not answer within {self._patience:g} s"
            raise CannotDo(text, "qemu-ga has to run in the guest, and no other client may hold its socket") from error
        except OSError as error:
            raise CannotDo(f"no talk with the agent at {self._path}: {error.strerror or error}") from error


def _message(line: bytes) -> dict[str, Any]:
    """What the agent said; nothing where it is no JSON object."""
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(line)
        return said if isinstance(said, dict) else {}
    return {}


def set_time(path: str, patience: float = PATIENCE) -> None:
    """Set the guest's clock to the host's time; CannotDo, with the reason, where it does not come to that."""
    with Agent(path, patience) as agent:
        try:
            agent.ask("guest-set-time", time=time.time_ns())
        except CannotDo:
            # It also fails where the clock is set, but the guest has no clock chip or no hwclock to set that one too.
            if abs(_time(agent) - time.time_ns()) > SECOND:
                raise


def time_of(path: str, patience: float = PATIENCE) -> int:
    """The guest's time, in ns since 1970."""
    with Agent(path, patience) as agent:
        return _time(agent)


def _time(agent: Agent) -> int:
    return Fields({"return": agent.ask("guest-get-time")}, "the agent's answer to 'guest-get-time'").whole("return")


def addresses(path: str, patience: float = PATIENCE) -> dict[str, list[str]]:
    """MAC -> IP addresses in the guest, as it tells: of interfaces that have a MAC; without those of the loopback."""
    with Agent(path, patience) as agent:
        answer = agent.ask("guest-network-get-interfaces")
    known: dict[str, dict[str, None]] = {}
    for card in objects_of(answer, f"the agent at {path}"):
        # Those of another kind of network have no MAC, or a longer one.
        mac = card.text("hardware-address", "").lower()
        if _MAC.fullmatch(mac) and mac != "00:00:00:00:00:00":
            mine = known.setdefault(mac, {})
            for entry in card.objects("ip-addresses"):
                address = _address(entry)
                mine.update({} if address.is_loopback else {str(address): None})
    return {mac: list(mine) for mac, mine in known.items()}


def _address(entry: Fields) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(entry.text("ip-address"))
    except ValueError:
        raise entry.error("ip-address", "an IP address") from None
