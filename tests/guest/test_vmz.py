"""A .vmz between two guests: there and back by every way, and none of its damages runs."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Done, Guests, shell
from unit.packed import flipped, frames, groups
from vm import Guest
from vmstate.io.descriptors import HOLD

from guest.judge import as_it_was, still_waits, used_up, went_on
from guest.test_forged import never_ran, saved_many
from guest.test_howto import goes_on, saved_in_the_monitor

SEED = 20261126
MIB = 1 << 20
# The entry of the end record, and what is behind the entries
SEEK_ENTRY, SEEK_END = 12, 9
FLAGS = 16


@dataclass
class File:
    """The bytes of a .vmz, where its end record and its seek table begin, and the count at which its guest stood."""

    data: bytes
    stood: int = 0

    def __post_init__(self) -> None:
        (count,) = struct.unpack_from("<I", self.data, len(self.data) - SEEK_END)
        self.seek = len(self.data) - SEEK_END - SEEK_ENTRY * count - 8
        (size,) = struct.unpack_from("<I", self.data, len(self.data) - SEEK_END - SEEK_ENTRY)
        self.end = self.seek - size

    def flipped(self, bit: int) -> bytes:
        at = bit // 8
        return self.data[:at] + bytes((self.data[at] ^ 1 << bit % 8,)) + self.data[at + 1 :]


@pytest.fixture(scope="module")
def file(states: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[File]:
    folder = tmp_path_factory.mktemp("vmz")
    made = Guests(folder, states)
    try:
        source = made.running()
        done = shell("vm-dump -q a.qmp | vm-compress > s.vmz", folder)
        assert (done.status, done.err) == (0, "")
        stood = source.count() or 0
    finally:
        made.end()
    yield File((folder / "s.vmz").read_bytes(), stood)


# There and back


@pytest.mark.parametrize(
    "line",
    [
        "vm-restore b.qmp < s.vmz",
        "cat s.vmz | vm-restore b.qmp",
        "vm-restore --from 'cat s.vmz' b.qmp",
        "vm-compress -d s.vmz | vm-restore b.qmp",
        "cat s.vmz | vm-compress -d | vm-restore b.qmp",
        "zstd -qdc s.vmz | vm-restore b.qmp",
    ],
)
def test_there_and_back(line: str, guests: Guests, work: Path, file: File) -> None:
    (work / "s.vmz").write_bytes(file.data)
    guest = guests.waiting()
    done = shell(line, work)
    assert (done.status, done.err) == (0, "")
    went_on(file.stood, guest)


def test_while_it_runs_and_without_a_file_between(guests: Guests, work: Path) -> None:
    source, guest = guests.running(), guests.waiting()
    done = shell("vm-dump -q a.qmp | vm-compress | vm-restore b.qmp", work)
    assert (done.status, done.err) == (0, "")
    went_on(source.count() or 0, guest)


def test_a_disk_that_is_full_leaves_the_guest_as_it_was(guests: Guests, work: Path) -> None:
    source = guests.running()
    done = shell("vm-dump -q --to 'vm-compress > /dev/full' a.qmp", work)
    assert done.status == 1, done.err
    as_it_was(source)


def test_typed_in_the_monitor(guests: Guests, work: Path) -> None:
    stood = saved_in_the_monitor(guests, f"vm-compress > {work}/s.vmz")
    guest = guests.start("b", incoming=f"exec:vm-compress -d < {work}/s.vmz")
    guest.wait_status("paused")
    goes_on(guests, guest, stood)


def test_saved_in_the_monitor_and_restored_by_us(guests: Guests, work: Path) -> None:
    """And what the monitor made is proven, and has an index."""
    stood = saved_in_the_monitor(guests, f"vm-compress > {work}/s.vmz")
    done = shell("vm-verify s.vmz && vm-compress --test s.vmz && vm-compress --list s.vmz", work)
    assert done.status == 0, done.err
    guest = guests.waiting()
    assert shell("vm-restore b.qmp < s.vmz", work).status == 0
    assert guest.status() == "paused"
    goes_on(guests, guest, stood)


@pytest.mark.parametrize("source", ["vm-verify --against b.qmp s.vmz", "cat s.vmz | vm-verify --against b.qmp"])
def test_against_one_with_more_vcpus(source: str, guests: Guests, work: Path, file: File) -> None:
    (work / "s.vmz").write_bytes(file.data)
    guest = guests.waiting(extra=["-smp", "2"])
    done = shell(source, work)
    assert (done.status, done.out) == (4, b"")
    assert "the state has 1 vCPUs, the guest at b.qmp has 2" in done.err
    assert "start the guest with -smp 1" in done.err
    still_waits(guest)
    guest.end()
    guest = guests.waiting()
    done = shell(source, work)
    assert (done.status, done.out, done.err) == (0, b"", "")
    still_waits(guest)


def middle(data: bytes) -> bytes:
    """The same, with a flipped bit in a frame of RAM."""
    every = frames(data)
    frame = every[len(every) // 2]
    return flipped(data, 4 * (frame.at + frame.end))


def test_from_a_file_a_misfit_is_seen_before_ram_is_read(guests: Guests, work: Path, file: File) -> None:
    guest = guests.waiting(extra=["-smp", "2"])
    (work / "s.vmz").write_bytes(middle(file.data))
    done = shell("vm-verify --against b.qmp s.vmz", work)
    assert done.status == 4, done.err
    assert "the state has 1 vCPUs, the guest at b.qmp has 2" in done.err
    assert shell("cat s.vmz | vm-verify --against b.qmp", work).status == 3
    still_waits(guest)


def test_the_index_says_what_the_whole_file_says(work: Path, file: File) -> None:
    (work / "s.vmz").write_bytes(file.data)
    lines = ("vm-inspect --json s.vmz", "vm-inspect --json --whole s.vmz", "cat s.vmz | vm-inspect --json")
    quick, whole, piped = (json.loads(shell(line, work).out) for line in lines)
    assert piped == whole
    assert sum(block.pop("duplicate") for block in whole["blocks"]) > 0
    assert {block.pop("duplicate") for block in quick["blocks"]} == {None}
    assert quick == whole
    # Of RAM nothing is read for it.
    (work / "s.vmz").write_bytes(middle(file.data))
    assert shell(lines[0], work).status == 0
    assert [shell(line, work).status for line in lines[1:]] == [3, 3]


# Damage


def refused(done: Done, what: str) -> None:
    assert done.status == 3, f"{what}: {done.text}{done.err}"
    assert done.err.startswith("vm-restore: error: "), f"{what}: {done.err}"
    assert "Traceback" not in done.err


def at_the_end(file: File) -> Iterator[tuple[str, bytes]]:
    """What a look at the end of a file tells: cuts, bits in the end record, and where the seek table points at it."""
    chance, size = random.Random(SEED), len(file.data)
    for at in (size - 1, size - SEEK_END, file.seek, file.seek - 1, file.end + 8, file.end, size // 2, 21):
        yield f"cut at {at}", file.data[:at]
    spans = [(file.end, file.seek)] * 6 + [(file.seek, file.seek + 8), (size - SEEK_END, size)]
    # Of the entry of the end record its size is looked at.
    spans.append((size - SEEK_END - SEEK_ENTRY, size - SEEK_END - SEEK_ENTRY + 4))
    for begin, end in spans:
        bit = chance.randrange(8 * begin, 8 * end)
        yield f"bit {bit}", file.flipped(bit)
    yield "not judged", file.flipped(8 * FLAGS)
    yield "another version", file.flipped(8 * 11 + 1)
    yield "a byte behind", file.data + b"\0"
    yield "twice", file.data + file.data


def test_nothing_is_loaded_of_a_file_that_is_not_whole(guests: Guests, work: Path, file: File) -> None:
    """The damage is found before QEMU gets a byte, and the guest takes the whole file after that."""
    guest, count = guests.waiting(), 0
    for what, data in at_the_end(file):
        (work / "bad.vmz").write_bytes(data)
        if what == "twice":
            # Its end looks good, but is not that of the first file.
            assert File(data).end > file.end
        refused(shell("vm-restore b.qmp < bad.vmz", work), what)
        still_waits(guest)
        count += 1
    assert count >= 20
    assert guest.count() is None
    (work / "s.vmz").write_bytes(file.data)
    assert shell("vm-restore b.qmp < s.vmz", work).status == 0
    assert guest.running()


def in_the_middle(file: File) -> Iterator[tuple[str, bytes]]:
    chance = random.Random(SEED)
    # The last frames have the devices.
    for back in (100, 1000, 20_000):
        bit = 8 * (file.end - back) + chance.randrange(8)
        yield f"bit {bit}", file.flipped(bit)
    yield "cut at the end record", file.data[: file.end]
    yield "cut in the last frame", file.data[: file.end - 50]
    yield "cut in the end record", file.data[: file.seek - 5]
    yield "cut in the seek table", file.data[:-1]
    yield "seek table", file.flipped(8 * (file.seek + 30))
    yield "half", file.flipped(8 * (file.end // 2))
    yield "a byte behind", file.data + b"\0"
    parts = groups(file.data)
    for what, order in (("left out", [0, 1, 3]), ("doubled", [0, 1, 1, 2, 3]), ("swapped", [0, 2, 1, 3])):
        yield (
            f"a group {what}",
            b"".join([file.data[:20], *(parts[n] for n in order), *parts[4:], file.data[file.end :]]),
        )


@pytest.mark.parametrize(
    "line",
    ["vm-restore b.qmp < bad.vmz", "cat bad.vmz | vm-restore b.qmp", "vm-compress -d bad.vmz | vm-restore b.qmp"],
)
def test_what_is_damaged_within_never_runs(line: str, guests: Guests, work: Path, file: File) -> None:
    target = guests.waiting()
    for what, data in in_the_middle(file):
        (work / "bad.vmz").write_bytes(data)
        done = shell(f'{line}; echo "${{PIPESTATUS[@]}}"', work)
        assert done.text.split()[-1] == "3", f"{what}: {done.text}{done.err}"
        assert "Traceback" not in done.err
        never_ran(target)
        if used_up(target):
            target.end()
            target = guests.waiting()
    (work / "bad.vmz").write_bytes(file.data)
    assert shell(line, work).status == 0
    assert target.running()


def test_qemu_itself_does_not_run_what_is_damaged(guests: Guests, work: Path, file: File) -> None:
    """With `-incoming exec:` nobody stands between, so that `vm-compress -d` has to keep back what would start it."""
    for number, data in enumerate((file.data[: file.end], file.data[:-1], file.flipped(8 * (file.end - 100)))):
        (work / "bad.vmz").write_bytes(data)
        guest = Guest(work, f"g{number}", incoming=f"exec:vm-compress -d < {work}/bad.vmz")
        try:
            guest._spawn()
            guest.wait_gone(60)
            assert guest.count() is None
        finally:
            guest.end()


# A guest with many vCPUs: more than a megabyte stands behind the mark that lets it run


def test_200_vcpus(work: Path) -> None:
    state, mark = saved_many(work)
    assert shell("vm-compress -q s > s.vmz && cat s.vmz | vm-compress -d | cmp - s", work).status == 0
    file = File((work / "s.vmz").read_bytes())
    for at in (file.end, file.end + 8, file.seek, len(file.data) - 1):
        (work / "bad.vmz").write_bytes(file.data[:at])
        done = shell("cat bad.vmz | vm-compress -d > out", work)
        assert done.status == 3, done.err
        assert "truncated" in done.err
        out = os.path.getsize(work / "out")
        # All but what is held, which has the mark in it.
        assert 10 * MIB < out <= len(state) - HOLD < mark
        assert state.startswith((work / "out").read_bytes())
