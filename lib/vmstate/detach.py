"""A command that goes on in a process of its own session, once its work is well begun."""

import os
import sys
from collections.abc import Callable

from .errors import CannotDo

BEGUN = b"b"


def detach(log: str | None) -> Callable[[], None] | None:
    """Fork.  To be called before there are threads.

    In the child: what it is to call once it has well begun; from then on its words go to `log`.  In the parent, which
    returns at that moment: None.  Where the child ends before, so does the parent, with its status.
    """
    words = _open(log)
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        return lambda: _begun(words, writing)
    os.close(writing)
    os.close(words)
    begun = os.read(reading, 1)
    os.close(reading)
    if begun != BEGUN:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    return None


def _open(log: str | None) -> int:
    try:
        return os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotDo(f"cannot write to {log}: {error.strerror}") from error


def _begun(words: int, writing: int) -> None:
    # Whoever waits for the end of our standard output or error waits no longer.
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, ours in ((null, 0), (words, 1), (words, 2)):
        os.dup2(fd, ours)
    os.write(writing, BEGUN)
    os.close(writing)
