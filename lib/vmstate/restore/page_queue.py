"""Pages of a state on their way to a QEMU: as records that it takes, each page once, and when they left."""

import os
import time
from array import array
from collections import deque
from typing import Any

from ..errors import Damaged
from ..stream import constants
from ..stream.page_map import NORMAL
from ..vmz.state_file import StateFile
from .page_order import Place
from .postcopy import PAGE, STRIDE, Opening

# Pieces that one call to the kernel takes
VECTORS = 64


class ServedPages:
    """asked: pages that QEMU asked for; order: these, as they were asked for.  when: seconds from the server's start to
    a request; waited: from there to its page's last byte.  sent: pages in all.  bytes: that left."""

    def __init__(self) -> None:
        self.asked = self.sent = self.bytes = 0
        self.waited, self.when = array("d"), array("d")
        self.order: list[Place] = []
        self.begun = time.monotonic()

    def values(self) -> dict[str, Any]:
        """For `--json`; asked_at: when each hundredth of the requests came, in seconds."""
        waited = sorted(self.waited)
        share = {"median": 0.5, "p99": 0.99}
        times = {f"wait_{name}": waited[int(len(waited) * part)] if waited else None for name, part in share.items()}
        asked_at = [round(self.when[len(self.when) * part // 100], 4) for part in range(100)] if self.when else []
        numbers = {"asked": self.asked, "sent": self.sent, "bytes": self.bytes}
        return {**numbers, **times, "seconds": round(time.monotonic() - self.begun, 4), "asked_at": asked_at}


class PageQueue:
    """`put` pages, `send` what fits.  have: a byte for each page of each block, 1 where it is in QEMU or on its way.

    queued: bytes that were put, in all.  Damaged where a page cannot be read.
    """

    def __init__(self, file: StateFile, opening: Opening) -> None:
        self.have = {name: bytearray(-(-size // PAGE)) for name, size in opening.blocks.items()}
        self.queued = 0
        self.tally = ServedPages()
        self._file = file
        self._out: deque[memoryview] = deque()
        # That of the last record; no block has an empty name.
        self._block = b""
        # What was asked for and is on its way: where its last byte stands, and since when it is waited for
        self._awaited: deque[tuple[int, float]] = deque()

    @property
    def empty(self) -> bool:
        """Whether all that was put has left."""
        return not self._out

    def put(self, *views: bytes | memoryview) -> None:
        """Bytes as they are."""
        for view in views:
            if view:
                self._out.append(memoryview(view))
                self.queued += len(view)

    def put_page(self, name: bytes, number: int) -> int:
        """One page; the place of its content, 0 where it has none."""
        kind, place = self._file.blocks[name].find(number)
        if kind & NORMAL:
            self.put_run(name, number, 1, place)
            return place
        self.put(self._word(name, number, constants.RAM_SAVE_FLAG_ZERO), b"\0")
        self._mark(name, number, 1)
        return 0

    def put_run(self, name: bytes, number: int, count: int, place: int) -> None:
        """`count` neighbours, the content of the first at `place` of the stream: from there on they are records that
        QEMU can be given as they are."""
        try:
            data = self._file.read(place, (count - 1) * STRIDE + PAGE)
        except (Damaged, OSError, IndexError) as error:
            begin, end = number * PAGE, (number + count) * PAGE
            text = f"{begin:#x} to {end:#x} of RAM block {name.decode(errors='replace')!r} cannot be read: {error}"
            raise Damaged(text) from error
        self.put(self._word(name, number, constants.RAM_SAVE_FLAG_PAGE), data)
        self._mark(name, number, count)

    def asked(self, name: bytes, number: int, when: float) -> None:
        """The page that comes next is one that QEMU asked for."""
        self.tally.asked += 1
        self.tally.when.append(when - self.tally.begun)
        self.tally.order.append((name, number))

    def awaited(self, since: float) -> None:
        """What was put last is waited for."""
        self._awaited.append((self.queued, since))

    def send(self, fd: int) -> None:
        """What the other end takes now."""
        try:
            views = [view for view, _ in zip(self._out, range(VECTORS), strict=False)]
            count = os.writev(fd, views)
        except BlockingIOError:
            return
        self.tally.bytes += count
        while count:
            if count < len(self._out[0]):
                self._out[0] = self._out[0][count:]
                break
            count -= len(self._out.popleft())
        now = time.monotonic()
        while self._awaited and self._awaited[0][0] <= self.tally.bytes:
            self.tally.waited.append(now - self._awaited.popleft()[1])

    def _word(self, name: bytes, number: int, flag: int) -> bytes:
        if name == self._block:
            return constants.U64.pack(number * PAGE | flag | constants.RAM_SAVE_FLAG_CONTINUE)
        self._block = name
        return constants.U64.pack(number * PAGE | flag) + bytes((len(name),)) + name

    def _mark(self, name: bytes, number: int, count: int) -> None:
        self.have[name][number : number + count] = b"\1" * count
        self.tally.sent += count
