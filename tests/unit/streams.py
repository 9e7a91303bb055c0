"""The small real states of tests/streams, unpacked."""

import functools
from pathlib import Path

import zstandard

FOLDER = Path(__file__).resolve().parent.parent / "streams"
NAMES = ("q35-7.2", "q35-10.0")
# Those that are no whole state: what is said of them, and the hint.
REFUSED = {
    "mapped-ram": ("pages at fixed places", "without the capability mapped-ram"),
    "multifd": ("pages of this state are not in this stream|48 of 512 pages are not in the state", "vm-dump"),
    "postcopied": ("the channel of a postcopy move", "save the guest with vm-dump"),
    "nodescription": ("expected a description", "-machine suppress-vmdesc=on"),
}


def names() -> list[str]:
    """Of all of them."""
    return sorted(path.stem for path in FOLDER.glob("*.zst"))


def refused(name: str) -> tuple[str, str] | None:
    """What is said of a state that is meant to be refused, and the hint; None for a good one."""
    return REFUSED.get(name.rpartition("-")[0])


GOOD = [name for name in names() if not refused(name)]
BAD = [name for name in names() if refused(name)]


@functools.cache
def state(name: str) -> bytes:
    packed = (FOLDER / f"{name}.zst").read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)


class Pieces:
    """A `Reader` of `data` that gives at most `size` bytes at a time."""

    def __init__(self, data: bytes, size: int = 1 << 30) -> None:
        self.data = memoryview(data)
        self.size = size

    def readinto(self, view: memoryview, /) -> int:
        count = min(len(view), self.size, len(self.data))
        view[:count] = self.data[:count]
        self.data = self.data[count:]
        return count
