"""Filters that the stream of a migration passes (`--through`), and what undoes them at the destination.

The source names the filters; the receiver runs none but those of its own table, or what its own command line says.
"""

import os
import shlex
import threading
from typing import TYPE_CHECKING

from ..dump.relay import Outgoing
from ..errors import CannotDo, WrongUsage
from ..io.descriptors import BLOCK, memory
from ..io.pipeline import ShellPipeline
from ..qemu.channel import QemuChannel
from . import link
from .messages import FILTERS

if TYPE_CHECKING:
    from .remote import Peer

INVERSES = {
    "vm-compress": "vm-compress -d",
    "vm-encrypt": "vm-encrypt -d",
    "gzip": "gzip -dc",
    "bzip2": "bzip2 -dc",
    "xz": "xz -dc",
    "lz4": "lz4 -dc",
    "zstd": "zstd -dc",
    "gpg": "gpg -q -d",
}


def names(command: str | None) -> list[str]:
    """The commands of a pipeline, in their order; WrongUsage where that cannot be told."""
    if command is None:
        return []
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError as error:
        raise WrongUsage(f"--through: {error}") from error
    if any(word[0] in "&;<>()" or word == "||" for word in words):
        raise WrongUsage("--through: expected a pipeline of filters, as in 'vm-compress | vm-encrypt -r KEY'")
    stages: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            stages.append([])
        else:
            stages[-1].append(word)
    if not all(stages):
        raise WrongUsage("--through: a filter is missing in the pipeline")
    if len(stages) > FILTERS:
        raise WrongUsage(f"--through: {len(stages)} filters, of which the other side takes {FILTERS}")
    return [stage[0].rpartition("/")[2] for stage in stages]


def inverse(filters: list[str], given: str | None) -> str | None:
    """The pipeline that undoes these; `given` is what the receiver was told to use.  CannotDo where there is none."""
    if given is not None:
        if not filters:
            raise CannotDo("the receiver expects a filter on the way (--through), and the source has none")
        return given
    unknown = [name for name in filters if name not in INVERSES]
    if unknown:
        hint = "tell the receiver: vm-restore --receive --through 'COMMAND' GUEST"
        raise CannotDo(f"what undoes the filter '{unknown[0]}' is not known here", hint)
    return " | ".join(INVERSES[name] for name in reversed(filters)) or None


class Filter:
    """A pipeline on the way (`--through`): QEMU's bytes into it, what it makes of them into frames."""

    def __init__(self, command: str, peer: "Peer") -> None:
        reading, writing = os.pipe()
        self._pipeline = ShellPipeline(command, "filter", writing)
        os.close(writing)
        self._reading = reading
        self._peer = peer
        self._trouble: OSError | None = None
        self.fd = self._pipeline.fd
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Everything is in; CannotDo unless it has all come out, and every filter ended with 0."""
        try:
            self._pipeline.finish()
        finally:
            self._thread.join()
        if self._trouble:
            raise self._trouble

    def trouble(self) -> Exception:
        """Why it takes no more: its own end, or that of the link behind it."""
        try:
            self.finish()
        except (CannotDo, OSError) as error:
            return error
        return CannotDo(f"the filter '{self._pipeline.command}' ended before it had taken everything")

    def kill(self) -> None:
        """From another thread."""
        self._pipeline.kill()

    def end(self) -> None:
        self._pipeline.end()

    def _pump(self) -> None:
        buffer = memory(BLOCK)
        try:
            while count := os.readv(self._reading, [buffer]):
                self._peer.link.send_bytes(link.DATA, buffer[:count])
        except OSError as error:
            self._trouble = error
            # Nobody reads it any more: it must not wait for ever.
            self._pipeline.kill()
        os.close(self._reading)


class FilteredStream:
    """QEMU's stream, as it is, through such a pipeline.  `sent` counts the bytes that have gone into it."""

    def __init__(self, command: str, channel: QemuChannel, peer: "Peer") -> None:
        self._filter = Filter(command, peer)
        self._outgoing = Outgoing(channel, self._filter.fd, whole=True)

    @property
    def sent(self) -> int:
        return self._outgoing.sent

    def run(self) -> str:
        """'sent' where all of it has come out of the filters, and gone."""
        try:
            self._outgoing.run()
        except BrokenPipeError as error:
            raise self._filter.trouble() from error
        self._filter.finish()
        return "sent"

    def answer(self, status: int) -> None:
        """As `relay.answer`."""
        self._outgoing.answer(status)

    def give_up(self) -> None:
        """From another thread: `run` waits for the filters no longer."""
        self._filter.kill()

    def end(self) -> None:
        self._filter.end()
