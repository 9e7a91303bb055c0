"""A job goes from phase to phase as its table has it, and no other way."""

from enum import Enum

import pytest
from vmstate.phases import Phases


class Phase(Enum):
    OPEN = 1
    BEGUN = 2
    OVER = 3


NEXT = {Phase.OPEN: frozenset({Phase.BEGUN, Phase.OVER}), Phase.BEGUN: frozenset({Phase.OVER})}


@pytest.mark.parametrize("way", [[Phase.BEGUN, Phase.OVER], [Phase.OVER]])
def test_what_the_table_has(way: list[Phase]) -> None:
    phases = Phases(Phase.OPEN, NEXT)
    assert phases.now is Phase.OPEN
    for phase in way:
        phases.go(phase)
        assert phases.now is phase


@pytest.mark.parametrize("way", [[Phase.OPEN], [Phase.BEGUN, Phase.OPEN], [Phase.OVER, Phase.BEGUN]])
def test_what_it_has_not(way: list[Phase]) -> None:
    phases = Phases(Phase.OPEN, NEXT)
    for phase in way[:-1]:
        phases.go(phase)
    with pytest.raises(AssertionError, match=f"{way[-1]} cannot follow {phases.now}"):
        phases.go(way[-1])
    assert phases.now is (way[-2] if len(way) > 1 else Phase.OPEN)
