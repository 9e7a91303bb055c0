"""A job goes only where its table lets it."""

from enum import Enum

import pytest
from vmstate.phases import Phases


class Phase(Enum):
    BEGUN = 1
    ASKED = 2
    OVER = 3


TABLE = {Phase.BEGUN: frozenset({Phase.ASKED, Phase.OVER}), Phase.ASKED: frozenset({Phase.ASKED, Phase.OVER})}


def test_it_goes_where_the_table_says() -> None:
    phases = Phases(Phase.BEGUN, TABLE)
    assert phases.now is Phase.BEGUN
    for to in (Phase.ASKED, Phase.ASKED, Phase.OVER):
        phases.go(to)
        assert phases.now is to


@pytest.mark.parametrize(
    ("way", "to"), [((), Phase.BEGUN), ((Phase.ASKED,), Phase.BEGUN), ((Phase.OVER,), Phase.ASKED)]
)
def test_and_nowhere_else(way: tuple[Phase, ...], to: Phase) -> None:
    phases = Phases(Phase.BEGUN, TABLE)
    for phase in way:
        phases.go(phase)
    before = phases.now
    with pytest.raises(AssertionError, match=f"there is no step from {before.name} to {to.name}"):
        phases.go(to)
    assert phases.now is before
