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
import time
from collections.abc import Iterator

# linux/fs.h: the number, struct pm_scan_arg, struct page_region, and two of its categories
PAGEMAP_SCAN = 0xC0606610
ARGUMENT, REGION = struct.Struct("=12Q"), struct.Struct("=3Q")
PFNZERO, HUGE = 1 << 5, 1 << 6
MOST = 4096
# Of a process on every architecture; whole pages of 64 KiB.
END = 0x7FFFFFFF0000
SYS_PROCESS_MADVISE = 440
MADV_COLLAPSE = 25
SIZE = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
# Some 5 GiB were made whole in a second; what is left then is for khugepaged.
LONG = 5.0

Range = tuple[int, int]


def find(pid: int) -> list[Range]:
    """Where the process has huge pages, but for that of zeros, as addresses from and to."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/pagemap", "rb") as file:
        return list(_scan(file.fileno()))
    return []


def make_whole(pid: int, ranges: list[Range]) -> None:
    """Have the kernel make huge again what was, where it can; the process goes on meanwhile."""
    libc, give_up = ctypes.CDLL(None), time.monotonic() + LONG
    with contextlib.suppress(OSError, ValueError), open(SIZE) as file, open(os.pidfd_open(pid)) as process:
        size = int(file.read())
        for at in (at for begin, end in ranges for at in range(begin, end, size)):
            # One that fails, for want of memory or since it is gone, is left as it is.
            libc.syscall(SYS_PROCESS_MADVISE, process.fileno(), struct.pack("@PN", at, size), 1, MADV_COLLAPSE, 0)
            if time.monotonic() > give_up:
                return


def _scan(fd: int) -> Iterator[Range]:
    room = ctypes.create_string_buffer(MOST * REGION.size)
    begin = 0
    while begin < END:
        asked = (ARGUMENT.size, 0, begin, END, 0, ctypes.addressof(room), MOST, 0, PFNZERO, HUGE | PFNZERO, 0, HUGE)
        argument = bytearray(ARGUMENT.pack(*asked))
        count = fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
        yield from ((at, to) for at, to, _ in REGION.iter_unpack(room.raw[: count * REGION.size]))
        # How far it has come.
        begin = ARGUMENT.unpack(argument)[4]
