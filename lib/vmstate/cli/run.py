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
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from .. import __version__
from ..errors import CannotDo, Stopped, VmstateError, WrongUsage
from ..report import Report, rate_value

Options = dict[str, Any]
Main = Callable[[Options, Report], int | None]

# Of these only writing can fail.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PUT_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(main: Main, usage: str, *, owns_guest: bool = False) -> NoReturn:
    """Parse argv by `usage`, call `main`, exit with the truth.

    A pure filter (not `owns_guest`) dies of SIGPIPE as gzip does.
    """
    name = os.path.basename(sys.argv[0])
    _need_standard_error()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN if owns_guest else signal.SIG_DFL)
    for number in PUT_BACK:
        # Who was started with a signal ignored (nohup) keeps it so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    # Asked for a line of progress when there is none to tell: not a reason to die.
    signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
    # What cannot be parsed is reported as asked for, too.
    report = Report(name, quiet=_asked("-q", "--quiet"), as_json=_asked("--json"))
    try:
        options = _parse(name, usage)
        report = Report(
            name, quiet=options["--quiet"], verbose=options["--verbose"], as_json=bool(options.get("--json"))
        )
        status = main(options, report) or 0
        _finish()
    except VmstateError as error:
        if not error.told:
            report.error(error)
        status = error.status
    except Stopped as stopped:
        _die_of(stopped.number)
    except BrokenPipeError:
        report.error(CannotDo("the reader of standard output went away"))
        status = 1
    except OSError as error:
        report.error(CannotDo(_words(error)))
        status = 1
    except Exception as error:  # noqa: BLE001 - no traceback reaches a user, unless asked for
        if os.environ.get("VM_DEBUG"):
            raise
        text = f"internal error: {type(error).__name__}: {error}"
        report.error(CannotDo(text, "this is a bug of ours; VM_DEBUG=1 shows where it happened"))
        status = 1
    _leave(status)


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


def _need_standard_error() -> None:
    """Closed (2>&-), its number would go to the next file that is opened, and get our words."""
    if sys.stderr is None:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != 2:
            os.dup2(null, 2)
        sys.stderr = open(2, "w", closefd=False)


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


class _Held:
    """Whether signals have to wait, and the one that does."""

    held = False
    waiting: int | None = None


def hold_signals() -> None:
    """From here to `release_signals` a signal waits: what is begun must be known before it can be put back."""
    _Held.held = True


def release_signals() -> None:
    """Raises Stopped where a signal has been waiting."""
    _Held.held = False
    if _Held.waiting is not None:
        _stop(_Held.waiting, None)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Around a talk with QEMU: what a signal raises in the midst of it can get lost in it."""
    hold_signals()
    try:
        yield
    finally:
        release_signals()


def _stop(number: int, _frame: object) -> None:
    if _Held.held:
        _Held.waiting = number
        return
    # A second signal must not interrupt the putting back.
    no_more_signals()
    raise Stopped(number)


def no_more_signals() -> None:
    """From here on a signal comes too late, or would keep something from being put back."""
    for number in PUT_BACK:
        signal.signal(number, signal.SIG_IGN)


def step_back() -> None:
    """A guest runs again: it needs the processor more than what is left to do here."""
    with contextlib.suppress(OSError):
        os.nice(10)


def _die_of(number: int) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)


def _finish() -> None:
    """Flushing standard output is part of the job and can fail."""
    sys.stdout.flush()


def _leave(status: int) -> NoReturn:
    # Whatever stands in Python's own buffers has been flushed; closing down the interpreter could only fail again.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)


def _words(error: OSError) -> str:
    what = error.strerror or str(error)
    if error.filename:
        return f"{error.filename}: {what}"
    return f"cannot {'write' if error.errno in FULL else 'read or write'}: {what}"


def guest_path(options: Options) -> str:
    """GUEST, or what VM_GUEST names."""
    path = options.get("GUEST") or os.environ.get("VM_GUEST")
    if not path:
        raise WrongUsage("no guest given", "name the path of its QMP socket, or set VM_GUEST")
    return str(path)


def progress_mode(options: Options) -> str:
    """'on', 'off' or 'auto'."""
    if options["--no-progress"] or options["--quiet"]:
        return "off"
    return "on" if options["--progress"] else "auto"


def rate_option(options: Options) -> int | None:
    """--speed in bytes a second."""
    try:
        return None if options["--speed"] is None else rate_value(options["--speed"])
    except ValueError as error:
        raise WrongUsage(f"--speed: {error}") from error


def downtime_option(options: Options) -> int | None:
    """--downtime in ms."""
    text = options["--downtime"]
    # QEMU's own limit.
    if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= 2000000):
        raise WrongUsage(f"--downtime: expected a whole number of milliseconds up to 2000000, found '{text}'")
    return None if text is None else int(text)


def change_run_state(options: Options, report: Report, change: Callable[[str], Any]) -> None:
    """`vm-stop` and `vm-cont`: a verb on a guest, whose outcome is its run state."""
    path = guest_path(options)
    standing = change(path)
    if report.as_json:
        report.record("result", sys.stdout, status=0, guest=path, state=standing.run)
    report.note(f"the guest is '{standing.run}'")
