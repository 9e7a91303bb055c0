"""What a command says, as text or as JSON.

Text goes to standard error as `NAME: error: ...`, `warning:`, `hint:`; lower case, no full stop, naming the object, the
offset, what was expected and what was found.  Success is silent.  With `--json` every line is one object instead, with
"vmstate": 1 (the version of these names) and "type".

Words never fail: what cannot be written is lost.  Standard output has words as well, unless it has the answer of a
command that does nothing else.
"""

import json
import sys
from typing import Any, TextIO

from . import stdio
from .errors import VmstateError

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Report:
    """The voice of one command run.

    answers: standard output has what the command is for, so that it must be written.  settled: see `settle`.
    """

    def __init__(
        self, name: str, *, quiet: bool = False, verbose: bool = False, as_json: bool = False, answers: bool = False
    ) -> None:
        self.name = name
        self.answers = answers
        self.settled = False
        self.quiet = quiet
        self.verbose = verbose
        self.as_json = as_json

    def error(self, error: VmstateError) -> None:
        if self.as_json:
            self.record("error", sys.stderr, status=error.status, message=str(error), hints=list(error.hints))
            return
        self._line("error", str(error))
        for hint in error.hints:
            self.hint(hint)

    def warning(self, text: str) -> None:
        self._say("warning", text)

    def hint(self, text: str) -> None:
        if not self.quiet:
            self._say("hint", text)

    def note(self, text: str) -> None:
        """What `-v` wants to know."""
        if self.verbose:
            self._say("note", text)

    def progress(self, text: str, values: dict[str, Any]) -> None:
        if self.as_json:
            self.record("progress", sys.stderr, **values)
        else:
            self._print(f"{self.name}: {text}", sys.stderr)

    def settle(self) -> None:
        """A guest was let run, or given away: from here on nothing but a doubt about it changes the exit status."""
        self.settled = True

    def say(self, text: str) -> None:
        """A line on standard output."""
        self._print(text, sys.stdout)

    def end_of_output(self) -> None:
        """Whoever reads standard output is to see its end now."""
        stdio.lose(1)

    def record(self, kind: str, stream: TextIO, **values: Any) -> None:
        self._print(json.dumps({"vmstate": 1, "type": kind, "command": self.name, **values}), stream)

    def _say(self, kind: str, text: str) -> None:
        if self.as_json:
            self.record(kind, sys.stderr, message=text)
        else:
            self._line(kind, text)

    def _line(self, kind: str, text: str) -> None:
        self._print(f"{self.name}: {kind}: {printable(text)}", sys.stderr)

    def _print(self, text: str, stream: TextIO) -> None:
        try:
            # An answer is flushed as a whole.
            print(text, file=stream, flush=not (self.answers and stream is sys.stdout))
        except (OSError, ValueError) as error:
            if stream is sys.stderr:
                stdio.lose(2)
            elif stream is sys.stdout and not self.answers:
                stdio.lose(1)
                why = error.strerror if isinstance(error, OSError) else str(error)
                self.warning(f"all is done, but it could not be written to standard output: {why}")
            else:
                raise


def printable(text: str) -> str:
    """Words that may come from a guest, a file or another host, such that they cannot command a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def size_words(count: float) -> str:
    """'1.5 GiB' for a number of bytes."""
    unit = 0
    while abs(count) >= 1024 and unit < len(UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} {UNITS[unit]}" if unit == 0 else f"{count:.1f} {UNITS[unit]}"


def time_words(seconds: float) -> str:
    """'250 ms', '3.2 s' or '4 min 10 s'."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def rate_value(text: str) -> int:
    """Bytes a second of RATE: a number with suffix k, m, g or t in either case; ValueError otherwise."""
    digits = text.rstrip("kmgtKMGT")
    suffix = text[len(digits) :].lower()
    if not digits.isascii() or not digits.replace(".", "", 1).isdigit() or suffix not in SUFFIXES:
        raise ValueError(f"'{text}' is no rate: expected a number with suffix k, m, g or t, as in 200m")
    return int(float(digits) * SUFFIXES[suffix])
