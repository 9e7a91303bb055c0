"""Lazy restores by the hundred: each guest goes on from where it stood, its memory is what it was.

    .venv/bin/pytest tests/long/check_lazy.py

ROUNDS says how many (100 unless told).  Every fourth is on demand first, every fourth loses its server at a moment that
is left to chance; SEED begins the same row again.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import Guests
from guest.test_lazy import Saved, Serve, lazily, lost, taken_up, whole
from guest.test_lazy import files as files
from guest.test_lazy import saved as saved
from guest.test_lazy import serve as serve

SEED = int(os.environ.get("SEED") or random.randrange(10**6))
ROUNDS = int(os.environ.get("ROUNDS") or 100)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120)]


@pytest.mark.parametrize("number", range(ROUNDS))
def test_in_a_row(guests: Guests, work: Path, saved: Saved, serve: Serve, number: int) -> None:
    chance = random.Random(f"{SEED} {number}")
    moment = chance.uniform(0, 1)
    print(f"SEED={SEED}, number {number}: {moment:.3f} s")
    guest = guests.waiting()
    if number % 4 < 2:
        assert lazily(work, state=("s.vmz", "s.state")[number % 2]).status == 0
        return whole(guest, saved)
    server = serve("--lazy", "--on-demand")
    assert server.lines()
    time.sleep(moment)
    if number % 4 == 2:
        assert server.kill(signal.SIGTERM) == 0, server.err
        return whole(guest, saved)
    server.kill()
    lost(guest)
    return taken_up(work, guest, saved)
