"""`make bench` runs through on small guests and writes whole results; what it measures is not judged here."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import ROOT, run

CASES = {"start", "dump", "pause", "compress", "restore", "filters", "verify", "memory", "encrypt"}
PACKED = {"packed", "lazy", "clones"}
MOVES = {"gap", "ssh-throughput", "through-100mbit", "announce"}
EVERY = CASES | PACKED | MOVES
NAMESPACES = [pytest.mark.root, pytest.mark.netns]


more = pytest.mark.more


@pytest.mark.guest
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("cases", "pictures"),
    [
        pytest.param(CASES, {"speed.svg", "limits.svg", "pauses.svg"}, id="alone", marks=more),
        pytest.param({"start", "verify"}, {"speed.svg", "limits.svg"}, id="few"),
        pytest.param(PACKED, {"speed.svg", "limits.svg", "lazy.svg", "asked.svg"}, id="packed", marks=more),
        pytest.param(MOVES, {"speed.svg", "limits.svg", "gaps.svg"}, id="moves", marks=[*NAMESPACES, more]),
    ],
)
def test_a_quick_run_writes_whole_results(tmp_path: Path, cases: set[str], pictures: set[str]) -> None:
    only = [word for name in sorted(cases) for word in ("--only", name)]
    done = run(sys.executable, ROOT / "bench/run", "--quick", *only, "--out", tmp_path, timeout=280)
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["rows"]
    assert results["version"] == 1
    assert {row["case"] for row in rows} == cases
    assert all(row["ratio"] > 0 and row["best"] > 0 for row in rows)
    assert all((row["met"] is None) == (row["target"] is None) for row in rows)
    assert len(done.text.splitlines()) == len(rows) + 2
    table = (tmp_path / "results.md").read_text()
    assert len(re.findall(r"(?m)^\| [\w-]+ \| `", table)) == len(rows)
    assert {path.name for path in tmp_path.glob("*.svg")} == pictures
    for picture in pictures:
        assert ElementTree.parse(tmp_path / picture).getroot().get("role") == "img"


def test_no_absolute_time_is_published() -> None:
    folder = ROOT / "bench"
    for name in ("results.json", "results.md"):
        text = (folder / name).read_text()
        for limit in ("100 ms", "300 ms", "30 ms", "0.5 ms", "5 ms", "20 us", "1 ms", "20 ms", "2 s"):
            text = text.replace(limit, "")
        assert not re.search(r"\d m?s\b", text)


def test_the_usage_names_all_comparisons_and_another_one_is_wrong_usage() -> None:
    done = run(sys.executable, ROOT / "bench/run", "--help")
    assert done.status == 0
    listed = done.text.split("--only NAME  ")[1].split("--out")[0]
    assert {name for name in re.findall(r"[a-z0-9-]+", listed) if name in EVERY} == EVERY
    done = run(sys.executable, ROOT / "bench/run", "--only", "nothing")
    assert done.status == 2
    assert "'nothing'" in done.err
    assert set(done.err.strip().rpartition("there are ")[2].split(", ")) == EVERY
