"""Moves over a link by the hundred: everything dies at every moment, and a guest goes back and forth.

    make check-long

FAULTS says how many moves die at a moment that is left to chance (300 unless told); SEED begins the same row again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Guests
from guest.test_link import DEEDS, LINK_FAULT, RECEIVER, STEPS, fault_uri, judge_fault, link, processes
from net.conftest import two as two
from net.hosts import Hosts
from net.test_link import back_and_forth
from vm import Guest

SEED = int(os.environ.get("SEED") or random.randrange(10**6))
FAULTS = int(os.environ.get("FAULTS") or 300)
VICTIMS = ("vm-migrate", "link_fault.py", "vm-restore", "a", "b", "pause")
# A move of the guest of the tests takes about so long here, in seconds.
LASTS = 2.0

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("kind", "when", "deed"), [(k, w, d) for k, w in STEPS for d in DEEDS])
def test_at_each_step(guests: Guests, work: Path, kind: str, when: str, deed: str) -> None:
    source, there = guests.running(), guests.waiting()
    judge_fault(work, fault_uri(kind, when, deed, source, there), source, there)


@pytest.mark.parametrize("number", range(FAULTS))
def test_at_any_moment(guests: Guests, work: Path, number: int) -> None:
    chance = random.Random(f"{SEED} {number}")
    victim, moment = chance.choice(VICTIMS), chance.uniform(0.1, LASTS)
    print(f"SEED={SEED}, number {number}: {victim} after {moment:.3f} s")
    source, there = guests.running(), guests.waiting()
    uri = link(f"{sys.executable} {LINK_FAULT} once x 1 before cut - -- {RECEIVER}")
    killer = threading.Timer(moment, strike, (work, victim, source, there))
    killer.start()
    try:
        judge_fault(work, uri, source, there)
    finally:
        killer.join()


def strike(work: Path, victim: str, source: Guest, there: Guest) -> None:
    if not processes(work, "vm-migrate"):
        # It is over: whoever is killed now takes the guest with it.
        return
    with contextlib.suppress(ProcessLookupError):
        if victim in ("a", "b"):
            os.kill({"a": source, "b": there}[victim].pid, signal.SIGKILL)
            return
        for pid in processes(work, "link_fault.py" if victim == "pause" else victim):
            os.kill(pid, signal.SIGSTOP if victim == "pause" else signal.SIGKILL)
            if victim == "pause":
                time.sleep(2)
                os.kill(pid, signal.SIGCONT)


@pytest.mark.root
def test_fifty_times_back_and_forth(guests: Guests, two: Hosts) -> None:
    back_and_forth(guests, two, 50)


def test_nothing_is_left() -> None:
    done = subprocess.run(
        ["pgrep", "-f", "vm-migrate|vm-restore --receive|link_fault.py"], capture_output=True, check=False
    )
    assert not done.stdout
