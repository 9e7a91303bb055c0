"""Where a command writes: a file that appears whole or not at all, a pipe that has been read to its end."""

import contextlib
import mmap
import os
import select
import stat

from .. import stdio
from ..errors import CannotDo, WrongUsage
from .descriptors import enlarge, kind, unread


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
        else:
            stdio.require(self.fd)
        self.kind = kind(self.fd)
        if self.kind == "terminal" and not text:
            hint = "redirect it: > FILE, or | COMMAND"
            raise WrongUsage("standard output is a terminal, and a state is binary", hint)
        enlarge(self.fd)

    def _create(self, path: str) -> None:
        if os.path.exists(path) and not os.path.isfile(path):
            stdio.require_path(path)
            self.fd = os.open(path, os.O_WRONLY)
            return
        self._path = os.path.realpath(path)
        folder, name = os.path.split(self._path)
        temporary = os.path.join(folder, f"{name}.{os.urandom(6).hex()}.part")
        try:
            self.fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._temporary = temporary
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


class WriteBack:
    """Has the disk begin with what was written to a file at `fd`, so that the fsync at the end finds little left to do.

    Of anything else than a file it does nothing.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd if kind(fd) == "file" else None
        self._begun = 0 if self._fd is None else os.lseek(fd, 0, os.SEEK_CUR)

    def begin(self) -> None:
        """With all whole pages that were written since the last time; does not wait."""
        if self._fd is None:
            return
        # One that is written on would be written twice.
        end = os.lseek(self._fd, 0, os.SEEK_CUR) & -mmap.PAGESIZE
        if end > self._begun:
            # Linux starts to write what is dirty there, and throws away only what is clean: nothing, so soon.
            os.posix_fadvise(self._fd, self._begun, end - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = end


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
