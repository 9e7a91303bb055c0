"""A .vmz of a real guest that is damaged ten thousand times: each time it is found, or makes no difference.

    .venv/bin/pytest -s tests/long/check_vmz.py

Both readers look at each copy, the one in one pass and the one at random; 200 copies go through the command.  FLIPS,
CUTS and COMMANDS say how many, SEED begins another row.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import Guests, run
from unit.packed import HARMLESS, Change, Damage, flipped

SEED = int(os.environ.get("SEED") or 20261126)
FLIPS = int(os.environ.get("FLIPS") or 10_000)
CUTS = int(os.environ.get("CUTS") or 1_000)
COMMANDS = int(os.environ.get("COMMANDS") or 200)
# All of the guest's RAM from 16 MiB on is chance.
MEGABYTES = 19

pytestmark = [pytest.mark.guest, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def damage(states: Path, tmp_path_factory: pytest.TempPathFactory) -> Damage:
    folder = tmp_path_factory.mktemp("vmz")
    made = Guests(folder, states)
    try:
        made.start("a", kind="metal", mem=MEGABYTES).wait_count(5)
        assert run("vm-dump", "-q", "-o", "s", "a.qmp", cwd=folder).status == 0
        assert run("vm-compress", "-q", "-o", "s.vmz", "s", cwd=folder).status == 0
    finally:
        made.end()
    found = Damage((folder / "s.vmz").read_bytes(), SEED)
    assert found.content == (folder / "s").read_bytes()
    assert 4 << 20 <= len(found.data) <= 8 << 20
    return found


def judged(damage: Damage, changes: Iterable[Change]) -> tuple[int, list[str]]:
    """How many there were, and those that made no difference; AssertionError where one did and was not found."""
    every = [(change.what, damage.harmless(change)) for change in changes]
    return len(every), [what for what, harmless in every if harmless]


def only_in_the_head(harmless: list[str]) -> bool:
    return {int(what.split()[1].rstrip(",")) for what in harmless} <= HARMLESS


def said(text: str, damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{len(damage.data):,} bytes, {len(damage.frames)} frames, seed {SEED}: {text}")


def test_flipped_bits(damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    count, harmless = judged(damage, damage.flips(FLIPS))
    said(f"{count:,} flipped bits, {len(harmless)} of them harmless", damage, capsys)
    assert only_in_the_head(harmless)


def test_flipped_bits_between_the_content(damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    count, harmless = judged(damage, damage.flips_between(FLIPS // 10))
    said(f"{count:,} flipped bits in tables, head and end, {len(harmless)} of them harmless", damage, capsys)
    assert only_in_the_head(harmless)


def test_cuts(damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    count, harmless = judged(damage, damage.cuts(CUTS))
    said(f"{count:,} cuts, at every edge of a frame and at any byte", damage, capsys)
    assert not harmless


def test_through_the_command(damage: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [*damage.flips(COMMANDS // 2), *damage.cuts(COMMANDS)][:COMMANDS]
    file, found = tmp_path / "f", 0
    for number, change in enumerate(changes):
        file.write_bytes(change.data)
        with file.open("rb") as source:
            by_name = {"input": change.data} if number % 2 else {"stdin": source}
            done = run("vm-compress", "-d", **by_name)
        found += done.status == 3
        if done.status == 3:
            assert len(done.out) <= damage.mark
            assert damage.content.startswith(done.out)
        else:
            assert (done.status, done.out) == (0, damage.content), change.what
            assert only_in_the_head([change.what]), change.what
    said(f"{len(changes)} through the command, {found} with status 3", damage, capsys)


def test_that_harmless_ones_exist(damage: Damage) -> None:
    """The verdict is one: what is exact is taken."""
    assert damage.harmless(Change("none", damage.data))
    for bit in HARMLESS:
        assert damage.harmless(Change(f"bit {bit}", flipped(damage.data, bit)))
