"""The ends of a move without a QEMU: one that sends, one that loads, and another side that says what it is told."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from qmp_server import QmpServer
from vmstate.io.descriptors import channel
from vmstate.migrate import link as protocol
from vmstate.migrate.link import Link
from vmstate.migrate.proof import Talk
from vmstate.migrate.uri import Transport
from vmstate.stream import constants

from unit.qemu.fake_qemu import FakeQemu

MOVE = "0123456789abcdef"
# That of the move, and another one.
SECRET, GUESS = "5ec7e7" + "0" * 58, "bad" + "0" * 61
SHUT = constants.SHUT.pack(constants.MIG_RP_MSG_SHUT, 4, 0)
# The command has another name than ssh, which would be asked for its ciphers.
TRANSPORT = Transport("ssh://there/b.qmp", words=("carrier",), host="there", remote="x")
Script = Callable[[Link], object]


class SendingQemu(FakeQemu):
    """It sends `data` and stands; SHUT has it complete, and the end of its socket has its guest run on."""

    server: QmpServer
    data = b"any bytes"

    def migrate(self, uri: str) -> dict[str, Any]:
        self.migration = "active"
        if uri.startswith("fd:"):
            end = socket.socket(fileno=os.dup(self.server.taken[-1]))
            threading.Thread(target=self._send, args=(end,), daemon=True).start()
        return {}

    def migrate_cancel(self) -> dict[str, Any]:
        self.migration = "cancelled"
        return {}

    def _send(self, end: socket.socket) -> None:
        said = b""
        with end, contextlib.suppress(OSError):
            end.sendall(self.data)
            self.run = "finish-migrate"
            said = end.recv(len(SHUT))
        given = said == SHUT
        self.run, self.migration = ("postmigrate", "completed") if given else ("running", "failed")


class LoadingQemu(FakeQemu):
    """It waits, and has loaded all once a '!' comes; the end of its socket before is a failure."""

    server: QmpServer

    def __init__(self) -> None:
        super().__init__()
        self.run = "inmigrate"

    def stop(self) -> dict[str, Any]:
        return {}

    def migrate_incoming(self, uri: str, exit_on_error: bool) -> dict[str, Any]:
        self.migration = "active"
        end = socket.socket(fileno=os.dup(self.server.taken[-1]))
        threading.Thread(target=self._load, args=(end,), daemon=True).start()
        return {}

    def _load(self, end: socket.socket) -> None:
        with end, contextlib.suppress(OSError):
            while data := end.recv(1 << 16):
                if data.endswith(b"!"):
                    self.run, self.migration = "paused", "completed"
                    end.sendall(SHUT)
        if self.migration == "active":
            self.migration = "failed"


class OtherSide:
    """As the process that carries a link: `script` has the other end of it, and the link ends with the script."""

    def __init__(self, script: Script) -> None:
        down, self._down = channel()
        up, self._up = channel()
        self.stdin = os.fdopen(down.detach(), "wb", 0)
        self.stdout = os.fdopen(up.detach(), "rb", 0)
        self._thread = threading.Thread(target=self._run, args=(script,), daemon=True)
        self._thread.start()

    def _run(self, script: Script) -> None:
        with contextlib.suppress(OSError):
            script(Link(self._down.fileno(), self._up.fileno()))
        self.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired("carrier", timeout or 0)
        return 0

    def kill(self) -> None:
        for end in (self._down, self._up):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def asks(there: Link, purpose: str, secret: str = SECRET) -> Talk:
    """Ask for the guest of the move, as one who has this secret."""
    talk = Talk.about(purpose, MOVE, secret)
    there.send(protocol.HELLO, version=1, purpose=purpose, move=MOVE, nonce=talk.asker)
    if frame := there.receive():
        talk.asked = frame.values["nonce"]
        there.send(protocol.PROOF, proof=talk.prove("ask"))
    return talk


def is_asked(there: Link, secret: str = SECRET) -> Talk:
    """Be asked for it, as one who has this secret."""
    frame = there.receive()
    values = frame.values if frame else {}
    talk = Talk(values["purpose"], values["move"], secret, values["nonce"], "0" * 64)
    there.send(protocol.CHALLENGE, nonce=talk.asked)
    hear(there, protocol.PROOF)
    return talk


def hear(link: Link, *kinds: int) -> bool:
    """Take what comes until one of these; False where the link ends before."""
    while frame := link.receive():
        if frame.kind in kinds:
            return True
    return False
