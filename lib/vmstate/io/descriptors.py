"""The place that reads and writes descriptors (with `holdback`): inputs, outputs, and windows on them.

Bulk bytes pass in blocks of up to 1 MiB (`BLOCK`) and are never joined or copied on their way. All offsets count bytes
from the start of the input.
"""

import contextlib
import fcntl
import mmap
import os
import select
import socket
import stat
import struct
import tempfile
import termios
from collections.abc import Callable, Iterator
from typing import Protocol

from ..errors import CannotDo, Damaged, WrongUsage

BLOCK = 1 << 20
# What is held back until an input has proven its end: QEMU starts a guest once it has the end mark, and the description
# behind that mark alone has 1.6 MB for a guest with 200 vCPUs.
HOLD = 16 << 20
# Small enough to stay in a core's cache between being written and read.
WINDOW = 1 << 20
# The kernel copies into memory at other places than multiples of this at a quarter of the speed (measured on an AMD
# EPYC); a large bytearray lies at such a place.
EVEN = 32
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
    """Memory to read into, at the start of a page (see `EVEN`)."""
    return memoryview(mmap.mmap(-1, size))


def enlarge(fd: int, size: int = BLOCK) -> None:
    """Give a pipe or a socket room for `size` bytes, a whole block unless told, as far as the system lets us.

    Measured: with four blocks a socket is an eighth slower, since what was written has left the core's cache.
    """
    with contextlib.suppress(OSError):
        if kind(fd) == "pipe":
            fcntl.fcntl(fd, F_SETPIPE_SZ, size)
        elif kind(fd) == "socket":
            with socket.socket(fileno=os.dup(fd)) as twin:
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    twin.setsockopt(socket.SOL_SOCKET, option, size)


def channel(size: int = BLOCK) -> tuple[socket.socket, socket.socket]:
    """Two ends of a stream socket with room for `size` bytes: one for QEMU, one for us."""
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


def file_of(fd: int) -> str | None:
    """The path of the regular file behind a descriptor; None where it is none."""
    return os.readlink(f"/proc/self/fd/{fd}") if kind(fd) == "file" else None


class Output:
    """Where a command writes: standard output, or a named file that appears whole or not at all.

    `settle()` proves the bytes: a file is fsynced (a named one then renamed into place), a pipe or socket has been
    emptied by its reader.  `abandon()` takes a named file away.  text: it may be a terminal, and is no secret.
    """

    def __init__(self, path: str | None, default_fd: int = 1, *, text: bool = False) -> None:
        self._path = None if path in (None, "-") else path
        self._temporary: str | None = None
        self._text = text
        self.fd = default_fd
        if self._path is not None:
            self._create(self._path)
        self.kind = kind(self.fd)
        if self.kind == "terminal" and not text:
            hint = "redirect it: > FILE, or | COMMAND"
            raise WrongUsage("standard output is a terminal, and a state is binary", hint)
        enlarge(self.fd)

    def _create(self, path: str) -> None:
        if os.path.exists(path) and not os.path.isfile(path):
            self.fd = os.open(path, os.O_WRONLY)
            return
        self._path = os.path.realpath(path)
        folder, name = os.path.split(self._path)
        try:
            self.fd, self._temporary = tempfile.mkstemp(prefix=f"{name}.", suffix=".part", dir=folder)
        except OSError as error:
            raise CannotDo(f"cannot create {path}: {error.strerror}") from error

    def refuse_as_input(self, fd: int) -> None:
        """The same file as input and output would destroy it: WrongUsage."""
        name = self._path if self._temporary else None
        ours = os.stat(name) if name and os.path.exists(name) else os.fstat(self.fd)
        theirs = os.fstat(fd)
        if stat.S_ISREG(theirs.st_mode) and os.path.samestat(ours, theirs):
            self.abandon()
            raise WrongUsage("input and output are the same file")

    def settle(self) -> None:
        if self.kind == "file":
            os.fsync(self.fd)
        elif self.kind in ("pipe", "socket"):
            wait_until_read(self.fd)
        if self._temporary and self._path:
            # A new file is for its owner alone, since a state holds every secret of the guest; an old one keeps its
            # mode.
            if os.path.exists(self._path):
                os.fchmod(self.fd, os.stat(self._path).st_mode & 0o777)
            elif self._text:
                os.umask(mask := os.umask(0o077))
                os.fchmod(self.fd, 0o666 & ~mask)
            os.rename(self._temporary, self._path)
            self._temporary = None
            _fsync_folder(self._path)

    def abandon(self) -> None:
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None


def _fsync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def wait_until_read(fd: int) -> None:
    """Return once the reader of a pipe or socket has taken every byte; BrokenPipeError if it goes away first."""
    poll = select.poll()
    poll.register(fd, 0)
    pause = 1
    while unread(fd):
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(pause)):
            raise BrokenPipeError("the reader went away before it had read everything")
        pause = min(20, pause * 2)
    # What the far end of a socket has thrown away counts as read; the error tells the two apart.
    if kind(fd) == "socket" and any(event & select.POLLERR for _, event in poll.poll(0)):
        raise BrokenPipeError("the far end went away before it had read everything")


def open_input(path: str | None) -> int:
    """The descriptor of FILE, or of standard input (None or '-'); a terminal is refused."""
    if path in (None, "-"):
        if kind(0) == "terminal":
            raise WrongUsage("standard input is a terminal, and a state is binary", "redirect it: < FILE, or COMMAND |")
        fd = 0
    else:
        assert path is not None
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


class Window:
    """An input seen through one buffer: the bytes from `offset` on that are at hand, in one piece.

    `have()` are those bytes, `need(n)` reads until there are n, `take(n)` leaves n behind.  What is left behind goes to
    `sink` in large pieces, once more room is needed or `flush()` asks for it: never before it has been looked at.
    """

    def __init__(self, source: Reader, sink: Callable[[memoryview], object] | None = None, size: int = WINDOW) -> None:
        self._source = source
        self.sink = sink
        self._buffer = memory(size)
        self._left, self._at, self._end = 0, 0, 0
        self._before = 0

    @property
    def offset(self) -> int:
        """Of the next byte, in the input."""
        return self._before + self._at

    @property
    def came(self) -> int:
        """Bytes that have been read."""
        return self._before + self._end

    def have(self) -> memoryview:
        return self._buffer[self._at : self._end]

    def more(self) -> bool:
        """Read some more; False at the end of the input."""
        if self._end == len(self._buffer):
            self._make_room()
        odd = -self._end % EVEN
        count = self._source.readinto(self._buffer[self._end : self._end + (odd or len(self._buffer))])
        self._end += count
        return bool(count)

    def need(self, count: int) -> memoryview | None:
        """The next `count` bytes, still ahead; None where the input ends before."""
        while self._end - self._at < count:
            if not self.more():
                return None
        return self._buffer[self._at : self._at + count]

    def take(self, count: int) -> None:
        self._at += count

    def flush(self) -> None:
        if self.sink and self._at > self._left:
            self.sink(self._buffer[self._left : self._at])
        self._left = self._at

    def _make_room(self) -> None:
        self.flush()
        ahead = self._end - self._at
        target = self._buffer
        if ahead + EVEN > len(target) // 2:
            target = memory(2 * (ahead + EVEN))
        # What is read next comes to an even place.
        start = -ahead % EVEN
        # The two may overlap; views are moved as memmove does.
        target[start : start + ahead] = self._buffer[self._at : self._end]
        self._buffer = target
        self._before += self._at - start
        self._left, self._at, self._end = start, start, start + ahead


def exactly(source: Reader, count: int, offset: int, what: str) -> bytes:
    """`count` bytes at `offset` of the input; Damaged where it ends before."""
    data = read_up_to(source, count)
    if len(data) < count:
        raise Damaged(f"truncated at offset {offset + len(data)}, in {what}: expected {count} bytes, found {len(data)}")
    return data
