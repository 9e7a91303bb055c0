"""The bytes of a state from QEMU's socket to the sink, validated on their way.

The commands that ask for a return path are taken out, so that what leaves is the plain stream;
QEMU does not close its end when it has sent all, so the validator says where the state ends.
"""

import contextlib
import select
import socket
from collections.abc import Callable

from ..errors import CannotDo, Damaged
from ..io.descriptors import kind, splice, write_all
from ..qemu.channel import QemuChannel
from ..stream import constants
from ..stream.reader import StateReader
from ..stream.records import Command, Devices
from ..stream.validate import State, Validator

# How long QEMU may take to close its end, in seconds
CLOSES = 60.0


class Peeked:
    """QEMU's socket, whose bytes are looked at while they stay there, and then go to the sink.

    Where the sink is a pipe they go past our memory (splice), which saves one of two copies.  Those that stay are taken
    before we sleep: they could keep QEMU from sending more, and kernels before 6.18 show them again to one who has
    slept in a peek (Linux 7bf3a476ce43).  From the device sections on, held until the end, all are taken.
    """

    # More than a page; with more than this the device sections have begun.
    MOST = 32 << 10
    SO_PEEK_OFF = 42

    def __init__(self, channel: QemuChannel, sink: int) -> None:
        self._channel = channel
        self._qemu = qemu = channel.end
        self._sink = sink
        self._stay = kind(sink) == "pipe"
        # Bytes that were looked at: those that are still in the socket, and older ones that have been taken
        self._waiting = 0
        self._taken = 0
        if self._stay:
            qemu.setsockopt(socket.SOL_SOCKET, self.SO_PEEK_OFF, 0)

    def readinto(self, view: memoryview, /) -> int:
        if self._waiting > self.MOST:
            self._take_waiting()
            self._stay = False
        flags = socket.MSG_PEEK if self._stay else 0
        while True:
            try:
                count = self._qemu.recv_into(view, 0, flags | socket.MSG_DONTWAIT)
                break
            except BlockingIOError:
                if self._stay:
                    self._take_waiting()
                if not self._channel.wait():
                    return 0
        if self._stay:
            self._waiting += count
        else:
            self._taken += count
        return count

    def quiet(self) -> bool:
        """Nothing has come, nor its end, that has not been looked at."""
        try:
            self._qemu.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        return False

    def closed(self) -> bool:
        """Nothing comes any more."""
        poll = select.poll()
        poll.register(self._qemu, select.POLLIN)
        if not poll.poll(CLOSES * 1000):
            return False
        with contextlib.suppress(ConnectionError):
            return not self._qemu.recv(1, socket.MSG_PEEK)
        return True

    def drop(self, view: memoryview) -> None:
        """These bytes, the oldest ones, are not for the sink."""
        self._take(len(view) - self._of_taken(view))

    def send(self, view: memoryview) -> None:
        """These bytes, the oldest ones, to the sink."""
        ours = self._of_taken(view)
        write_all(self._sink, view[:ours])
        left = len(view) - ours
        self._waiting -= left
        while left:
            left -= splice(self._qemu.fileno(), self._sink, left)

    def _of_taken(self, view: memoryview) -> int:
        """How many of these bytes, the oldest ones, have been taken already; no longer counted then."""
        count = min(self._taken, len(view))
        self._taken -= count
        return count

    def _take_waiting(self) -> None:
        self._taken += self._waiting
        self._take(self._waiting)

    def _take(self, count: int) -> None:
        self._waiting -= count
        while count:
            count -= len(self._qemu.recv(count))


def answer(qemu: socket.socket, status: int) -> None:
    """Tell a waiting QEMU how the far end fared (0: it has the whole state).  The point of no return."""
    try:
        qemu.sendall(constants.SHUT.pack(constants.MIG_RP_MSG_SHUT, 4, status))
    except OSError as error:
        raise CannotDo("QEMU gave up when it had sent everything") from error


class Outgoing:
    """QEMU's channel to a sink, as the plain stream.  `sent` counts the bytes that have left.

    whole: the commands that ask for a return path stay.  closing: QEMU closes its end when it has sent all, for it has
    no return path.  ended: called once all has come, with the device sections, before they are judged; whether it has
    given the guest away.
    """

    def __init__(
        self,
        channel: QemuChannel,
        sink: int,
        *,
        whole: bool = False,
        closing: bool = False,
        ended: Callable[[Devices], bool] | None = None,
    ) -> None:
        self._channel = channel
        self._ended = ended
        self._closing = closing
        self._whole = whole
        self._peeked = Peeked(channel, sink)
        self._reader = StateReader(self, self._pass)
        self._came = 0
        self._cuts: list[tuple[int, int]] = []
        self._passed = 0
        self.sent = 0
        self.machine: str | None = None

    def run(self) -> State:
        """Carry everything up to the end of the state; CannotDo where QEMU gives up before.

        Raises what writing to the sink raises.
        """
        reader, validator = self._reader, Validator()
        try:
            for record in reader:
                if self._ended and isinstance(record, Devices) and not record.early and self._peeked.quiet():
                    # QEMU closes its end when it has been told that all is well.
                    self._closing |= self._ended(record)
                validator.see(record)
                if isinstance(record, Command) and not self._whole:
                    self._see_command(record)
                self.machine = validator.state.machine
        except Damaged as error:
            raise CannotDo(f"QEMU's stream is not as it should be: {error}", *error.hints) from error
        # A guest can put what looks like an end into a device.
        if not validator.ended or not (self._peeked.closed() if self._closing else self._peeked.quiet()):
            raise CannotDo(f"QEMU's stream does not end as it should, at offset {reader.window.offset}")
        reader.window.flush()
        return validator.state

    def answer(self, status: int) -> None:
        """As the function `answer`."""
        answer(self._channel.end, status)

    def readinto(self, view: memoryview, /) -> int:
        # What has been judged leaves first: it is still in QEMU's socket.
        self._reader.window.flush()
        count = self._peeked.readinto(view)
        if not count:
            raise self._channel.gave_up(self._came)
        self._came += count
        return count

    def _see_command(self, command: Command) -> None:
        if command.number in (constants.MIG_CMD_OPEN_RETURN_PATH, constants.MIG_CMD_PING):
            self._cuts.append((command.offset, command.offset + constants.COMMAND.size + len(command.data)))

    def _pass(self, view: memoryview) -> None:
        """What is to leave of these bytes, the next ones of the stream."""
        begin, end = self._passed, self._passed + len(view)
        at = begin
        for first, behind in [cut for cut in self._cuts if begin <= cut[0] < end] + [(end, end)]:
            self._peeked.send(view[at - begin : first - begin])
            self._peeked.drop(view[first - begin : behind - begin])
            self.sent += first - at
            at = behind
        self._passed = end
