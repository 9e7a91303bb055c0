"""A server of pages in a thread of its own, and the channel of a QEMU that has lost one."""

import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from typing import NamedTuple

from ..deadline import Deadline
from ..errors import CannotDo, Stopped
from ..qemu.monitor import Monitor
from ..signals import hold_signals, release_signals
from ..stream import constants
from .page_server import Lost, PageServer
from .postcopy import Opening, ReturnPath, Said, command

# How long a QEMU may take to answer on a channel that it takes up, in seconds.
ANSWERS = 30.0
# And how long until it listens there
LISTENS = 10.0
# How long a server may take to see that its channel was shut down
LEAVES = 5.0


class Serving:
    """`start` it, then `wait`.  hang_up: called in its thread where it ends with an error."""

    def __init__(self, server: PageServer, hang_up: Callable[[], object] = lambda: None) -> None:
        self.server = server
        self._hang_up = hang_up
        self.error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._first = b""
        self._told = False

    def start(self, first: bytes) -> None:
        """`first`: what the server is to send before anything else."""
        self._first = first
        self._thread.start()

    def wait(self, damaged: Callable[[], None]) -> BaseException | None:
        """What the server ended with, None where QEMU has everything.

        A signal, also one that has been held until now, has it send all that is left first.  `damaged` is called once
        where a page cannot be read that nobody has asked for; what is asked for is served on until `give_up`.
        """
        try:
            release_signals()
            return self._wait(damaged)
        except Stopped:
            self.server.finish_up()
            return self._wait(damaged)

    def _wait(self, damaged: Callable[[], None]) -> BaseException | None:
        # Not by `join`: a signal that interrupts it makes Python 3.11 take the thread for ended.
        while not self._ended.wait(0.2):
            if self.server.damage and not self._told:
                self._told = True
                damaged()
        # What has become of it is settled; a signal that comes now finds nothing left to be sent.
        hold_signals()
        return self.error or self.server.damage

    def join(self) -> None:
        """Its channel was shut down: until it uses it no more, if it was started."""
        if self._thread.ident is not None:
            self._ended.wait(LEAVES)

    def _run(self) -> None:
        try:
            self.server.run(self._first)
        except BaseException as error:  # noqa: BLE001 - for the other thread, which raises it
            self.error = error
            self._hang_up()
        self._ended.set()


class Recovered(NamedTuple):
    """A channel that QEMU has taken up: which pages it has, what it has said since, and the rest of its words."""

    end: socket.socket
    bitmaps: dict[bytes, bytes]
    path: ReturnPath
    said: list[Said]


def recover(monitor: Monitor, opening: Opening) -> Recovered:
    """Have a QEMU whose channel is lost take up a new one; CannotDo where it does not."""
    folder = tempfile.mkdtemp(prefix="vmstate-")
    place = os.path.join(folder, "channel")
    try:
        # A QEMU that stands still, for want of a page, listens only where it is asked past its own queue.
        monitor.ask_oob("migrate-recover", uri=f"unix:{place}")
        end = _connected(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = Recovered(end, {}, ReturnPath(), [])
    end.settimeout(ANSWERS)
    try:
        end.sendall(opening.ask_bitmaps())
        _hear(found, lambda said: len(found.bitmaps) == len(opening.blocks))
        end.sendall(command(constants.MIG_CMD_POSTCOPY_RESUME))
        _hear(found, lambda said: said.kind == constants.MIG_RP_MSG_RESUME_ACK)
    except (OSError, Lost) as error:
        end.close()
        raise CannotDo(f"QEMU does not take up its restore: {error}") from error
    end.settimeout(None)
    return found


def _connected(place: str) -> socket.socket:
    """QEMU listens there, or is about to."""
    end = socket.socket(socket.AF_UNIX)
    trouble = OSError()
    for _ in Deadline(LISTENS).tries(0.01):
        try:
            end.connect(place)
            return end
        except OSError as error:
            trouble = error
    end.close()
    raise CannotDo(f"QEMU does not take up its restore: {trouble.strerror}") from trouble


def _hear(found: Recovered, done: Callable[[Said], bool]) -> None:
    """Take what QEMU says, until `done`; what it asks for meanwhile is kept."""
    over = False
    while not over:
        data = found.end.recv(64 << 10)
        if not data:
            raise Lost("it has closed its channel")
        for said in found.path.feed(data):
            if said.kind == constants.MIG_RP_MSG_RECV_BITMAP:
                found.bitmaps[said.block] = said.bitmap
            else:
                found.said.append(said)
            over = over or done(said)
