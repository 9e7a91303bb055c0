"""The tables of a move's phases: each phase is reached, and none leads back over the decision."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Any

import pytest
from vmstate.migrate import handover, reception


def behind(table: dict[Any, frozenset[Any]], first: Iterable[Enum]) -> set[Enum]:
    """Those that may follow, sooner or later."""
    found: set[Enum] = set()
    left = list(first)
    while left:
        new = table.get(left.pop(), frozenset()) - found
        found |= new
        left += new
    return found


@pytest.mark.parametrize("side", [handover, reception])
def test_each_is_reached(side: Any) -> None:
    first = next(iter(side.Phase))
    assert behind(side.STEPS, [first]) | {first} == set(side.Phase)
    assert all(steps for steps in side.STEPS.values())


def test_what_is_granted_is_not_taken_back() -> None:
    source, there = handover.Phase, reception.Phase
    assert behind(handover.STEPS, [source.GRANTED, source.CROSSED]) == set()
    assert behind(reception.STEPS, [there.GRANTED, there.CROSSED]) == {there.ARRIVED}


def test_nothing_is_granted_that_was_not_seen_to_be_given_away() -> None:
    source = handover.Phase
    assert [phase for phase, to in handover.STEPS.items() if source.GRANTED in to] == [source.GIVEN]
