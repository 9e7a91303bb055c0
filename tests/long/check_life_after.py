"""All ways of tests/guest/test_life_after.py with each card, and the guest of test_stale.py many times.

Not among the tests of `make check`; with either QEMU:
    .venv/bin/pytest -n 2 tests/long/check_life_after.py
    VM_QEMU=$PWD/.cache/qemu10.sh .venv/bin/pytest -n 2 tests/long/check_life_after.py
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from guest.test_life_after import CARDS, WAYS, Life, life, lives_on
from guest.test_stale import Walks, migrated_live, saved_live, walk, walks
from vm import Guest

__all__ = ["life", "walk", "walks"]

DUMPS, MIGRATIONS = 40, 20


@pytest.mark.timeout(600)
@pytest.mark.parametrize("life", CARDS, indirect=True)
@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
def test_a_guest_lives_on(life: Life, way: Callable[[Life], Guest]) -> None:
    lives_on(life, way)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", range(DUMPS // 10))
def test_live_dumps_have_no_old_page(walks: Walks, walk: Path, batch: int) -> None:
    for _ in range(10):
        saved_live(walks, walk)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", range(MIGRATIONS // 10))
def test_live_migrations_have_no_old_page(walks: Walks, walk: Path, batch: int) -> None:
    for _ in range(10):
        migrated_live(walks, walk)
