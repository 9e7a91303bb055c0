"""The format .vmz beside zstd and gzip: packing, unpacking, any single page.

Over whole guests that are idle, full of files, full of a database, or full of random data; the same file to each.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lab import Lab
from measure import Row, interleave, pipeline, same

INPUTS = {"linux": "idle", "cache": "full of files", "database": "a database", "metal": "random data"}
OURS, ZSTD, GZIP = "vm-compress", "zstd -1 -T0", "gzip -c"
PACK = {OURS: ["vm-compress"], ZSTD: ["zstd", "-q", "-1", "-T0", "-c"], GZIP: ["gzip", "-c"]}
LARGE = 1_400_000_000
LIMIT_PAGE, LIMIT_WARM = 500e-6, 20e-6

# The median time for a page whose frame has to be unpacked, and for one whose frame has been.
PAGES = """
import json, os, random, statistics, sys, time
from vmstate.stream.page_map import NORMAL
from vmstate.vmz.vmz_file import VmzFile
file = VmzFile(os.open(sys.argv[1], os.O_RDONLY), cache=0)
runs = [(name, start, count) for name, block in file.blocks.items()
        for start, count, kind, _ in block.runs() if kind & NORMAL]
chance = random.Random(1)
cold, warm = [], []
for name, start, count in chance.choices(runs, [count for _, _, count in runs], k=int(sys.argv[2])):
    number = start + chance.randrange(count)
    for taken in (cold, warm):
        begun = time.perf_counter()
        file.page(name, number)
        taken.append(time.perf_counter() - begun)
print(json.dumps([statistics.median(cold), statistics.median(warm)]))
"""


def packed(lab: Lab) -> Iterator[Row]:
    """Packing with the judge and the index included, unpacking, and pages."""
    packing: dict[str, dict[str, list[float]]] = {name: {} for name in PACK}
    unpacking: dict[str, dict[str, list[float]]] = {name: {} for name in ("ours", "zstd", "gzip")}
    sizes: dict[str, dict[str, list[float]]] = {OURS: {}, ZSTD: {}}
    pages: dict[str, list[float]] = {}
    content: dict[str, int] = {}
    for kind, words in INPUTS.items():
        state = lab.state(kind)
        lab.drop(kind)
        content[kind] = state.stat().st_size
        files = {name: lab.folder / f"packed.{number}" for number, name in enumerate(PACK)}
        taken = interleave(lab.rounds, {name: partial(_pack, name, state, files[name]) for name in (OURS, ZSTD)})
        # It takes so long that one round tells enough.
        taken[GZIP] = [_pack(GZIP, state, files[GZIP])]
        back = {"ours": ["vm-compress", "-d"], "zstd": ["zstd", "-qdc"], "gzip": ["gzip", "-dc"]}
        sources = {"ours": files[OURS], "zstd": files[OURS], "gzip": files[GZIP]}
        unpacked = interleave(lab.rounds, {name: _unpacker(lab, back[name], sources[name], state) for name in back})
        for name in PACK:
            packing[name][kind] = taken[name]
        for name in back:
            unpacking[name][kind] = unpacked[name]
        for name in sizes:
            sizes[name][kind] = [files[name].stat().st_size]
        pages[kind] = _pages(files[OURS], 200 if lab.quick else 2000)
        lab.forget(*(path.name for path in files.values()), state.name)
        yield Row("packed", OURS, ZSTD, f"pack, {words}", "s", taken[OURS], taken[ZSTD])
        yield Row("packed", OURS, ZSTD, f"size, {words}", "B", sizes[OURS][kind], sizes[ZSTD][kind], 1)
        yield Row(
            "packed", f"{OURS} -d", "zstd -dc", f"unpack the same, {words}", "s", unpacked["ours"], unpacked["zstd"]
        )
        yield Row("packed", OURS, "0.5 ms", f"any page, {words}", "s", pages[kind][:1], [LIMIT_PAGE], 1)
        yield Row("packed", OURS, "20 us", f"a page of a frame at hand, {words}", "s", pages[kind][1:], [LIMIT_WARM], 1)
    # Below that it is the start of Python that is measured.
    large = [kind for kind in INPUTS if lab.quick or content[kind] >= LARGE]
    ours, theirs = (_mean({kind: packing[name][kind] for kind in large}) for name in (OURS, ZSTD))
    yield Row("packed", OURS, ZSTD, "pack, geometric mean of those of 1.4 GB and more", "s", ours, theirs, 0.95)
    what = "geometric mean of all"
    yield Row("packed", OURS, ZSTD, f"pack, {what}", "s", _mean(packing[OURS]), _mean(packing[ZSTD]))
    yield Row("packed", OURS, GZIP, f"pack, {what}", "s", _mean(packing[OURS]), _mean(packing[GZIP]), 12)
    ours = _mean(unpacking["ours"])
    for theirs, wanted in (("zstd", 1.05), ("gzip", 5)):
        taken = _mean(unpacking[theirs])
        yield Row("packed", f"{OURS} -d", f"{theirs} -dc", f"unpack, {what}", "s", ours, taken, wanted)


def _pack(name: str, state: Path, packed: Path) -> float:
    return pipeline(PACK[name], source=state, sink=packed)


def _unpacker(lab: Lab, command: list[str], source: Path, state: Path) -> Callable[[], float]:
    plain = lab.folder / "plain"
    compared: list[bool] = []

    def unpack() -> float:
        seconds = pipeline(command, source=source, sink=plain)
        if not compared:
            same(plain, state)
            compared.append(True)
        lab.forget(plain.name)
        return seconds

    return unpack


def _mean(taken: dict[str, list[float]]) -> list[float]:
    """Of each round over all inputs."""
    return [math.exp(sum(map(math.log, values)) / len(values)) for values in zip(*taken.values(), strict=True)]


def _pages(path: Path, count: int) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", PAGES, path, str(count)], capture_output=True, text=True, timeout=120, check=True
    )
    found: list[float] = json.loads(done.stdout)
    return found
