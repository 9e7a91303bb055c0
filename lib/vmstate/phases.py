"""The phases of a job: which may follow which, in one table."""

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

P = TypeVar("P", bound=Enum)


class Phases(Generic[P]):
    """Where a job stands.  table: for each phase those that may follow it; one that is not there is the last."""

    def __init__(self, first: P, table: Mapping[P, frozenset[P]]) -> None:
        self._now = first
        self._table = table

    @property
    def now(self) -> P:
        return self._now

    def go(self, to: P) -> None:
        """AssertionError where the table has no such step."""
        if to not in self._table.get(self._now, frozenset()):
            raise AssertionError(f"{to} cannot follow {self._now}")
        self._now = to
