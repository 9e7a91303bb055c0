"""Options that several commands have, as values."""

import os
from typing import Any

from ..errors import WrongUsage
from ..report import rate_value

Options = dict[str, Any]


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


def reads_input(options: Options) -> bool:
    """Whether standard input is the FILE."""
    return options["FILE"] in (None, "-")


def writes_output(options: Options) -> bool:
    """Whether standard output is the --output."""
    return options["--output"] in (None, "-")


def rate_option(options: Options) -> int | None:
    """--speed in bytes a second."""
    try:
        return None if options["--speed"] is None else rate_value(options["--speed"])
    except ValueError as error:
        raise WrongUsage(f"--speed: {error}") from error


def whole_number(options: Options, name: str) -> int | None:
    """A number above 0."""
    text = options[name]
    if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 11 and 0 < int(text) < 1 << 31):
        raise WrongUsage(f"{name}: expected a whole number above 0, found '{text}'")
    return None if text is None else int(text)


def downtime_option(options: Options) -> int | None:
    """--downtime in ms."""
    text = options["--downtime"]
    # QEMU's own limit.
    if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) <= 2000000):
        raise WrongUsage(f"--downtime: expected a whole number of milliseconds up to 2000000, found '{text}'")
    return None if text is None else int(text)
