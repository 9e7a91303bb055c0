"""A .vmz made, read in both ways, and damaged in all ways, without a command."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vmstate.errors import Damaged
from vmstate.vmz import convert, file_format
from vmstate.vmz.page_index import BlockIndex
from vmstate.vmz.vmz_file import CACHE, VmzFile, vmz_file

from unit.streams import Pieces

# zstd passes by a head, whatever is in it: these bits make of a .vmz another zstd file, with the same content.  Four of
# the magic's number, and "VMZ".
HARMLESS = set(range(4)) | set(range(64, 88))


@contextmanager
def kept(data: bytes = b"") -> Iterator[int]:
    """The descriptor of a file in memory, at its beginning."""
    fd = os.memfd_create("file")
    try:
        with open(os.dup(fd), "wb") as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def written(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def pack(content: bytes, *, level: int = 1, threads: int = 2, other: bool = False, piece: int = 1 << 30) -> bytes:
    with kept() as fd:
        count = convert.compress(Pieces(content, piece), fd, level, threads, other=other)
        data = written(fd)
    assert len(data) == count
    return data


def pack_cut(content: bytes, **options: Any) -> bytes:
    """What is left in the file of a content that is no whole state."""
    with kept() as fd:
        try:
            convert.compress(Pieces(content), fd, 1, 2, **options)
        except Damaged:
            return written(fd)
    raise AssertionError("it was taken")


def unpack(data: bytes, *, other: bool = False, piece: int = 1 << 30) -> bytes:
    """By one pass, as from a pipe."""
    with kept() as fd:
        convert.decompress(Pieces(data, piece), fd, 2, other=other)
        return written(fd)


@contextmanager
def opened(data: bytes, cache: int = CACHE) -> Iterator[VmzFile]:
    with kept(data) as fd:
        yield VmzFile(fd, cache=cache)


@dataclass(frozen=True)
class Frame:
    """number: of its magic, None for data."""

    at: int
    end: int
    number: int | None


def frames(data: bytes) -> list[Frame]:
    """All frames of a whole .vmz, in their order."""
    found, sizes, at = [], [], 0
    while at < len(data):
        magic, size = struct.unpack_from("<II", data, at)
        if sizes:
            end, number = at + sizes.pop(0), None
        else:
            end, number = at + 8 + size, magic & 0xF
        if number == file_format.TABLE:
            sizes = [
                size
                for size, _ in file_format.TABLE_ENTRY.iter_unpack(data[at + 8 + file_format.TABLE_HEAD.size : end])
            ]
        found.append(Frame(at, end, number))
        at = end
    assert (at, found[0].number, found[-2].number, found[-1].number) == (
        len(data),
        file_format.HEAD,
        file_format.END,
        file_format.SEEK,
    )
    return found


def groups(data: bytes) -> list[bytes]:
    """The groups, each with its table."""
    found = frames(data)
    starts = [frame.at for frame in found if frame.number == file_format.TABLE] + [found[-2].at]
    return [data[at:end] for at, end in zip(starts, starts[1:], strict=False)]


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@dataclass(frozen=True)
class Change:
    what: str
    data: bytes


class Damage:
    """A whole .vmz of a state, and what comes of its changed copies.

    mark: where in the content the device sections begin, without which nothing runs.
    """

    def __init__(self, data: bytes, seed: int = 20261126) -> None:
        self.data = data
        self.chance = random.Random(seed)
        self.content = unpack(data)
        with opened(data) as file:
            assert file.facts is not None
            self.facts, self.blocks = file.facts, file.blocks
        self.mark = self.facts["devices"][0]

    @cached_property
    def frames(self) -> list[Frame]:
        return frames(self.data)

    def flips(self, count: int) -> Iterator[Change]:
        for bit in (self.chance.randrange(8 * len(self.data)) for _ in range(count)):
            yield Change(f"bit {bit}", flipped(self.data, bit))

    def flips_between(self, count: int) -> Iterator[Change]:
        """Not in the frames of the content, which are nearly all of a file."""
        ours = [frame for frame in self.frames if frame.number is not None]
        for frame in (self.chance.choice(ours) for _ in range(count)):
            bit = self.chance.randrange(8 * frame.at, 8 * frame.end)
            yield Change(f"bit {bit}, in a frame {frame.number}", flipped(self.data, bit))

    def cuts(self, count: int) -> Iterator[Change]:
        edges = {frame.at for frame in self.frames}
        for at in sorted(edges) + [self.chance.randrange(len(self.data)) for _ in range(count)]:
            yield Change(f"cut at {at}", self.data[:at])

    def harmless(self, change: Change) -> bool:
        """Whether it made no difference; else it is refused.  AssertionError where it is neither."""
        by_pipe = self._in_one_pass(change)
        assert self._at_random(change) in (None, by_pipe, True), change.what
        return by_pipe

    def _in_one_pass(self, change: Change) -> bool:
        with kept() as fd:
            try:
                convert.decompress(Pieces(change.data), fd, 2)
            except Damaged:
                left = written(fd)
                assert len(left) <= self.mark, change.what
                assert self.content.startswith(left), change.what
                return False
            assert written(fd) == self.content, change.what
        return True

    def _at_random(self, change: Change) -> bool | None:
        """None where it looks like no .vmz, so that it is read in one pass."""
        with kept(change.data) as fd:
            try:
                file = vmz_file(fd)
                if file is None:
                    return None
                content = everything(file)
            except Damaged:
                return False
            assert content == self.content, change.what
            assert file.facts == self.facts, change.what
            assert same(file.blocks, self.blocks), change.what
        return True


def everything(file: VmzFile) -> bytes:
    """The content of a file, by its frames."""
    found = bytearray()
    for at, end in zip(file.pieces, [*file.pieces[1:], file.content], strict=True):
        found += file.read(at, end - at)
    return bytes(found)


def same(one: dict[bytes, BlockIndex], other: dict[bytes, BlockIndex]) -> bool:
    return list(one) == list(other) and one == other
