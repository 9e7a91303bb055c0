"""What is made of a pipeline of filters on the way, and what undoes it at the other end."""

from __future__ import annotations

import pytest
from vmstate.errors import CannotDo, WrongUsage
from vmstate.migrate import filters, messages


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (None, []),
        ("vm-compress", ["vm-compress"]),
        ("/usr/bin/gzip -1 | vm-encrypt -r 'a | b'", ["gzip", "vm-encrypt"]),
        ("|".join(["cat"] * messages.FILTERS), ["cat"] * messages.FILTERS),
    ],
)
def test_names(command: str | None, names: list[str]) -> None:
    assert filters.names(command) == names


@pytest.mark.parametrize("command", ["", "a |", "a || b", "a; b", "a & b", "a > b", "(a)", "'", "|".join(["cat"] * 9)])
def test_what_is_no_pipeline(command: str) -> None:
    with pytest.raises(WrongUsage, match="--through: "):
        filters.names(command)


def test_they_are_undone_in_reverse() -> None:
    assert filters.inverse(["vm-compress", "gpg"], None) == "gpg -q -d | vm-compress -d"
    assert filters.inverse([], None) is None
    assert filters.inverse(["rot13"], "rot13") == "rot13"


def test_what_cannot_be_undone() -> None:
    with pytest.raises(CannotDo, match="what undoes the filter 'rot13' is not known here"):
        filters.inverse(["rot13"], None)
    with pytest.raises(CannotDo, match="the source has none"):
        filters.inverse([], "rot13")
