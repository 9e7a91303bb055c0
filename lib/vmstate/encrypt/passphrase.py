"""A passphrase on its way to gpg, and nowhere else."""

import contextlib
import os

from .. import stdio
from ..errors import CannotDo
from ..io.readers import FdReader


class Passphrase:
    """The first line of a descriptor or a file, for gpg alone: in no argument, environment, file or core."""

    LONGEST = 4096

    def __init__(self, fd: int, place: str) -> None:
        _keep_out_of_cores()
        self._line = bytearray()
        # What stands behind the line on the same descriptor is somebody else's, as gpg has it.
        with memoryview(bytearray(1)) as byte:
            while FdReader(fd).readinto(byte) and byte[0] != ord("\n") and len(self._line) <= self.LONGEST:
                self._line += byte
        if not self._line:
            raise CannotDo(f"the passphrase in {place} is empty")
        if len(self._line) > self.LONGEST:
            raise CannotDo(f"the passphrase in {place} has more than {self.LONGEST} bytes")

    @classmethod
    def of_file(cls, path: str) -> "Passphrase":
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return cls(fd, path)
            finally:
                os.close(fd)
        except OSError as error:
            raise CannotDo(f"cannot read the passphrase in {path}: {error.strerror}") from error

    @classmethod
    def of_descriptor(cls, fd: int) -> "Passphrase":
        stdio.require(fd)
        try:
            return cls(fd, f"descriptor {fd}")
        except OSError as error:
            raise CannotDo(f"cannot read the passphrase in descriptor {fd}: {error.strerror}") from error

    def pipe(self) -> int:
        """Where one gpg reads it."""
        reading, writing = os.pipe()
        os.write(writing, self._line + b"\n")
        os.close(writing)
        return reading


def _keep_out_of_cores() -> None:
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A core that goes to a program (core_pattern) is made in spite of the limit.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
