"""Checkpoints by the hundred under load: RAM and disk of each are of one instant.

    .venv/bin/pytest tests/long/check_checkpoint.py

The guest counts as fast as it can, each count in its RAM, then on its disk with a flush.  A guest of each checkpoint
goes on for a while; then the counts on its disk have neither a gap nor one twice, and its file system is clean.
ROUNDS says how many (100 unless told).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Guests, shell
from guest.test_checkpoint import MODES, consistent, gone, restore, save
from guest.test_snapshot import its_connection_does_not_break
from vm import MAC, Guest, until

ROUNDS = int(os.environ.get("ROUNDS") or 100)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("mode", MODES)
def test_ram_and_disk_are_of_one_instant(guests: Guests, work: Path, disk: Path, mode: str) -> None:
    source = guests.booted("a", disk=disk, append="tick=0.001 dirty=16")
    for number in range(ROUNDS // len(MODES)):
        stood = source.wait_count((source.count() or 0) + 5)
        done = save(work, "t", "--snapshot" if number % 4 else "--stop --after running", mode)
        assert done.status == 0, done.err
        kept, options = disk, ["--lazy"] if number % 2 else []
        if mode == "internal":
            # The guest writes on; it is a copy of its disk that is put back.
            kept, options = work / "kept.qcow2", [*options, "--discard-writes"]
            source.cmd("stop")
            assert shell("cp disk.qcow2 kept.qcow2; sed -i s/disk.qcow2/kept.qcow2/ t.json", work).status == 0
            source.cmd("cont")
        target = Guest(work, "b", disk=kept)
        try:
            done = restore(work, target, "t", *options)
            assert (done.status, done.err) == (0, "")
            until(target.counts, 20, "it counts")
            assert target.counts()[0] in range(stood, stood + 1000)
            target.wait_count(target.counts()[0] + 10)
            assert target.errors() == 0
        finally:
            gone(work, target)
        written = work / ("disk.t-1.qcow2" if mode == "overlay" else "kept.qcow2")
        consistent(written, stood + 5)
        written.unlink()
        if mode == "internal":
            assert shell("sed -i s/kept.qcow2/disk.qcow2/ t.json", work).status == 0
        done = shell("vm-dump --disks-commit t.json a.qmp", work)
        assert done.status == 0, done.err
        assert source.running()
        assert source.errors() == 0


def test_twenty_in_a_row(guests: Guests, work: Path) -> None:
    """Each of them is restored; the guest's connection never breaks."""
    its_connection_does_not_break(guests, work, 20)
    seen = []
    net = ["-netdev", "user,id=n", "-device", f"virtio-net-pci,netdev=n,mac={MAC},romfile="]
    for number in range(1, 21):
        with guests.waiting(f"t{number}", net=net) as target:
            done = shell(f"vm-restore t{number}.qmp < {number}.vmz", work)
            assert done.status == 0, done.err
            until(target.counts, 20, "it counts")
            assert target.running()
            target.wait_sum()
            seen.append(target.counts()[0])
    assert seen == sorted(seen)
    assert len(set(seen)) > 10
