"""The limits of a migration, and one that does not come to its end."""

import time

import pytest
from vmstate.qemu.limits import Convergence, Limits
from vmstate.qemu.state import GuestState, Ram


def at(number: int, left: int, run: str = "running", migration: str = "active") -> GuestState:
    return GuestState(run, migration, ram=Ram(1000, left, 0, 0, 1.0, 0, number))


@pytest.mark.parametrize(
    ("lefts", "stalls"),
    [
        ([1000, 500, 460, 420], True),
        ([1000, 1000, 1000], True),
        ([1000, 500, 480, 300, 290, 100], False),
        ([1000, 890, 790, 700, 620], False),
        ([1000, 500], False),
    ],
)
def test_two_rounds_that_bring_it_no_nearer(lefts: list[int], stalls: bool) -> None:
    convergence = Convergence()
    found = []
    for number, left in enumerate(lefts, 1):
        # What is seen later in a round says nothing.
        found += [convergence.stalls(at(number, seen)) for seen in (left, left // 2)]
    assert any(found) == stalls
    assert sum(found) == stalls


def test_nothing_is_known_yet() -> None:
    assert not Convergence().stalls(GuestState("running", "setup"))


def test_the_limits() -> None:
    now = time.monotonic()
    assert Limits().passed("it", at(1000, 5), now - 1e6) is None
    assert Limits(5, None).passed("it", at(2, 5), now - 4) is None
    assert Limits(5, None).passed("it", at(2, 5), now - 6) == "it was not over in 5 s, in round 2"
    assert Limits(None, 2).passed("it", at(2, 5), now) is None
    assert "does not come to an end: 2 rounds are over" in str(Limits(None, 2).passed("it", at(3, 5), now))
    assert Limits(5, 2).passed("it", at(3, 5, "finish-migrate"), now - 6) is None
    assert Limits(5, 2).passed("it", at(3, 5, migration="completed"), now - 6) is None
