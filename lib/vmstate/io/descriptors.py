"""Descriptors: what kind they are, how large their buffers, and writing to them without loss.

Bulk bytes pass in blocks of up to 1 MiB (`BLOCK`) and are never joined or copied on their way. All offsets count bytes
from the start of the input.
"""

import contextlib
import fcntl
import mmap
import os
import select
import stat
import struct
import termios
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

BLOCK = 1 << 20
# What is held back until an input has proven its end: QEMU starts a guest once it has the end mark, and the description
# behind that mark alone has 1.6 MB for a guest with 200 vCPUs.
HOLD = 16 << 20
# The kernel copies into memory at other places than multiples of this at a quarter of the speed (measured on an AMD
# EPYC); a large bytearray lies at such a place.
EVEN = 32
# A huge page of most machines
HUGE = 2 << 20
SIOCOUTQ = termios.TIOCOUTQ
F_SETPIPE_SZ = 1031
# os has it from Python 3.12 on.
SPLICE_F_NONBLOCK = 2


def kind(fd: int) -> str:
    """'terminal', 'pipe', 'file', 'socket' or 'other' (/dev/null and the like)."""
    mode = os.fstat(fd).st_mode
    if os.isatty(fd):
        return "terminal"
    for name, test in (("pipe", stat.S_ISFIFO), ("file", stat.S_ISREG), ("socket", stat.S_ISSOCK)):
        if test(mode):
            return name
    return "other"


def memory(size: int) -> memoryview:
    """Memory to read into, at the start of a page (see `EVEN`); of this process alone."""
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE:
        # One fault in place of 512; a kernel may have none of these.
        with contextlib.suppress(OSError):
            made.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(made)


def enlarge(fd: int, size: int = BLOCK) -> None:
    """Give a pipe or a socket room for `size` bytes, a whole block unless told, as far as the system lets us.

    Measured: with four blocks a socket is an eighth slower, since what was written has left the core's cache.
    """
    with contextlib.suppress(OSError):
        if kind(fd) == "pipe":
            fcntl.fcntl(fd, F_SETPIPE_SZ, size)
        elif kind(fd) == "socket":
            import socket

            with socket.socket(fileno=os.dup(fd)) as twin:
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    twin.setsockopt(socket.SOL_SOCKET, option, size)


def channel(size: int = BLOCK) -> "tuple[socket.socket, socket.socket]":
    """Two ends of a stream socket with room for `size` bytes: one for QEMU, one for us."""
    import socket

    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        enlarge(end.fileno(), size)
    return ends


def unread(fd: int) -> int:
    """Bytes that the reader of this pipe, or the far end of this socket, has not taken yet."""
    request = SIOCOUTQ if kind(fd) == "socket" else termios.FIONREAD
    answer = fcntl.ioctl(fd, request, b"\0" * 4)
    return int(struct.unpack("i", answer)[0])


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`.

    Raises BrokenPipeError or ConnectionError when the reader has gone, OSError when the place is full.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # A descriptor shared with a shell or ssh may have been made non-blocking by the other side.
            wait(fd, select.POLLOUT)


def write_pieces(fd: int, pieces: Sequence[bytes | memoryview]) -> None:
    """All of some pieces, of which there are less than 1024, one behind the other, without joining them.

    Raises what `write_all` raises.
    """
    try:
        done = os.writev(fd, pieces)
    except BlockingIOError:
        done = 0
    for piece in pieces:
        if done < len(piece):
            write_all(fd, memoryview(piece)[done:])
        done = max(0, done - len(piece))


def splice(source: int, sink: int, count: int) -> int:
    """Move up to `count` bytes that are there, of which one end is a pipe, past our memory; how many went.

    Raises what `write_all` raises.
    """
    while True:
        try:
            return os.splice(source, sink, count)
        except BlockingIOError:
            wait(sink, select.POLLOUT)


def wait(fd: int, event: int) -> None:
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()


def file_of(fd: int) -> str | None:
    """The path of the regular file behind a descriptor; None where it is none."""
    return os.readlink(f"/proc/self/fd/{fd}") if kind(fd) == "file" else None
