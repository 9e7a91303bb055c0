"""The link between the two sides of a move: frames over two descriptors, and the process that carries them.

Source: docs/link.md, which says what each frame means and who sends it when.
"""

import contextlib
import json
import queue
import select
import signal
import struct
import subprocess
import threading
import zlib
from dataclasses import dataclass, field
from typing import Any

from ..errors import CannotDo, Damaged, Misfit, Unsettled, VmstateError
from ..io.descriptors import BLOCK, FdReader, enlarge, memory, write_all
from ..io.pipeline import end_group, words_of_status
from .uri import Way

VERSION = 1
MAGIC = b"vml1"
HEAD = struct.Struct(">4sBBxxI")
SUM = struct.Struct(">I")
MOST = 2 * BLOCK
SUMMED = 1
# In each pipe and socket on the way: what waits there when the guest is stopped for the last part prolongs its pause
# (measured: with a whole block each by half), and less makes the way slower.
ROOM = 256 << 10
HELLO, ACCEPT, REFUSE, DATA, BACK, SWITCH, END, LOADED, GO, RUNNING, CANCEL = b"HARDBSELGNC"
RAW = (DATA, BACK)
# Of a receiver's words, the error that they are on our side.
FAMILY = {1: CannotDo, 2: CannotDo, 3: Damaged, 4: Misfit, 5: Unsettled}
# The other side may have to start a QEMU, or somebody to type a password.
ANSWERS = 60.0
ENDS = 10.0
# More than an honest other side has to say at once.
MANY = 64


@dataclass
class Frame:
    """One frame: `data` of those that carry bytes (good until the next is received), `values` of all others."""

    kind: int
    data: memoryview = field(default_factory=lambda: memoryview(b""))
    values: dict[str, Any] = field(default_factory=dict)


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
            raise CannotDo("the link is lost: its source has ended, or the way to it") from error

    def send_bytes(self, kind: int, view: memoryview) -> None:
        with self._one_at_a_time:
            write_all(self._writing, _head(kind, SUMMED if self._sums else 0, view))
            write_all(self._writing, view)

    def receive(self) -> Frame | None:
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
        return Frame(kind, payload) if kind in RAW else Frame(kind, values=_values(payload))

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
    return f"expected a 'vm-restore --commit' there, silent but for its frames; found {text!r}"


def words_of_error(error: VmstateError) -> dict[str, Any]:
    return {"status": error.status, "message": str(error), "hints": list(error.hints)}


def error_of(values: dict[str, Any]) -> VmstateError:
    """What the other side has refused, as an error of ours."""
    status, hints = values.get("status"), values.get("hints")
    family = FAMILY.get(status, CannotDo) if isinstance(status, int) else CannotDo
    words = [str(hint) for hint in hints[:MANY]] if isinstance(hints, list) else []
    return family(f"the other side: {values.get('message', 'it gave no reason')}", *words)


class Silent(CannotDo):
    """The other side has not answered in time."""


class Far:
    """The other side, as the process that carries the link to it, and what it has said so far."""

    def __init__(self, way: Way) -> None:
        self.way = way
        pipe = subprocess.PIPE
        if way.command is not None:
            words = ["bash", "-o", "pipefail", "-c", way.command]
            self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, start_new_session=True)
        else:
            self._process = _start(way.argv())
        assert self._process.stdin and self._process.stdout
        self.link = Link(self._process.stdout.fileno(), self._process.stdin.fileno(), sums=way.sums)
        self._said: queue.SimpleQueue[Frame | None | VmstateError] = queue.SimpleQueue()
        # Called with what has come, in the thread that hears it; true: that was all it is for.
        self.heard: Any = None
        self.lost = False
        self._spoke = False
        self._refusal: VmstateError | None = None
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def ask(self, purpose: str, **values: Any) -> dict[str, Any]:
        """Say hello; what the other side answers when it accepts, else its refusal as an error."""
        self.tell(HELLO, version=VERSION, purpose=purpose, **values)
        return self.expect(ACCEPT, ANSWERS).values

    def tell(self, kind: int, **values: Any) -> None:
        """CannotDo where the link is gone."""
        try:
            self.link.send(kind, **values)
        except OSError as error:
            raise self.gone() from error

    def expect(self, kind: int, seconds: float) -> Frame:
        """The next frame, which is of this kind; CannotDo where there is none, or another, in time."""
        try:
            said = self._said.get(timeout=seconds)
        except queue.Empty:
            raise Silent(f"the other side did not answer in {seconds:.0f} s") from None
        if said is None:
            raise self.gone()
        if isinstance(said, VmstateError):
            self._refusal = said
        elif said.kind == REFUSE:
            self._refusal = error_of(said.values)
        if self._refusal:
            raise self._refusal
        assert isinstance(said, Frame)
        if said.kind != kind:
            text = f"the other side said '{chr(said.kind)}' where '{chr(kind)}' was expected"
            raise Damaged(text, "is it a vm-restore --commit of the same version?")
        return said

    def gone(self) -> VmstateError:
        """Why there is no link any more: what the other side has said last, or the end of its process."""
        self._listener.join(ENDS)
        if said := self.refusal():
            return said
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1)
            if status:
                return CannotDo(f"the link is lost: its command ended with {words_of_status(status)}", *_hints(status))
        return CannotDo("the link is lost: the other side has ended, or the way to it")

    def refusal(self) -> VmstateError | None:
        """What the other side has refused by now, if it has."""
        with contextlib.suppress(queue.Empty):
            while self._refusal is None:
                said = self._said.get_nowait()
                if isinstance(said, VmstateError):
                    self._refusal = said
                elif said and said.kind == REFUSE:
                    self._refusal = error_of(said.values)
        return self._refusal

    def leave(self) -> None:
        """No more will be said from here; the other side is given time for its last words, if it ever spoke."""
        if not self._spoke:
            return self.cut()
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(ENDS)
        except subprocess.TimeoutExpired:
            self.cut()
        return None

    def cut(self) -> None:
        if self.way.command is not None:
            end_group(self._process.pid, self._process)
        else:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS)

    def _listen(self) -> None:
        try:
            while frame := self.link.receive():
                self._spoke = True
                if self._said.qsize() > MANY:
                    raise Damaged("the other side says more than was asked")
                if not (self.heard and self.heard(frame)):
                    self._said.put(frame)
        except VmstateError as error:
            self._said.put(error)
        except (OSError, ValueError):
            pass
        finally:
            self.lost = True
            if self.heard:
                self.heard(None)
            self._said.put(None)


def _hints(status: int) -> tuple[str, ...]:
    if status == 255:
        return ("255 is ssh's own: it did not reach the other host, or was not let in",)
    if status == 127:
        return ("127 is a shell's: vm-restore is not found there",)
    return ()


def _start(words: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    # In our session, so that it can ask for a password; a Ctrl-C is for us, who put the guest back.
    try:
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=_be_deaf)
    except OSError as error:
        raise CannotDo(f"cannot start {words[0]}: {error.strerror}") from error


def _be_deaf() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
