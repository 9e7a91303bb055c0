"""NIC lines from a descriptor, each as soon as it has come."""

import os
import stat
from collections.abc import Iterator

from ..errors import Damaged
from ..net.nic import Nic, parse_line

# Far above any line there can be: what is longer is no text of lines, a memory image perhaps.
LONGEST = 1 << 16


class Lines:
    """`read` gives what has come since, a card or what is wrong with its line; `open` tells whether more may come."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.open = True
        self._begun = b""
        self._number = 0

    def read(self) -> Iterator[Nic | Damaged]:
        """Waits where nothing has come."""
        try:
            data = os.read(self.fd, LONGEST)
        except BlockingIOError:
            return
        *whole, self._begun = (self._begun + data).split(b"\n")
        if not data:
            self.open = False
            whole, self._begun = [self._begun], b""
        for line in whole:
            yield from self._card(line)
        if len(self._begun) > LONGEST:
            self.open = False
            yield Damaged(f"line {self._number + 1}: expected NIC lines, found one of more than {LONGEST} bytes")

    def _card(self, line: bytes) -> Iterator[Nic | Damaged]:
        self._number += 1
        if not line.strip():
            return
        try:
            yield parse_line(line.decode(errors="surrogateescape"), self._number)
        except Damaged as error:
            yield error


def hold_open(fd: int) -> None:
    """A FIFO with a name ends for its reader whenever a writer leaves; not where the reader could write as well."""
    if stat.S_ISFIFO(os.fstat(fd).st_mode) and os.readlink(f"/proc/self/fd/{fd}").startswith("/"):
        os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
