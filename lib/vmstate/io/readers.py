"""Inputs as readers: descriptors, what was read ahead of them, and all of their bytes in blocks."""

import os
import select
from collections.abc import Iterator
from typing import Protocol

from .. import stdio
from ..errors import CannotDo, Damaged, WrongUsage
from .descriptors import BLOCK, enlarge, kind, memory, wait


class Reader(Protocol):
    """Where bytes come from: `readinto` fills at least one byte, or gives 0 at the end."""

    def readinto(self, view: memoryview, /) -> int: ...


class FdReader:
    """A descriptor as a `Reader`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def readinto(self, view: memoryview, /) -> int:
        while True:
            try:
                return os.readv(self.fd, [view])
            except BlockingIOError:
                wait(self.fd, select.POLLIN)


class Counted(FdReader):
    """One that counts the bytes it has given."""

    count = 0

    def readinto(self, view: memoryview, /) -> int:
        count = super().readinto(view)
        self.count += count
        return count


class Pushback:
    """A `Reader` that first gives what had been read ahead."""

    def __init__(self, ahead: bytes, behind: Reader) -> None:
        self._ahead = memoryview(ahead)
        self._behind = behind

    def readinto(self, view: memoryview, /) -> int:
        if not self._ahead:
            return self._behind.readinto(view)
        count = min(len(view), len(self._ahead))
        view[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count


def read_up_to(source: Reader, count: int) -> bytes:
    """`count` bytes, fewer only where the input ends."""
    data = bytearray(count)
    with memoryview(data) as view:
        have = fill(source, view)
    return bytes(data[:have])


def fill(source: Reader, view: memoryview) -> int:
    """Bytes of `source` in `view`; fewer than it has room for only where the input ends."""
    have = 0
    while have < len(view) and (count := source.readinto(view[have:])):
        have += count
    return have


def open_input(path: str | None) -> int:
    """The descriptor of FILE, or of standard input (None or '-'); a terminal is refused."""
    if path in (None, "-"):
        stdio.require(0)
        if kind(0) == "terminal":
            raise WrongUsage("standard input is a terminal, and a state is binary", "redirect it: < FILE, or COMMAND |")
        fd = 0
    else:
        assert path is not None
        stdio.require_path(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CannotDo(f"cannot open {path}: {error.strerror}") from error
    enlarge(fd)
    return fd


def blocks(source: Reader) -> Iterator[memoryview]:
    """All of an input, block by block; each view is good until the next one is asked for."""
    buffer = memory(BLOCK)
    while count := source.readinto(buffer):
        yield buffer[:count]


def exactly(source: Reader, count: int, offset: int, what: str) -> bytes:
    """`count` bytes at `offset` of the input; Damaged where it ends before."""
    data = read_up_to(source, count)
    if len(data) < count:
        raise Damaged(f"truncated at offset {offset + len(data)}, in {what}: expected {count} bytes, found {len(data)}")
    return data
