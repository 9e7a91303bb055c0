"""The phases of a job: which may follow which, in one table."""

from collections.abc import Mapping
from enum import Enum
from typing import Generic, TypeVar

P = TypeVar("P", bound=Enum)


class Phases(Generic[P]):
    """Where one job stands.  table: of each phase, those that may come next; of one without an entry, none."""

    def __init__(self, first: P, table: Mapping[P, frozenset[P]]) -> None:
        self._now = first
        self._table = table

    @property
    def now(self) -> P:
        return self._now

    def go(self, to: P) -> None:
        """AssertionError where the table has no such step: that is a bug of ours."""
        if to not in self._table.get(self._now, frozenset()):
            raise AssertionError(f"there is no step from {self._now.name} to {to.name}")
        self._now = to
