"""The device sections of a stream: where they end, which they do not say (migration/savevm.c, vmstate.c).

They have no lengths.  Those in front of RAM end where a section with rounds begins, all others where an end mark with a
description stands that can be read.
"""

import json
import re
from collections.abc import Iterable, Iterator

from ..errors import Damaged
from ..io.window import Window
from . import constants
from .description import UNREADABLE
from .records import Description, Devices, EndMark, Record

# A state of 200 vCPUs has some 3 MB of devices, a virtio-gpu may have tens.
DEVICES_LIMIT = 64 << 20
DESCRIPTION_LIMIT = 16 << 20
EARLY_LIMIT = 8 << 20
# Behind the footer of the last device; the description is JSON, an object.
MARK = re.compile(rb"\x7e....\x00\x06(....)\{", re.DOTALL)
MARK_SIZE = 12
NUL = re.compile(rb"\x00")
# A section that has rounds, behind the footer of device sections that came before it: its START, or the first round
ROUNDS = rb"\x7e....(\x01....(?:\x03ram|\x0cdirty-bitmap|\x05block)%b)"
ROUNDS_SIZE = 23


class DevicePart:
    """What in `window` begins with the header of a device section, or is the end mark."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def early(self, begun: Iterable[int]) -> Devices:
        """Those before the first round of RAM: up to a section that has rounds, its START or its first.

        begun: the numbers of sections of which the START was read.
        """
        offset = self._window.offset
        parts = b"".join(b"|[\x02\x03]" + re.escape(constants.U32.pack(number)) for number in begun)
        rounds = re.compile(ROUNDS % parts, re.DOTALL)
        searched = 0
        while len(view := self._window.have()) <= EARLY_LIMIT:
            if place := rounds.search(view, searched):
                data = bytes(view[: place.start(1)])
                self._window.take(len(data))
                return Devices(data, True, offset=offset)
            searched = max(0, len(view) - ROUNDS_SIZE)
            if not self._window.more():
                raise Damaged(f"truncated at offset {self._window.came}, in the device sections before RAM")
        raise Damaged(f"no section of RAM within {EARLY_LIMIT} bytes from offset {offset}")

    def to_end(self) -> Iterator[Record]:
        """All of them, and what ends them."""
        offset = self._window.offset
        mark, end = self._find_end()
        view = self._window.have()[:end]
        yield Devices(bytes(view[:mark]), False, offset=offset)
        yield EndMark(offset=offset + mark)
        yield Description(bytes(view[mark + constants.END.size :]), offset=offset + mark + 1)
        self._window.take(end)

    def _find_end(self) -> tuple[int, int]:
        """Where in the bytes ahead the end mark stands, and where the description behind it ends.

        QEMU falls silent behind the end, and a guest can have put what looks like a mark into a device: so no mark is
        waited for alone.
        """
        searched = 0
        waiting: list[tuple[int, int, int]] = []
        while (size := len(self._window.have())) <= DEVICES_LIMIT:
            view = self._window.have()
            for place in MARK.finditer(view, searched):
                begin = place.end() - 1
                length = int.from_bytes(place[1], "big")
                if length <= DESCRIPTION_LIMIT and _may_be_text(view, begin, begin + length):
                    waiting.append((place.start() + 5, begin, begin + length))
            for mark, begin, end in waiting:
                if end <= size and _readable(view[begin:end]):
                    return mark, end
            waiting = [
                (mark, begin, end)
                for mark, begin, end in waiting
                if end > size and _may_be_text(view, max(begin, searched), end)
            ]
            searched = max(searched, size - MARK_SIZE + 1)
            if not self._window.more():
                raise self._no_end(bytes(view[-6:]))
        raise Damaged(f"no end of the device sections within {DEVICES_LIMIT} bytes from offset {self._window.offset}")

    def _no_end(self, last: bytes) -> Damaged:
        if last[:1] == b"\x7e" and last[5:] == b"\0":
            text = f"the state ends with its end mark at offset {self._window.came - 1}"
            return Damaged(
                f"{text}: expected a description behind it",
                "it was cut there, or its guest has -machine suppress-vmdesc=on",
            )
        where = f"in the device sections that begin at offset {self._window.offset}"
        return Damaged(f"truncated at offset {self._window.came}, {where}: no end mark with a whole description there")

    def without_devices(self) -> Iterator[Record]:
        """An end mark that stands where a section could begin."""
        offset = self._window.offset
        self._window.take(1)
        yield EndMark(offset=offset)
        if self._window.need(5) is None:
            return
        size = int.from_bytes(self._window.have()[1:5], "big")
        if self._window.have()[0] == constants.QEMU_VM_VMDESCRIPTION and size <= DESCRIPTION_LIMIT:
            if (view := self._window.need(5 + size)) is None:
                raise Damaged(f"truncated at offset {self._window.came}, in the description")
            data = bytes(view[5:])
            self._window.take(5 + size)
            yield Description(data, offset=offset + 1)


def _may_be_text(view: memoryview, begin: int, end: int) -> bool:
    """Whether what is there of it has no NUL: so a million of marks cost little."""
    return not NUL.search(view, begin, min(end, len(view)))


def _readable(text: memoryview) -> bool:
    try:
        return bool(json.loads(bytes(text))["devices"])
    except UNREADABLE:
        return False
