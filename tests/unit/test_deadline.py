"""A wait has its first turn in any case, and ends."""

import time

import pytest
from vmstate.deadline import Deadline


def test_a_loop_has_its_first_turn_though_it_is_over() -> None:
    assert len(list(Deadline(-1).tries(0.01))) == 1


def test_a_loop_ends() -> None:
    begun = time.monotonic()
    turns = len(list(Deadline(0.2).tries(0.05)))
    assert 3 <= turns <= 6
    assert 0.2 <= time.monotonic() - begun < 5


def test_pauses_grow_up_to_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for _ in Deadline(1000).tries(1, slowest=3):
        if len(slept) == 5:
            break
    assert slept == [1, 1.5, 2.25, 3, 3]


def test_what_is_left_is_never_below_zero() -> None:
    assert Deadline(-5).left == 0
    assert Deadline(-5).over
    assert 9 < Deadline(10).left <= 10
    assert not Deadline(10).over
