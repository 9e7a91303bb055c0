"""A command that goes on in a process of its own session, once its work is well begun."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from ..errors import CannotDo
from ..signals import PUT_BACK

BEGUN = b"b"


def detach(log: str | None) -> Callable[[], None] | None:
    """Fork.  To be called before there are threads.

    In the child: what it is to call once it has well begun; all that it says goes to `log`.  In the parent, which
    returns at that moment: None.  Where the child ends before, the parent says what that has said, and ends as it did.
    """
    words = _open(log)
    start = os.fstat(words).st_size
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        # From the start, so that no process that it starts holds whatever our caller waits for the end of.
        for fd in (1, 2):
            os.dup2(words, fd)
        return lambda: _begun(writing)
    os.close(writing)
    for number in PUT_BACK:
        signal.signal(number, lambda number, _frame: os.kill(child, number))
    if os.read(reading, 1) != BEGUN:
        _end_as(child, words, start)
    os.close(words)
    return None


def _open(log: str | None) -> int:
    try:
        if log is None:
            import tempfile

            with tempfile.TemporaryFile() as file:
                return os.dup(file.fileno())
        return os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotDo(f"cannot write to {log or 'a temporary file'}: {error.strerror}") from error


def _begun(writing: int) -> None:
    # Until now a terminal's signals were for us as well, and ssh could ask for a password.
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    # Where nobody waits for us any more, the work goes on.
    with contextlib.suppress(BrokenPipeError):
        os.write(writing, BEGUN)
    os.close(writing)


def _end_as(child: int, words: int, start: int) -> NoReturn:
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(os.pread(words, 1 << 20, start).decode(errors="replace"))
        sys.stderr.flush()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(abs(code))
