"""The monitor of a guest that stands still, kept from one conversation to the next: to open it anew takes time."""

import contextlib
from collections.abc import Callable
from typing import TypeVar

from ..errors import VmstateError
from ..qemu.monitor import Monitor
from ..qemu.state import with_retry

T = TypeVar("T")


class NearMonitor:
    """Not to be kept for long: others cannot have it meanwhile."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._kept: Monitor | None = None

    def open(self) -> Monitor:
        """The one that is kept, or a new one, kept from now on.  CannotDo where others have it; GuestGone."""
        if self._kept is None:
            self._kept = Monitor(self._path).__enter__()
        return self._kept

    def keep(self) -> None:
        """`open`, if it can be had."""
        with contextlib.suppress(VmstateError):
            self.open()

    def do(self, what: Callable[[Monitor], T]) -> T:
        """In the conversation that is kept, else in one of its own."""
        return what(self._kept) if self._kept else with_retry(self._path, what)

    def leave(self) -> None:
        """Also where none is kept."""
        if self._kept:
            self._kept.leave()
        self._kept = None
