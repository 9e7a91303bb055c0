"""Thousands of changed streams: each is refused, or is another state; in time, in little memory, in no other way."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import IN_NUMBERS, run

from unit.mutate import STREAMS, Change, anatomy, change, verdict
from unit.streams import state

COUNT = int(os.environ.get("VM_MUTATIONS", "10000" if IN_NUMBERS else "1000"))
# A whole Python with numpy has 60 MiB of it.
MEMORY = 256


@pytest.mark.timeout(max(180, COUNT // 50))
def test_mutations() -> None:
    done = run(sys.executable, "-m", "unit.mutate", str(COUNT), cwd=Path(__file__).parents[2], timeout=3600)
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert not found["failed"], found
    assert found["refused"] + found["accepted"] == COUNT
    assert found["peak"] <= MEMORY, found
    # That something was claimed at all.
    assert found["strict"] > COUNT // 2
    assert found["accepted"] > COUNT // 20


def test_a_change_is_known_by_its_number() -> None:
    assert change(7) == change(7)
    assert change(7) != change(8)


@pytest.mark.parametrize("name", sorted(set(STREAMS)))
def test_the_places_are_those_of_the_structure(name: str) -> None:
    """In order, without overlap; what is between them is content."""
    found = anatomy(name)
    at = 0
    for place in found.places:
        assert place.at >= at, place
        at = place.at + place.size
    assert found.places[0].at == 0
    assert (at, found.data) == (found.text, state(name))
    assert state(name)[found.text :][:1] == b"{"


def test_an_unchanged_stream_would_be_a_failure() -> None:
    """The verdict is one: what had to be refused, and was not."""
    data = state("microvm-7.2")
    assert verdict(Change("microvm-7.2", "none", data, True), False) == ("accepted", "had to be refused")
    assert verdict(Change("microvm-7.2", "none", data, False), True) == ("accepted", "")
    assert verdict(Change("microvm-7.2", "cut", data[:-1], True), True) == ("refused", "")
