"""QEMU's bytes in both directions over a link, as they are: for a move that may end in postcopy.

Before the guest crosses over the receiver keeps QEMU's SHUT to itself and says 'loaded', as in any move; behind it
everything passes, and QEMU ends by itself.
"""

import contextlib
import os
import select
import socket

from . import layout, link
from .errors import CannotDo
from .link import Far, Frame
from .octets import BLOCK, memory


class Crossing:
    """`sent` counts the bytes that have left."""

    def __init__(self, qemu: socket.socket, far: Far) -> None:
        self._qemu = qemu
        self._far = far
        self._wake, self._waker = os.pipe()
        self._loaded = False
        self._shut = False
        self.sent = 0
        self._other = far.heard
        far.heard = self._hear

    def run(self) -> str:
        """'loaded' where the receiver has all of it and waits, 'over' where the guest has crossed over and is whole."""
        buffer = memory(BLOCK)
        poll = select.poll()
        poll.register(self._qemu, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._loaded:
            if self._wake in {fd for fd, _ in poll.poll()}:
                os.read(self._wake, 1)
                if self._far.lost:
                    raise self._far.gone()
                continue
            count = self._qemu.recv_into(buffer)
            if not count:
                if self._shut:
                    return "over"
                raise CannotDo("QEMU gave up")
            self._far.link.send_bytes(link.DATA, buffer[:count])
            self.sent += count
        return "loaded"

    def answer(self, status: int) -> None:
        """As `relay.Outgoing.answer`."""
        try:
            self._qemu.sendall(layout.SHUT.pack(layout.MIG_RP_MSG_SHUT, 4, status))
        except OSError as error:
            raise CannotDo("QEMU gave up when it had sent everything") from error

    def _hear(self, frame: Frame | None) -> bool:
        if frame is None or frame.kind == link.REFUSE:
            self._far.lost = True
            os.write(self._waker, b"x")
            return bool(self._other and self._other(frame))
        if frame.kind == link.BACK:
            # Before it leaves, since QEMU ends over it.
            self._shut = self._shut or bytes(frame.data[:2]) == layout.U16.pack(layout.MIG_RP_MSG_SHUT)
            with contextlib.suppress(OSError):
                self._qemu.sendall(frame.data)
            return True
        if frame.kind == link.LOADED:
            self._loaded = True
            os.write(self._waker, b"x")
        return False
