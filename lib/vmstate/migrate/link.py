"""The wire protocol of a migration over a link: frames over two descriptors; `messages` reads what they say.

Source: docs/link.md, which says what each frame means and who sends it when.
"""

import json
import select
import struct
import threading
import zlib
from typing import Any

from ..errors import CannotDo, Damaged
from ..io.descriptors import BLOCK, enlarge, memory, write_all
from ..io.readers import FdReader

VERSION = 1
MAGIC = b"vml1"
HEAD = struct.Struct(">4sBBxxI")
SUM = struct.Struct(">I")
MOST = 2 * BLOCK
SUMMED = 1
# In each pipe and socket on the way: what waits there when the guest is stopped for the last part prolongs its pause
# (measured: with a whole block each by half), and less makes the way slower.
ROOM = 256 << 10
HELLO, ACCEPT, REFUSE, DATA, BACK, SWITCH, END, LOADED, GO, RUNNING, CANCEL, CHALLENGE, PROOF = b"HARDBSELGNCQP"
RAW = (DATA, BACK)
# The other side may have to start a QEMU, or somebody to type a password.
ANSWERS = 60.0
ENDS = 10.0
# Longer than any source stands still before it takes its guest back
SILENT = 600.0
LOST = "the link is lost: its source has ended, or the way to it"
# More than an honest other side has to say at once.
MANY = 64
EMPTY = memoryview(b"")


class LinkFrame:
    """One frame: `data` of those that carry bytes (good until the next is received), `values` of all others."""

    def __init__(self, kind: int, data: memoryview = EMPTY, values: dict[str, Any] | None = None) -> None:
        self.kind, self.data, self.values = kind, data, values or {}


class Link:
    """One end of the conversation.  sums: data that we send carry checksums."""

    def __init__(self, reading: int, writing: int, *, sums: bool = True) -> None:
        self._source = FdReader(reading)
        self._writing = writing
        self._sums = sums
        self._buffer = memory(MOST)
        self._one_at_a_time = threading.Lock()
        for fd in (reading, writing):
            enlarge(fd, ROOM)

    def send(self, kind: int, **values: Any) -> None:
        """Raises OSError where the link is gone."""
        payload = json.dumps(values).encode()
        with self._one_at_a_time:
            write_all(self._writing, _head(kind, SUMMED, payload) + payload)

    def tell(self, kind: int, **values: Any) -> None:
        """`send` for one who cannot go on without it: CannotDo where the link is gone."""
        try:
            self.send(kind, **values)
        except OSError as error:
            raise CannotDo(LOST) from error

    def send_bytes(self, kind: int, view: memoryview) -> None:
        with self._one_at_a_time:
            write_all(self._writing, _head(kind, SUMMED if self._sums else 0, view))
            write_all(self._writing, view)

    def receive(self) -> LinkFrame | None:
        """The next frame; None at the end of the link.  Damaged where it is not as it should be."""
        size = HEAD.size + SUM.size
        if not self._fill(self._buffer[:size]):
            return None
        head = bytes(self._buffer[: HEAD.size])
        magic, kind, flags, length = HEAD.unpack(head)
        (found,) = SUM.unpack(self._buffer[HEAD.size : size])
        if magic != MAGIC:
            raise Damaged("the other side does not speak as vmstate does", _what_it_said(bytes(self._buffer[:size])))
        if length > MOST:
            raise Damaged(f"a frame of {length} bytes came over the link: expected at most {MOST}")
        payload = self._buffer[:length]
        if not self._fill(payload):
            return None
        if found != zlib.crc32(payload if flags & SUMMED else b"", zlib.crc32(head)):
            raise Damaged(f"the link has changed bytes on their way, in a frame of {length} bytes")
        return LinkFrame(kind, payload) if kind in RAW else LinkFrame(kind, values=_values(payload))

    def comes(self, seconds: float | None) -> bool:
        """Whether something comes within this time."""
        poll = select.poll()
        poll.register(self._source.fd, select.POLLIN)
        return bool(poll.poll(None if seconds is None else max(0, seconds * 1000)))

    @property
    def reading(self) -> int:
        return self._source.fd

    def _fill(self, view: memoryview) -> bool:
        """False where the link ends before; what it has begun to say then counts for nothing."""
        while view:
            try:
                count = self._source.readinto(view)
            except ConnectionError:
                return False
            if not count:
                return False
            view = view[count:]
        return True


def _head(kind: int, flags: int, payload: bytes | memoryview) -> bytes:
    head = HEAD.pack(MAGIC, kind, flags, len(payload))
    return head + SUM.pack(zlib.crc32(payload if flags & SUMMED else b"", zlib.crc32(head)))


def _values(payload: memoryview) -> dict[str, Any]:
    try:
        values = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"words of the other side are no JSON: {error}") from error
    if not isinstance(values, dict):
        raise Damaged("words of the other side are no JSON object")
    return values


def _what_it_said(begin: bytes) -> str:
    text = begin.decode("ascii", "backslashreplace")
    return f"expected a 'vm-restore --receive' there, silent but for its frames; found {text!r}"
