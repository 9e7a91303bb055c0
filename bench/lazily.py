"""A guest that runs before its memory is read, beside one that is restored as a whole, and QEMU's own way."""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lab import Events, Lab
from measure import DEADLINE, Row, end, high_water, interleave
from vm import Guest, until

LAZY, EAGER, ZSTD = "vm-restore --lazy", "vm-restore", "-incoming 'exec:zstd -dc'"
LIMIT_RUNS = 0.3
LIMIT_MEDIAN, LIMIT_MOST = 1e-3, 20e-3
# The slowest may take so many times what the fastest takes.
FLAT = 1.25
CLONES = 10


def lazy(lab: Lab) -> Iterator[Row]:
    """From the start of the command until the guest runs, until it gives a sign of life, until all memory is there."""
    whole = _rounds(lab, "linux", lab.rounds, to_the_end=True)
    yield from _compared(f"2 GiB, {lab.size('linux')}", whole, (3, 2))
    yield Row("lazy", LAZY, "300 ms", "until the guest runs", "s", _part(whole[LAZY], "runs"), [LIMIT_RUNS], 1)
    took = _part(whole[LAZY], "whole"), _part(whole[EAGER], "whole")
    yield Row("lazy", LAZY, EAGER, f"until all memory is there, {lab.size('linux')}", "s", *took, round(1 / 1.2, 2))
    told = [round_["told"] for round_ in whole[LAZY] if round_["told"]["asked"]]
    curve = [at / told[0]["seconds"] for at in told[0]["asked_at"]] if told else None
    for name, limit, share in (("1 ms", LIMIT_MEDIAN, "median"), ("20 ms", LIMIT_MOST, "p99")):
        waited = [values[f"wait_{share}"] for values in told]
        yield Row("lazy", LAZY, name, f"from request to page, {share}", "s", waited, [limit], 1, curve)
    kinds = [f"half-{gib}" for gib in ((1, 4) if lab.quick else (1, 2, 4, 8))]
    for kind in kinds:
        gib = int(kind.split("-")[1])
        rounds = lab.rounds if gib < 4 or lab.quick else 3
        taken = _rounds(lab, kind, rounds, to_the_end=False)
        yield from _compared(f"{gib} GiB, half full", taken, (8, 5) if gib == 8 else (None, None))
    # In turn: what else the machine does is the same for all sizes then.
    runs = {kind: partial(_runs_after, lab, kind) for kind in kinds}
    flat = interleave(2 * lab.rounds, runs)
    lab.forget(*(f"{kind}.vmz" for kind in kinds))
    slowest, fastest = (choose(flat.values(), key=statistics.median) for choose in (max, min))
    what = "until the guest runs, 1 to 8 GiB: slowest, fastest"
    yield Row("lazy", LAZY, "1.25 of itself", what, "s", slowest, [FLAT * seconds for seconds in fastest], 1)


def _runs_after(lab: Lab, kind: str) -> float:
    return float(_restored(lab, kind, LAZY, lab.packed(kind), False)["runs"])


def _compared(
    words: str, taken: dict[str, list[dict[str, Any]]], wanted: tuple[float | None, float | None]
) -> Iterator[Row]:
    for name in (EAGER, ZSTD):
        targets = wanted if name == EAGER else (None, None)
        for part, what, target in zip(
            ("runs", "lives"), ("until the guest runs", "until it ticks"), targets, strict=True
        ):
            yield Row(
                "lazy", LAZY, name, f"{what}, {words}", "s", _part(taken[LAZY], part), _part(taken[name], part), target
            )


def _part(rounds: list[dict[str, Any]], name: str) -> list[float]:
    return [float(values[name]) for values in rounds]


def _rounds(lab: Lab, kind: str, rounds: int, *, to_the_end: bool) -> dict[str, list[dict[str, Any]]]:
    state = lab.packed(kind)
    taken: dict[str, list[dict[str, Any]]] = {LAZY: [], EAGER: [], ZSTD: []}
    for number in range(rounds):
        names = list(taken)
        for name in names[number % 3 :] + names[: number % 3]:
            taken[name].append(_restored(lab, kind, name, state, to_the_end))
    return taken


def _restored(lab: Lab, kind: str, name: str, state: Path, to_the_end: bool) -> dict[str, Any]:
    """Seconds until it `runs`, until it `lives`, until the `whole` is there, and what the command `told`."""
    with (
        lab.waiting(kind) as guest,
        Events(guest.path("test")) as events,
        _begun(guest, name, state, events) as (begun, process),
    ):
        serial = guest.path("serial")
        lives = _sign_of_life(serial) - begun
        found: dict[str, Any] = {"runs": events.wait_for("RESUME") - begun, "lives": lives, "told": {}}
        if to_the_end and process:
            said = process.communicate(timeout=DEADLINE)[1]
            if process.returncode:
                raise RuntimeError(f"{name} ended with {process.returncode}: {said}")
            found["told"] = json.loads(said.splitlines()[-1]) if name == LAZY else {}
        found["whole"] = time.time() - begun
        return found


@contextlib.contextmanager
def _begun(
    guest: Guest, name: str, state: Path, events: Events
) -> Iterator[tuple[float, subprocess.Popen[str] | None]]:
    if name == ZSTD:
        begun = time.time()
        events.cmd("migrate-incoming", uri=f"exec:zstd -qdc {shlex.quote(str(state))}")
        yield begun, None
        return
    options = ["--lazy", "--json"] if name == LAZY else ["-q"]
    with state.open("rb") as source:
        begun = time.time()
        process = subprocess.Popen(
            ["vm-restore", *options, guest.qmp],
            stdin=source,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    try:
        yield begun, process
    finally:
        end(process)  # type: ignore[arg-type]


def _sign_of_life(serial: Path) -> float:
    give_up = time.time() + DEADLINE
    while not (serial.exists() and serial.stat().st_size):
        if time.time() > give_up:
            raise TimeoutError("the guest says nothing")
        time.sleep(0.001)
    return time.time()


def clones(lab: Lab) -> Iterator[Row]:
    """Many guests out of one state, each with the pages that it touches, beside as many that have all of it."""
    kind, number = "half-1", 3 if lab.quick else CLONES
    state = lab.packed(kind)
    needed: dict[str, list[float]] = {LAZY: [], EAGER: []}

    def cloned(name: str) -> float:
        with contextlib.ExitStack() as stack:
            guests = [stack.enter_context(lab.waiting(kind, f"c{at}")) for at in range(number)]
            options = ["--lazy", "--on-demand"] if name == LAZY else []
            begun = time.perf_counter()
            processes = []
            for guest in guests:
                with state.open("rb") as source:
                    command = ["vm-restore", "-q", *options, guest.qmp]
                    null = subprocess.DEVNULL
                    processes.append(subprocess.Popen(command, stdin=source, stdout=null, start_new_session=True))
                stack.callback(end, processes[-1])
            for guest in guests:
                until(lambda guest=guest: guest.status() == "running", DEADLINE, "a clone runs")  # type: ignore[misc]
            seconds = time.perf_counter() - begun
            for guest in guests:
                guest.wait_advance(60)
            needed[name].append(sum(high_water(guest.pid) for guest in guests))
            return seconds

    taken = interleave(min(3, lab.rounds), {name: lambda name=name: cloned(name) for name in (LAZY, EAGER)})
    words = f"{number} clones of 1 GiB, half full"
    mine = f"{LAZY} --on-demand"
    yield Row("clones", mine, EAGER, f"until all run, {words}", "s", taken[LAZY], taken[EAGER], 3)
    yield Row("clones", mine, EAGER, f"memory of all, {words}", "B", needed[LAZY], needed[EAGER])
