"""The bytes of a state from the input to the socket of a QEMU that loads it, validated on their way.

The device sections, and all after them, are not let go before the input has proven its end: QEMU cannot run a guest
without them.
"""

import contextlib
import socket
from collections.abc import Callable
from typing import NamedTuple

from ..errors import Damaged
from ..io.descriptors import HOLD, enlarge, write_all
from ..io.readers import Pushback, Reader, read_up_to
from ..stream.reader import StateReader
from ..stream.records import Blocks, Configuration
from ..stream.validate import State, validate

PIECE = 64 << 10


class Head(NamedTuple):
    """What the first kilobytes of a state say: the machine type's name; name and size in bytes of each RAM block."""

    machine: str
    blocks: tuple[tuple[str, int], ...] = ()


class _Recorder:
    """A `Reader` that keeps what was read."""

    def __init__(self, source: Reader) -> None:
        self._source = source
        self.data = b""

    def readinto(self, view: memoryview, /) -> int:
        count = self._source.readinto(view[:PIECE])
        self.data += view[:count]
        return count


def read_head(source: Reader) -> tuple[Head, bytes]:
    """The head of a state, and all the bytes that were read for it.

    Raises Damaged where the input is empty, cut in its head, or no state.
    """
    recorder = _Recorder(source)
    machine = ""
    for record in StateReader(recorder):
        if isinstance(record, Configuration):
            machine = record.machine.decode("utf-8", "backslashreplace")
        if isinstance(record, Blocks):
            return Head(machine, tuple((block.text, block.size) for block in record.blocks)), recorder.data
    raise Damaged("no list of RAM blocks in the state")


class QemuStopped(Exception):
    """QEMU does not take any more: it has refused the state, or has ended."""


class Incoming:
    """A state from an input, whose first bytes `ahead` have been read, to the socket of a QEMU that loads it.

    `came` counts the bytes that were read, `passed` those that QEMU has been given.
    """

    def __init__(self, source: Reader, ahead: bytes, qemu: socket.socket) -> None:
        self._source = source
        self._qemu = qemu
        self._ahead = ahead
        self._over = False
        self.came = len(ahead)
        self.passed = 0
        enlarge(qemu.fileno())

    def prefill(self) -> State | None:
        """Read the first `HOLD` bytes, of which QEMU gets none yet; where that is the whole input, judge it."""
        if len(self._ahead) < HOLD:
            self._ahead += read_up_to(self, HOLD - len(self._ahead))
        if len(self._ahead) >= HOLD:
            return None
        return validate(Pushback(self._ahead, _Nothing()))

    def carry(self, settle: Callable[[State], object]) -> State:
        """Pass on the whole input; `settle` is called once it has proven its end, before the devices are let go.

        Damaged where the input is not whole, QemuStopped where QEMU refuses.
        """
        state = validate(Pushback(self._ahead, self), self._pass, settle=settle)
        with contextlib.suppress(OSError):
            self._qemu.shutdown(socket.SHUT_WR)
        return state

    def readinto(self, view: memoryview, /) -> int:
        # Once over, its descriptor may be closed, and its number be another's.
        if self._over:
            return 0
        try:
            count = self._source.readinto(view)
        except OSError as error:
            raise Damaged(f"the input broke off at offset {self.came}: {error.strerror}") from error
        self.came += count
        self._over = not count
        return count

    def _pass(self, view: memoryview) -> None:
        try:
            write_all(self._qemu.fileno(), view)
        except ConnectionError as error:
            raise QemuStopped from error
        self.passed += len(view)


class _Nothing:
    def readinto(self, _view: memoryview, /) -> int:
        return 0
