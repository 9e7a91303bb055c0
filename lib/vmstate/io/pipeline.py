"""A shell pipeline as the far end of a pipe, whose exit status counts (`--to`, `--from`)."""

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from ..errors import CannotDo
from .descriptors import enlarge

if TYPE_CHECKING:
    import subprocess


class ShellPipeline:
    """A shell pipeline as the far end of a pipe: `side` 'source' gives us bytes, another ('sink', 'filter') takes ours.

    It runs with `pipefail` in a process group of its own.  output: where a sink writes; None: where we do.
    """

    def __init__(self, command: str, side: str, output: int | None = None) -> None:
        import subprocess

        self.command = command
        self.side = side
        ours, theirs = os.pipe()[:: 1 if side == "source" else -1]
        enlarge(ours)
        stdin, stdout = (subprocess.DEVNULL, theirs) if side == "source" else (theirs, output)
        self.process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command], stdin=stdin, stdout=stdout, start_new_session=True
        )
        os.close(theirs)
        self.fd = ours

    @property
    def group(self) -> int:
        return self.process.pid

    def finish(self) -> None:
        """Close our end and wait; CannotDo unless every stage ended with 0."""
        self._close()
        status = self.process.wait()
        if status:
            raise CannotDo(f"the {self.side} '{self.command}' ended with {words_of_status(status)}")

    def end(self) -> None:
        """End the whole group, and only then close our end: no stage may take the cut for a regular end."""
        end_group(self.group, self.process)
        self._close()

    def kill(self) -> None:
        """From another thread: its end is then found by `finish`."""
        end_group(self.group)

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def words_of_status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def end_group(group: int, leader: "subprocess.Popen[bytes] | None" = None) -> None:
    """SIGKILL for a whole process group: whoever is asked politely may still commit what it has."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    if leader is not None:
        import subprocess

        with contextlib.suppress(subprocess.TimeoutExpired):
            leader.wait(5)
