"""Values of somebody else (QEMU, a guest agent, a peer, a file), read field by field: each is of its type and in its
range, or an error names it."""

import re
from typing import Any, TypeVar

from .errors import CannotDo, VmstateError

T = TypeVar("T")
# 63 bits: more than any counter of QEMU gets to
MOST = (1 << 63) - 1
# Of a text: the longest path, and more than any message that is worth reading
LONGEST = 4096
# Of a list
MANY = 65536


class _Required:
    """Of a field that must be there."""


REQUIRED = _Required()


class Fields:
    """An object out of JSON.  what: how it reads in a message; wrong: the family of the error."""

    def __init__(self, values: object, what: str, wrong: type[VmstateError] = CannotDo, at: str = "") -> None:
        self._what, self._wrong, self._at = what, wrong, at
        if not isinstance(values, dict):
            where = f": field '{at.rstrip('.')}'" if at else ""
            raise wrong(f"{what}{where}: expected an object, found {_short(values)}")
        self._values: dict[str, Any] = values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> object:
        """As it came; None where there is none."""
        return self._values.get(name)

    def only(self, names: tuple[str, ...]) -> None:
        """A field of another name is wrong."""
        for name in self._values:
            if name not in names:
                raise self.error(name, "none of that name")

    def raw(self) -> dict[str, Any]:
        """As it came."""
        return self._values

    def text(self, name: str, default: T | _Required = REQUIRED, *, pattern: str = "", most: int = LONGEST) -> str | T:
        """pattern: a regular expression for all of it."""
        if name not in self._values and not isinstance(default, _Required):
            return default
        value = self._value(name)
        if not isinstance(value, str):
            raise self.error(name, "a text")
        if len(value) > most:
            raise self.error(name, f"at most {most} letters")
        if pattern and not re.fullmatch(pattern, value):
            raise self.error(name, f"a text like {pattern}")
        return value

    def secret(self, name: str, *, pattern: str) -> str:
        """A text of which no error shows anything."""
        value = self._value(name)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise self._wrong(f"{self._what}: field '{self._at}{name}': expected a text like {pattern}")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of some texts."""
        value = self.text(name)
        if value not in choices:
            raise self.error(name, " or ".join(f"'{choice}'" for choice in choices))
        return value

    def whole(self, name: str, default: T | _Required = REQUIRED, *, low: int = 0, high: int = MOST) -> int | T:
        """A whole number within `low` and `high`."""
        if name not in self._values and not isinstance(default, _Required):
            return default
        value = self._value(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, "a whole number")
        if not low <= value <= high:
            raise self.error(name, f"a number from {low} to {high}")
        return value

    def flag(self, name: str, default: T | _Required = REQUIRED) -> bool | T:
        if name not in self._values and not isinstance(default, _Required):
            return default
        value = self._value(name)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def number(self, name: str, default: T | _Required = REQUIRED) -> float | T:
        if name not in self._values and not isinstance(default, _Required):
            return default
        value = self._value(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < MOST:
            raise self.error(name, "a number")
        return float(value)

    def inner(self, name: str, default: T | _Required = REQUIRED) -> "Fields | T":
        """An object in it."""
        if name not in self._values and not isinstance(default, _Required):
            return default
        value = self._value(name)
        return self._of(value, f"{name}.")

    def objects(self, name: str, *, most: int = MANY) -> "list[Fields]":
        """A list of objects; an empty one where there is none."""
        return [self._of(value, f"{name}[{at}].") for at, value in enumerate(self._list(name, most))]

    def texts(self, name: str, *, most: int = MANY, longest: int = LONGEST) -> list[str]:
        """A list of texts; an empty one where there is none."""
        found = self._list(name, most)
        if not all(isinstance(value, str) and len(value) <= longest for value in found):
            raise self.error(name, f"a list of texts of at most {longest} letters")
        return found

    def wholes(self, name: str, *, most: int = MANY, low: int = 0, high: int = MOST) -> list[int]:
        """A list of whole numbers; an empty one where there is none."""
        found = self._list(name, most)
        if not all(type(value) is int and low <= value <= high for value in found):
            raise self.error(name, f"a list of numbers from {low} to {high}")
        return found

    def error(self, name: str, expected: str) -> VmstateError:
        """What is wrong with a field."""
        found = _short(self._values[name]) if name in self._values else "none"
        return self._wrong(f"{self._what}: field '{self._at}{name}': expected {expected}, found {found}")

    def _of(self, value: object, at: str) -> "Fields":
        return Fields(value, self._what, self._wrong, self._at + at)

    def _list(self, name: str, most: int) -> list[Any]:
        value = self._values.get(name, [])
        if not isinstance(value, list):
            raise self.error(name, "a list")
        if len(value) > most:
            raise self.error(name, f"at most {most} entries")
        return value

    def _value(self, name: str) -> Any:
        if name not in self._values:
            raise self.error(name, "a value")
        return self._values[name]


def objects_of(values: object, what: str, wrong: type[VmstateError] = CannotDo) -> list[Fields]:
    """A list of objects that came by itself."""
    return Fields({"return": values}, what, wrong).objects("return")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
