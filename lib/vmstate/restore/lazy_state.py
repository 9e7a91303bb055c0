"""A state of which any page can be read, and what comes before its pages: what a lazy restore takes."""

import os
from functools import cached_property

import xxhash

from ..errors import Damaged
from ..stream.validate import State
from ..vmz import decompress
from ..vmz.state_file import RawFile, StateFile, state_of
from ..vmz.vmz_file import vmz_file
from .postcopy import NoIndex, Opening, opening_of


class LazyState:
    """The file with the pages, what QEMU is told before them, and what is known of the state."""

    def __init__(self, file: StateFile, opening: Opening, state: State) -> None:
        self.file, self.opening, self.state = file, opening, state

    @cached_property
    def identity(self) -> str:
        """Tells one state from another, however they are packed: the devices hold the moment."""
        opening = self.opening
        return str(xxhash.xxh3_128_hexdigest(opening.head + opening.start + opening.devices))


def lazy_state(fd: int) -> LazyState:
    """Of the file that `fd` stands at the beginning of.

    NoIndex where it cannot be read at random, NotLazy where postcopy cannot take it, Damaged where it is none.
    """
    file = _open(fd)
    opening = opening_of(file)
    return LazyState(file, opening, state_of(file))


def _open(fd: int) -> StateFile:
    try:
        at = os.lseek(fd, 0, os.SEEK_CUR)
        first = os.pread(fd, decompress.FIRST, at)
    except OSError as error:
        hint = "keep the state in a file: vm-restore --lazy GUEST < STATE.vmz"
        raise NoIndex("a lazy restore reads its state here and there, and this input cannot seek", hint) from error
    kind = decompress.recognise(first)
    if file := vmz_file(fd):
        return file
    if kind == "state":
        return RawFile(fd)
    if not first:
        raise Damaged("the input is empty")
    if kind in ("zstd", "gzip", "bzip2", "xz", "libvirt"):
        hint = "give it one: vm-compress -d FILE | vm-compress > STATE.vmz" if kind == "zstd" else "pack it as a .vmz"
        raise NoIndex(f"{decompress.words_for(first)} has no index of its pages", hint)
    raise Damaged(f"no state of a guest: found {decompress.words_for(first)} at offset 0", *decompress.hints_for(first))
