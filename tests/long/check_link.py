"""Moves over a link by the hundred: everything dies at every moment, and a guest goes back and forth.

    make check-long

FAULTS says how many moves die at a moment that is left to chance (300 unless told), OTHERS with how many others
somebody interferes (100); SEED begins the same row again.
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
from conftest import Guests, shell
from guest.test_link import (
    DEEDS,
    LINK_FAULT,
    RECEIVER,
    STEPS,
    fault_uri,
    judge_fault,
    link,
    outcome_of,
    processes,
    runs,
    settled,
    stranger,
)
from net.conftest import two as two
from net.hosts import Hosts
from net.test_link import back_and_forth
from vm import Guest, QmpError

SEED = int(os.environ.get("SEED") or random.randrange(10**6))
FAULTS = int(os.environ.get("FAULTS") or 300)
OTHERS = int(os.environ.get("OTHERS") or 100)
# What happens to one of the guests, or is done by somebody who has no part in the move.
INTERFERES = ("kill", "reset a", "reset b", "shutdown a", "shutdown b", "second restore", "stranger")
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


@pytest.mark.parametrize("number", range(OTHERS))
def test_others_interfere(guests: Guests, work: Path, number: int) -> None:
    """Never two, and none is lost that has a QEMU, but for what a reset or a shutdown ends."""
    chance = random.Random(f"{SEED} other {number}")
    deed, moment = chance.choice(INTERFERES), chance.uniform(0.1, LASTS)
    print(f"SEED={SEED}, number {number}: {deed} after {moment:.3f} s")
    source, there = guests.running(), guests.waiting()
    if deed == "second restore":
        # An old state of another guest, which a user has taken for that of this one.
        third = guests.running("c")
        assert shell("vm-dump --stop -o s c.qmp", work).status == 0
        third.end()
    victim = chance.choice(VICTIMS)
    timer = threading.Timer(moment, interfere, (work, deed, victim, source, there))
    timer.start()
    uri = link(f"{sys.executable} {LINK_FAULT} once x 1 before cut - -- {RECEIVER}")
    try:
        if deed.startswith(("reset", "shutdown")):
            judge_ended(work, uri, source, there)
        else:
            judge_fault(work, uri, source, there)
    finally:
        timer.join()


def interfere(work: Path, deed: str, victim: str, source: Guest, there: Guest) -> None:
    what, _, name = deed.partition(" ")
    guest = {"a": source, "b": there}.get(name)
    with contextlib.suppress(OSError, QmpError):
        if what == "kill":
            strike(work, victim, source, there)
        elif what == "reset" and guest:
            guest.cmd("system_reset")
        elif what == "shutdown" and guest:
            # As of the host's: QEMU ends.
            os.kill(guest.pid, signal.SIGTERM)
        elif what == "second":
            shell("vm-restore --paused b.qmp < s", work)
        else:
            for purpose in ("settle", "grant"):
                for guest_name in ("a", "b"):
                    stranger(work, guest_name, purpose=purpose, move="0" * 16)


def judge_ended(work: Path, uri: str, source: Guest, there: Guest) -> None:
    """One of them was reset, or has ended: what is left of it is nowhere twice."""
    status, words, both = outcome_of(work, uri, source, there)
    assert not both, words
    end = time.monotonic() + 3
    while not (runs(source) or runs(there)) and time.monotonic() < end:
        time.sleep(0.05)
    said = [] if runs(source) or runs(there) else settled(work, source, there)
    context = "\n".join([f"status {status}, said {words}", *said])
    assert not (runs(source) and runs(there)), context
    if not runs(source) and not runs(there):
        # Reset while it was held, or ended with its QEMU; nobody says that all is well.
        assert status != 0 or not there.alive(), context


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
