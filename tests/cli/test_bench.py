"""`make bench` runs through on small guests and writes whole results; what it measures is not judged here."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from conftest import ROOT, run

CASES = {"start", "dump", "pause", "compress", "restore", "filters", "verify", "memory", "encrypt"}


@pytest.mark.guest
@pytest.mark.timeout(240)
def test_a_quick_run_writes_whole_results(tmp_path: Path) -> None:
    done = run(sys.executable, ROOT / "bench/run", "--quick", "--out", tmp_path, timeout=220)
    assert done.status == 0, done.err
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["rows"]
    assert results["version"] == 1
    assert {row["case"] for row in rows} == CASES
    assert all(row["ratio"] > 0 and row["best"] > 0 for row in rows)
    assert all((row["met"] is None) == (row["target"] is None) for row in rows)
    assert len(done.text.splitlines()) == len(rows) + 2
    table = (tmp_path / "results.md").read_text()
    assert len(re.findall(r"(?m)^\| \w+ \| `", table)) == len(rows)
    for picture in ("speed.svg", "limits.svg"):
        assert ElementTree.parse(tmp_path / picture).getroot().get("role") == "img"


def test_no_absolute_time_is_published() -> None:
    folder = ROOT / "bench"
    for name in ("results.json", "results.md"):
        assert not re.search(r"\d m?s\b", (folder / name).read_text().replace("100 ms", ""))


def test_an_unknown_comparison_is_wrong_usage() -> None:
    done = run(sys.executable, ROOT / "bench/run", "--only", "nothing")
    assert done.status == 2
    assert "'nothing'" in done.err
