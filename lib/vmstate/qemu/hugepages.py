"""The huge pages of another process, and split ones made whole again (ioctl_pagemap_scan(2), process_madvise(2)).

A snapshot splits the huge pages of its guest, since QEMU lets go of each small page by itself.  Left so the guest is
slower than it was, and its next snapshot has it stand still until every small page is protected (measured: 30 to 50 ns
for each).  The kernel's own khugepaged makes whole some 16 MiB in 10 s.

It takes root's rights (CAP_SYS_NICE, and to trace the process), and Linux 6.7.  Nothing here raises for want of them.
"""

import contextlib
import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator

from ..deadline import Deadline

# linux/fs.h: the number, struct pm_scan_arg, struct page_region, and three of its categories
PAGEMAP_SCAN = 0xC0606610
ARGUMENT, REGION = struct.Struct("=12Q"), struct.Struct("=3Q")
PRESENT, PFNZERO, HUGE = 1 << 3, 1 << 5, 1 << 6
MOST = 4096
# On every architecture but alpha
SYS_PROCESS_MADVISE = 440
MADV_COLLAPSE = 25
SIZE = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
# Some 5 GiB were made whole in a second; what is left then is for khugepaged.
LONG = 5.0

Range = tuple[int, int]


def find(pid: int) -> list[Range]:
    """Where the process has huge pages, as addresses from and to."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/pagemap", "rb") as file:
        # That of zeros is one of them in some kernels.
        return [found for area in _areas(pid) for found in _scan(file.fileno(), area, HUGE)]
    return []


def make_whole(pid: int, ranges: list[Range]) -> None:
    """Have the kernel make huge again what was, where it can; the process goes on meanwhile.

    Only where each small page is there: no memory is taken for zeros, or for what was given back.
    """
    libc, deadline = ctypes.CDLL(None), Deadline(LONG)
    with (
        contextlib.suppress(OSError, ValueError),
        open(SIZE) as words,
        open(f"/proc/{pid}/pagemap", "rb") as pagemap,
        open(os.pidfd_open(pid)) as process,
    ):
        size = int(words.read())
        for area in ranges:
            for begin, end in _scan(pagemap.fileno(), area, PRESENT):
                for at in range(begin + -begin % size, end - size + 1, size):
                    # One that fails, for want of memory or since it is gone, is left as it is.
                    part = struct.pack("@PN", at, size)
                    libc.syscall(SYS_PROCESS_MADVISE, process.fileno(), part, 1, MADV_COLLAPSE, 0)
                    if deadline.over:
                        return


def _areas(pid: int) -> Iterator[Range]:
    """The mappings of a process, but for what the kernel has put there itself."""
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            begin, end = (int(word, 16) for word in line.split(maxsplit=1)[0].split("-"))
            if end < 1 << 63:
                yield begin, end


def _scan(fd: int, area: Range, kind: int) -> Iterator[Range]:
    """Where an area has pages of this kind that are not the one of zeros."""
    room = ctypes.create_string_buffer(MOST * REGION.size)
    begin, end = area
    while begin < end:
        asked = (ARGUMENT.size, 0, begin, end, 0, ctypes.addressof(room), MOST, 0, PFNZERO, kind | PFNZERO, 0, kind)
        argument = bytearray(ARGUMENT.pack(*asked))
        count = fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
        yield from ((at, to) for at, to, _ in REGION.iter_unpack(room.raw[: count * REGION.size]))
        # How far it has come.
        begin = ARGUMENT.unpack(argument)[4]
