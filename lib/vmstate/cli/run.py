"""From argv to exit status: docopt, signals, and the one place that turns an error into an exit.

A command gives `run` its usage and a function of `Options` and `Report`.  Whatever that function raises becomes a
message and a status here; a signal becomes `Stopped`, so that everything under way can put a guest back before the
command dies of it.
"""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from .. import __version__, stdio
from ..errors import CannotDo, Damaged, InDoubt, Stopped, VmstateError, WrongUsage
from ..report import Report
from ..signals import PUT_BACK, no_more_signals, stop_on_signal
from .options import Options, guest_path

Main = Callable[[Options, Report], int | None]
Which = Callable[[Options], bool]

# Of these only writing can fail.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def never(_options: Options) -> bool:
    return False


def run(main: Main, usage: str, *, owns_guest: bool = False, reads: Which = never, writes: Which = never) -> NoReturn:
    """Parse argv by `usage`, call `main`, exit with the truth.

    A pure filter (not `owns_guest`) dies of SIGPIPE as gzip does.  reads, writes: whether standard input has data, and
    standard output: a state, a message, or the answer of a command that does nothing else.
    """
    name = os.path.basename(sys.argv[0])
    stdio.open_closed()
    _hear_signals()
    # What cannot be parsed is reported as asked for, too.
    report = Report(name, quiet=_asked("-q", "--quiet"), as_json=_asked("--json"))
    try:
        options = _parse(name, usage)
        report = Report(
            name,
            quiet=options["--quiet"],
            verbose=options["--verbose"],
            as_json=bool(options.get("--json")),
            answers=writes(options),
        )
        if reads(options):
            stdio.require(0)
        if report.answers:
            stdio.require(1)
        status = main(options, report) or 0
        if report.answers:
            sys.stdout.flush()
    except Stopped as stopped:
        _die_of(stopped.number)
    except BrokenPipeError as error:
        if not owns_guest:
            _die_of(signal.SIGPIPE)
        status = _status_of(error, report)
    except Exception as error:  # noqa: BLE001 - no traceback reaches a user, unless asked for
        status = _status_of(error, report)
    _leave(status)


def _status_of(error: Exception, report: Report) -> int:
    """Say what has come out."""
    found = error if isinstance(error, VmstateError) else _in_words(error)
    # What became of a guest is known: damage that a lazy restore finds, or a doubt, is about it; all else is words.
    if report.settled and not isinstance(error, Damaged | InDoubt):
        report.warning(f"all is done, but {found}")
        return 0
    if not found.told:
        report.error(found)
    return found.status


def _in_words(error: Exception) -> VmstateError:
    if isinstance(error, BrokenPipeError):
        return CannotDo("the reader of standard output went away")
    if isinstance(error, OSError):
        return CannotDo(_words(error))
    if os.environ.get("VM_DEBUG"):
        raise error
    text = f"internal error: {type(error).__name__}: {error}"
    return CannotDo(text, "this is a bug of ours; VM_DEBUG=1 shows where it happened")


def _hear_signals() -> None:
    # A pure filter that writes data dies of it nevertheless, but nobody dies of words.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number in PUT_BACK:
        # Who was started with a signal ignored (nohup) keeps it so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop_on_signal)
    # Asked for a line of progress when there is none to tell: not a reason to die.
    signal.signal(signal.SIGUSR1, lambda _number, _frame: None)


def _parse(name: str, usage: str) -> Options:
    from docopt import DocoptExit, docopt

    try:
        return dict(docopt(usage, version=f"{name} (vmstate) {__version__}"))
    except DocoptExit as error:
        reason = str(error).split("\n")[0]
        if reason.lower().startswith("usage"):
            reason = _unknown(usage)
        said = f"wrong usage: {reason}" if reason else "wrong usage"
        raise WrongUsage(said, *(line.strip() for line in error.usage.split("\n")[1:]), f"{name} --help") from error
    except SystemExit:
        # It has printed the help, or the version.
        stdio.require(1)
        sys.stdout.flush()
        _leave(0)


def _own_words() -> list[str]:
    """The words of the command line that are ours: those before `--`."""
    words = sys.argv[1:]
    return words[: words.index("--")] if "--" in words else words


def _asked(*names: str) -> bool:
    return any(name in _own_words() for name in names)


def _unknown(usage: str) -> str:
    """The first option that `usage` does not have, in words; a part of a long name will do for docopt."""
    known = re.findall(r"(?<![\w-])--?[a-zA-Z0-9][\w-]*", usage)
    for word in _own_words():
        name = word.split("=")[0] if word.startswith("--") else word[:2]
        if name.startswith("-") and name != "-" and not any(option.startswith(name) for option in known):
            return f"there is no option {name}"
    return ""


def _die_of(number: int) -> NoReturn:
    _release()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def _release() -> None:
    """What it holds of a QEMU ends with it; nothing of that changes its outcome."""
    if claim := sys.modules.get("vmstate.qemu.claim"):
        no_more_signals()
        with contextlib.suppress(Exception):
            claim.release()


def _leave(status: int) -> NoReturn:
    _release()
    # An answer that ended with an error is there as far as it came; closing down the interpreter could only fail again.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _words(error: OSError) -> str:
    what = error.strerror or str(error)
    if error.filename:
        return f"{error.filename}: {what}"
    return f"cannot {'write' if error.errno in FULL else 'read or write'}: {what}"


def change_run_state(options: Options, report: Report, change: Callable[[str], Any]) -> None:
    """`vm-stop` and `vm-cont`: a verb on a guest, whose outcome is its run state."""
    path = guest_path(options)
    guest_state = change(path)
    report.settle()
    if report.as_json:
        report.record("result", sys.stdout, status=0, guest=path, state=guest_state.run)
    report.note(f"the guest is '{guest_state.run}'")
