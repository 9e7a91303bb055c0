"""The model of a move over a link: spin goes through all of it, and finds every mistake that it is given."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run

MODEL = ROOT / "docs" / "link.pml"

# Of each mistake, the assertion that tells it: a part of its words, in which states are numbers.
HEARD = r"^\(heard==\d+\)$"
OLD_COPY = r"^\( ?!\(ran\)&& ?!\(over\)\)$"
TWO_RUN = r"^\(\(source==\d+\)\|\|\(source==\d+\)\)$|^\(destination!=\d+\)$|^\(source!=\d+\)$|^!\(again\)$"
LAST_ENDED = r"^\(\(\(destination!=\d+\)\|\|\(source!=\d+\)\)\|\|again\)$"
RUNNING_ENDED = r"^\(destination!=\d+\)$"
NONE_RUNS = r"^destination_killed$"
NOT_THERE = r"^\(\(0!=0\)\|\|ran\)$"
NOT_HERE = r"^\(+1!=1\)\|\|"
MISTAKES = {
    "ARRIVED_FIRST": NOT_THERE,
    "BELIEVES_WHO_GRANTS": TWO_RUN,
    "BELIEVES_WHO_HAS_IT": NOT_THERE,
    "BLIND_CANCEL": LAST_ENDED,
    "CANCEL_OF_ANYBODY": LAST_ENDED,
    "DEAF": "invalid end state",
    "ENDS_GIVEN": NOT_HERE,
    "ENDS_HELD": RUNNING_ENDED,
    "ENDS_WHEN_BROKEN": LAST_ENDED,
    "GOES_WHEREVER_GONE": TWO_RUN,
    "GO_BEFORE_GRANT": TWO_RUN,
    "GO_FROM_ANYBODY": TWO_RUN,
    "GRANT_TO_ANYBODY": HEARD,
    "LATE_MARK": TWO_RUN,
    "LOADED_AT_ONCE": NONE_RUNS,
    "RESET_FREES_DESTINATION": TWO_RUN,
    "RESET_FREES_SOURCE": TWO_RUN,
    "RESET_IS_HERE": LAST_ENDED,
    "RUNS_WHEN_GONE": TWO_RUN,
    "RUNS_WHEN_LOADED": TWO_RUN,
    "SECOND_RESTORE_WIPES": TWO_RUN,
    "SETTLE_TO_ANYBODY": HEARD,
    "STAYS_STOPPED": r"^\(+shut\|\|",
    "STRANGER_IS_HERE": LAST_ENDED,
    "TAKES_BACK_ENDED": OLD_COPY,
    "TAKES_BACK_GRANTED": f"{TWO_RUN}|{OLD_COPY}",
    "TORN_GRANT": TWO_RUN,
    "TORN_TAKE_BACK": TWO_RUN,
    "UNDECIDED_IS_HERE": LAST_ENDED,
    "ZERO_AFTER_GO": NOT_THERE,
}

more = pytest.mark.more


def check(work: Path, optimize: str, *options: str, mistake: str | None = None) -> str:
    """What spin's verifier of the model says."""
    shutil.copy(MODEL, work)
    for command in (
        ["spin", *([f"-D{mistake}"] if mistake else []), "-a", MODEL.name],
        ["gcc", optimize, "-w", "-DSAFETY", "-o", "pan", "pan.c"],
        ["./pan", "-m10000", "-w20", *options],
    ):
        done = run(*command, cwd=work)
        assert done.status == 0, done.text + done.err
    return done.text


def test_every_order_of_events_is_good(tmp_path: Path) -> None:
    said = check(tmp_path, "-O1")
    assert "errors: 0" in said, said
    # All of it was seen: no limit was met ...
    assert "Full statespace search" in said, said
    for limit in ("not completed", "too small", "truncated", "out of memory", "hash-compact", "bit statespace"):
        assert limit not in said.lower(), said
    # ... and each line of the model plays a part, but for the ends of what never ends.
    unreached = re.findall(r'link\.pml:\d+, state \d+, "(.*)"', said)
    assert set(unreached) == {"-end-"}, said
    assert len(re.findall("unreached in proctype", said)) == 9, said


@pytest.mark.parametrize("mistake", [pytest.param(name, marks=() if name == "DEAF" else more) for name in MISTAKES])
def test_a_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    ends = MISTAKES[mistake] == "invalid end state"
    # -E: only an assertion counts
    said = check(tmp_path, "-O0", *([] if ends else ["-E"]), mistake=mistake)
    found = re.search(r"^pan:1: (?:assertion violated )?(.*) \(at depth", said, re.MULTILINE)
    assert found and "errors: 1" in said, said
    assert re.search(MISTAKES[mistake], found[1].strip()), said


def test_every_mistake_of_the_model_is_tried() -> None:
    assert set(re.findall(r"^#ifn?def (\w+)", MODEL.read_text(), re.MULTILINE)) == set(MISTAKES)
