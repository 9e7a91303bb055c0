"""Standard input, output and error as a command was given them; from its start on 0, 1 and 2 are open.

One that was closed leads to /dev/null then, so that no file of ours gets its number; it is refused where data would go
to it, or come from it.
"""

import contextlib
import os
import sys

from .errors import WrongUsage

NAMES = {0: "standard input", 1: "standard output", 2: "standard error"}
PATHS = {0: "/dev/stdin", 1: "/dev/stdout", 2: "/dev/stderr"}
HINTS = {0: "redirect it: < FILE, or COMMAND |", 1: "redirect it: > FILE, or | COMMAND", 2: "redirect it: 2> FILE"}
# Those that were closed
_closed: set[int] = set()


def open_closed() -> None:
    """To be called before anything is opened."""
    for fd in NAMES:
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            _closed.add(fd)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)
    # A name that is no text is no reason to fail.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def require(fd: int) -> None:
    """WrongUsage where this one was closed."""
    if fd in _closed:
        raise WrongUsage(f"{NAMES[fd]} is closed", HINTS[fd])


def require_path(path: str) -> None:
    """The same for a path that is another name of one of them."""
    for fd, name in PATHS.items():
        if path in (name, f"/dev/fd/{fd}", f"/proc/self/fd/{fd}"):
            require(fd)


def lose(fd: int) -> None:
    """From now on what is written there goes nowhere: its reader sees the end, and nothing fails any more."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, fd)
        os.close(null)
