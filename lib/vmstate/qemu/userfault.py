"""The page faults of another process: its userfaultfd, and what it waits for (userfaultfd(2), proc(5)).

For a QEMU that itself waits for a page of its guest: nothing reaches it by its monitor then.
"""

import contextlib
import errno
import fcntl
import os
import re
import struct
from array import array
from collections.abc import Iterator

from ..errors import CannotDo, GuestGone

# linux/userfaultfd.h, and the number of pidfd_getfd on every architecture
UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_COPY, UFFDIO_ZEROPAGE = 0x8010AA01, 0x8010AA02, 0xC028AA03, 0xC020AA04
SYS_PIDFD_GETFD = 438
# In a word of /proc/PID/pagemap: in memory, or swapped out
PRESENT = 3 << 62
# As /proc/PID/fd has it; QEMU may keep /dev/userfaultfd open for ever.
LINK = "anon_inode:[userfaultfd]"
PAGE = 4096
# What a block of memory may have that is searched for a text: no RAM of a guest, and not the code that QEMU makes
SEARCHED = 256 << 20


def waits(pid: int) -> bool:
    """Whether a thread of the process waits for a page; False also where that cannot be seen."""
    folder = f"/proc/{pid}/task"
    try:
        return any(_read(f"{folder}/{thread}/wchan") == "handle_userfault" for thread in os.listdir(folder))
    except OSError:
        return False


def protected(pid: int) -> bool:
    """Whether pages of the process are protected from its own writes; False also where that cannot be seen."""
    try:
        return bool(descriptors(pid)) and any("uw" in flags for _, _, flags in _maps(pid))
    except OSError:
        return False


def unprotect(pid: int) -> None:
    """Lift that, and let go on what waits.  CannotDo where it is not ours to touch."""
    with contextlib.closing(Userfault(pid)) as faults:
        faults.release()


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def descriptors(pid: int) -> list[int]:
    """The userfaultfds of a process; OSError where that cannot be seen."""
    folder = f"/proc/{pid}/fd"
    found = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"{folder}/{name}") == LINK:
                found.append(int(name))
    return found


class Userfault:
    """The userfaultfd of process `pid`.  CannotDo where it has none, or is not ours to touch."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        try:
            self._fd = _taken(pid)
            self._maps = list(_maps(pid))
        except PermissionError as error:
            text = f"the memory of QEMU (process {pid}) is not ours to touch: {error.strerror}"
            raise CannotDo(text, "only root, or who may trace it with ptrace(2), can do this") from error
        except OSError as error:
            raise CannotDo(f"cannot look into QEMU (process {pid}): {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)

    def release(self) -> None:
        """Let go of all that is protected from being written."""
        for start, end, flags in self._maps:
            if "uw" in flags:
                # Who waits for leave to write is not woken by the first alone.
                for what in (UFFDIO_UNREGISTER, UFFDIO_WAKE):
                    self._ask(what, struct.pack("2Q", start, end - start))

    def places(self, sizes: dict[bytes, int]) -> dict[bytes, int]:
        """Where in the process the blocks begin whose pages it waits for, of blocks with these sizes in bytes; without
        those that cannot be told from another."""
        found = {}
        for name, size in sizes.items():
            starts = [start for start, end, flags in self._maps if end - start == size and "um" in flags]
            if len(starts) == 1 and list(sizes.values()).count(size) == 1:
                found[name] = starts[0]
        return found

    def present(self, start: int, size: int) -> bytearray:
        """A byte for each page of a block: 1 where it is there."""
        with open(f"/proc/{self._pid}/pagemap", "rb", buffering=0) as file:
            words = array("Q", os.pread(file.fileno(), size // PAGE * 8, start // PAGE * 8))
        return bytearray(word & PRESENT != 0 for word in words)

    def copy(self, address: int, data: memoryview) -> None:
        """Put a page where none is; what is there stays."""
        import ctypes

        buffer = ctypes.create_string_buffer(bytes(data), PAGE)
        self._ask(UFFDIO_COPY, struct.pack("5Q", address, ctypes.addressof(buffer), PAGE, 0, 0))

    def zero(self, address: int) -> None:
        """The same with zeros."""
        self._ask(UFFDIO_ZEROPAGE, struct.pack("4Q", address, PAGE, 0, 0))

    def _ask(self, what: int, arguments: bytes) -> None:
        while True:
            try:
                fcntl.ioctl(self._fd, what, arguments)
                return
            except OSError as error:
                if error.errno == errno.EEXIST:
                    return
                if error.errno == errno.ESRCH:
                    raise GuestGone("its QEMU has ended") from error
                if error.errno != errno.EAGAIN:
                    raise CannotDo(f"QEMU's memory does not take a page: {error.strerror}") from error

    def holds(self, text: bytes) -> bool:
        """Whether the process has a text anywhere in its own memory, its guest's left out."""
        with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as file:
            for start, end, flags in self._maps:
                if {"rd", "wr"} <= flags and not {"um", "ex", "io"} & flags and end - start <= SEARCHED:
                    try:
                        if text in os.pread(file.fileno(), end - start, start):
                            return True
                    except OSError:
                        continue
        return False


def _taken(pid: int) -> int:
    """A descriptor of ours for the other one's userfaultfd."""
    process = os.pidfd_open(pid)
    try:
        numbers = descriptors(pid)
        if not numbers:
            raise CannotDo(f"QEMU (process {pid}) does not wait for pages")
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.syscall(SYS_PIDFD_GETFD, process, numbers[0], 0))
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd
    finally:
        os.close(process)


def _maps(pid: int) -> Iterator[tuple[int, int, set[str]]]:
    """Begin, end and flags of each mapping of a process."""
    start = end = 0
    for line in _read(f"/proc/{pid}/smaps").splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(head[1], 16), int(head[2], 16)
        elif line.startswith("VmFlags:"):
            yield start, end, set(line.split()[1:])
