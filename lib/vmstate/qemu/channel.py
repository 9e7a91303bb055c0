"""Our end of a channel over which QEMU sends a guest, and the status of its migration while nothing comes.

A QEMU 7.2 that gives up after the last page (a flush that fails, an image that it cannot let go) leaves its channel
open.  Its last step holds the lock that its monitor needs until its bytes have been taken: so the one who takes them
never waits for the monitor, and another thread asks.
"""

import select
import socket
import threading
from collections.abc import Callable

from ..errors import CannotDo, GuestGone, VmstateError
from .state import GuestState, query_once

# Seconds without a byte before the monitor is asked, and between two looks at its answer
LOOK = 0.4


def _always() -> bool:
    return True


class QemuChannel:
    """`end`: the socket.  may_ask: whether the monitor may be asked by now; else only the end of the channel counts."""

    def __init__(self, path: str, end: socket.socket, may_ask: Callable[[], bool] = _always) -> None:
        self.end = end
        self._path = path
        self._may_ask = may_ask
        # QEMU does not send any more, as it has said.
        self._over: GuestState | None = None
        self._asker: threading.Thread | None = None

    def wait(self, *others: int) -> set[int]:
        """Those of `end` and other descriptors that have something, or have ended; none where QEMU has given up."""
        poll = select.poll()
        for fd in (self.end.fileno(), *others):
            poll.register(fd, select.POLLIN)
        while not (ready := poll.poll(LOOK * 1000)):
            if self._over:
                # Whatever was sent before it was over is there by now.
                ready = poll.poll(0)
                break
            self._have_asked()
        return {fd for fd, _ in ready}

    def stop_asking(self) -> None:
        """The guest is about to cross over in postcopy: from now on only the end of the channel counts."""
        self._may_ask = lambda: False

    def gave_up(self, came: int) -> CannotDo:
        """The error for a channel on which nothing comes after so many bytes."""
        words = f"QEMU gave up after {came} bytes" if came else "QEMU gave up at once"
        try:
            found = self._over or query_once(self._path)
        except GuestGone:
            return ended(self._path)
        except VmstateError:
            return CannotDo(words)
        if found.reason:
            return CannotDo(f"{words}: {found.reason}")
        return CannotDo(words, *(["the standard error of QEMU may say why"] if found.migration == "failed" else []))

    def _have_asked(self) -> None:
        if self._may_ask() and not (self._asker and self._asker.is_alive()):
            self._asker = threading.Thread(target=self._ask, daemon=True)
            self._asker.start()

    def _ask(self) -> None:
        try:
            found = query_once(self._path)
        except VmstateError:
            # Others have the monitor; and of a QEMU that has ended the channel ends as well.
            return
        if not found.moving:
            self._over = found


def ended(path: str) -> GuestGone:
    """The error for a guest whose QEMU has ended while its state was sent."""
    return GuestGone(f"the QEMU of the guest at {path} has ended: the guest has shut down, or its QEMU was ended")
