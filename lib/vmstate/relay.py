"""Bytes of a state between QEMU's socket and everything else, with the two things that must be known on the way.

From QEMU (`Outgoing`): the commands that ask for a return path are taken out, so that what leaves is the plain stream;
and QEMU does not close its end when it has sent all, so the end of the stream has to be recognised.
To QEMU (`Incoming`): nothing of the last `HOLD` bytes is let go before the input has proven its end.
"""

import contextlib
import select
import socket
from collections.abc import Callable

from . import layout
from .description import End, find_end, judge_end
from .errors import CannotDo, Damaged
from .head import ENOUGH, Head, MoreNeeded, parse
from .octets import BLOCK, HOLD, FdReader, Reader, Ring, enlarge, read_up_to

# Nearly every description is smaller; the whole ring is looked at only where this much does not do.
USUAL_TAIL = 2 << 20
# How long QEMU must have been silent behind a description that does not fit its sections.
SILENCE = 2.0


def read_head(source: Reader) -> tuple[Head, bytes]:
    """The head of a state, and all the bytes that were read for it.

    Raises Damaged where the input is empty, cut in its head, or no state.
    """
    data = b""
    step = 4096
    while True:
        more = read_up_to(source, step)
        data += more
        if not data:
            raise Damaged("the input is empty: expected the state of a guest, found 0 bytes")
        try:
            return parse(data), data
        except MoreNeeded:
            if not more:
                raise Damaged(f"truncated at offset {len(data)}, in the head of the state") from None
            if len(data) > ENOUGH:
                raise Damaged(f"no end of the state's head in its first {len(data)} bytes") from None
        step = min(step * 2, BLOCK)


class Outgoing:
    """QEMU's socket to a sink, as the plain stream.  `sent` counts the bytes that have left."""

    def __init__(self, qemu: socket.socket, sink: int, stands: Callable[[], bool] = lambda: True) -> None:
        self._qemu = qemu
        self._sink = sink
        self._stands = stands
        self._ring = Ring(HOLD + BLOCK)
        self.head: Head | None = None

    @property
    def sent(self) -> int:
        return self._ring.left

    def run(self) -> End:
        """Carry everything up to the end of the state; CannotDo where QEMU gives up before.

        Raises what writing to the sink raises.
        """
        self._begin()
        while True:
            self._ring.drain(self._sink)
            # A guest that runs could have put an end into its memory.
            if (end := self._ended()) and self._stands():
                return end
            self._receive()

    def answer(self, status: int) -> None:
        """Tell the waiting QEMU how the far end fared (0: it has the whole state).  The point of no return."""
        try:
            self._qemu.sendall(layout.SHUT.pack(layout.MIG_RP_MSG_SHUT, 4, status))
        except OSError as error:
            raise CannotDo("QEMU gave up when it had sent everything") from error

    def _begin(self) -> None:
        try:
            self.head, data = read_head(FdReader(self._qemu.fileno()))
        except Damaged as error:
            raise CannotDo(f"QEMU gave up before the first page: {error}") from error
        plain = without_return_path(self.head, data)
        space = self._ring.space()
        space[: len(plain)] = plain
        self._ring.filled(len(plain))

    def _receive(self) -> None:
        count = self._qemu.recv_into(self._ring.space())
        if not count:
            raise CannotDo(f"QEMU gave up after {self._ring.came} bytes")
        self._ring.filled(count)

    def _ended(self) -> End | None:
        if self._ring.last(1) != b"}" or self._more_within(0):
            return None
        try:
            return find_end(self._ring.last(USUAL_TAIL)) or find_end(self._ring.last(HOLD))
        except Damaged:
            pass
        try:
            return find_end(self._ring.last(HOLD))
        except Damaged as error:
            # A guest could have put this into its memory; QEMU would then go on.
            if self._more_within(SILENCE):
                return None
            raise CannotDo(f"QEMU's stream does not end as it should: {error}") from error

    def _more_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._qemu, select.POLLIN)
        return bool(poll.poll(seconds * 1000))


def without_return_path(head: Head, data: bytes) -> bytes:
    """`data`, which starts with `head`, less the commands OPEN_RETURN_PATH and PING."""
    plain, at = b"", 0
    for command in head.commands:
        if command.number in (layout.MIG_CMD_OPEN_RETURN_PATH, layout.MIG_CMD_PING):
            plain += data[at : command.offset]
            at = command.offset + command.size
    return plain + data[at:]


class QemuStopped(Exception):
    """QEMU does not take any more: it has refused the state, or has ended."""


class Incoming:
    """A state from an input to the socket of a QEMU that loads it.

    `passed` counts the bytes that QEMU has been given.  After `carry` all but the held tail is there; `judge` tells
    whether the input has proven its end; `release` lets the tail go.
    """

    def __init__(self, source: Reader, ahead: bytes, qemu: socket.socket) -> None:
        self._source = source
        self._qemu = qemu
        self._ring = Ring(HOLD + BLOCK)
        self._ahead = ahead
        self._over = False
        enlarge(qemu.fileno())

    @property
    def came(self) -> int:
        return self._ring.came

    @property
    def passed(self) -> int:
        return self._ring.left

    def prefill(self) -> bool:
        """Read the first `HOLD` bytes, of which QEMU gets none yet; True where that is the whole input."""
        self._fill(self._ahead)
        while self._ring.came < HOLD:
            if not self._receive():
                return True
        return False

    def carry(self) -> None:
        """Pass on the whole input but its newest `HOLD` bytes; QemuStopped where QEMU refuses."""
        self._drain(HOLD)
        while self._receive():
            self._drain(HOLD)

    def judge(self) -> End:
        """The end of the input; Damaged where it has none."""
        return judge_end(self._ring.last(HOLD))

    def release(self) -> None:
        self._drain(0)
        with contextlib.suppress(OSError):
            self._qemu.shutdown(socket.SHUT_WR)

    def _receive(self) -> int:
        # Once over, its descriptor may be closed, and its number be another's.
        if self._over:
            return 0
        try:
            count = self._source.readinto(self._ring.space())
        except OSError as error:
            raise Damaged(f"the input broke off at offset {self._ring.came}: {error.strerror}") from error
        self._ring.filled(count)
        self._over = not count
        return count

    def _fill(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = min(len(space := self._ring.space()), len(view))
            space[:count] = view[:count]
            self._ring.filled(count)
            view = view[count:]

    def _drain(self, keep: int) -> None:
        try:
            self._ring.drain(self._qemu.fileno(), keep)
        except ConnectionError as error:
            raise QemuStopped from error
