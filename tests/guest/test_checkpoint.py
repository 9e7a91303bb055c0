"""vm-dump --disks and vm-restore --disks: RAM and disks of one instant, and the way back to it."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, Guests, run, shell
from vm import Guest, disk_counts, fsck, until

from guest.judge import as_it_was
from guest.test_failure import dumper, end, start
from guest.test_restore import SMALL

MODES = ["overlay", "internal"]
SAVE = "vm-dump -q {how} --disks {tag} --disks-mode {mode} --manifest {tag}.json --to 'vm-compress > {tag}.vmz' a.qmp"


def save(work: Path, tag: str, how: str = "--snapshot", mode: str = "overlay") -> Done:
    return shell(SAVE.format(how=how, tag=tag, mode=mode), work)


def images(guest: Guest) -> list[str]:
    """What it writes into, and all below."""
    image: dict[str, Any] | None = next(
        entry["inserted"]["image"] for entry in guest.cmd("query-block") if entry.get("inserted")
    )
    found = []
    while image:
        found.append(Path(image["filename"]).name)
        image = image.get("backing-image")
    return found


def restore(work: Path, guest: Guest, tag: str, *options: str) -> Done:
    command = f"vm-restore --disks {tag}.json {shlex.join(options)} -- {shlex.join(guest.args)} < {tag}.vmz"
    return shell(command, work)


def gone(work: Path, guest: Guest) -> None:
    """One that vm-restore has started."""
    shell(f"pkill -9 -f '{guest.path('qmp')}'", work)
    until(lambda: shell(f"pgrep -f '{guest.path('qmp')}'", work).status == 1, 20, "it has ended")


def consistent(image: Path, least: int) -> None:
    """The counter of RAM and that of the disk never parted, and the file system is clean; it tells before it writes."""
    status, said = fsck(image)
    assert status == 0, said
    counts = disk_counts(image)
    assert counts == list(range(1, len(counts) + 1))
    assert len(counts) >= least - 1


@pytest.mark.parametrize("how", ["--snapshot", "--stop --after running"])
@pytest.mark.parametrize("mode", MODES)
def test_to_the_instant_and_back(guests: Guests, work: Path, disk: Path, mode: str, how: str) -> None:
    source = guests.with_disk(disk)
    source.wait_count(5)
    done = save(work, "t1", how, mode)
    assert done.status == 0, done.err
    stood = source.count() or 0
    source.wait_count(stood + 5)
    as_it_was(source)
    assert images(source) == (["disk.t1.qcow2", "disk.qcow2"] if mode == "overlay" else ["disk.qcow2"])
    found = json.loads((work / "t1.json").read_text())
    assert (found["tag"], found["mode"], found["run"]) == ("t1", mode, True)
    assert found["disks"][0]["image"] == str(disk.resolve())
    assert found["command"][1 - len(source.args) :] == source.args[1:]
    assert [card["mac"] for card in found["nics"]] == ["52:54:00:00:00:01"]
    source.end()
    target = Guest(work, "b", disk=disk)
    try:
        if mode == "internal":
            done = restore(work, target, "t1")
            assert done.status == 4
            assert "disk.qcow2 was written since" in done.err
            assert "--discard-writes" in done.err
        done = restore(work, target, "t1", *(["--discard-writes"] if mode == "internal" else []))
        assert (done.status, done.err) == (0, "")
        assert done.text == "52:54:00:00:00:01 -\n"
        target.wait_count(stood + 8)
        assert target.counts()[0] <= stood + 2
        assert target.errors() == 0
    finally:
        gone(work, target)
    if mode == "overlay":
        consistent(work / "disk.t1.qcow2", stood + 5)
        consistent(work / "disk.t1-1.qcow2", stood + 8)
    else:
        consistent(disk, stood + 8)


def test_lazily_and_twice(guests: Guests, work: Path, disk: Path) -> None:
    """A frozen image serves as often as one likes."""
    source = guests.with_disk(disk)
    source.wait_count(5)
    assert save(work, "t1").status == 0
    stood = source.count() or 0
    source.end()
    for number, options in ((1, ["--lazy"]), (2, ["--lazy", "--detach"])):
        target = Guest(work, f"b{number}", disk=disk)
        try:
            done = restore(work, target, "t1", *options)
            assert (done.status, done.err) == (0, "")
            target.wait_count(stood + 5)
        finally:
            gone(work, target)
        consistent(work / f"disk.t1-{number}.qcow2", stood + 5)


def test_disks_of_all_kinds(guests: Guests, work: Path, disk: Path) -> None:
    """Raw ones and those without a name are frozen, what cannot be written is left alone."""
    shell("truncate -s 1m raw; qemu-img create -q -f qcow2 named.qcow2 1m; truncate -s 1m ro; mkdir d; cp ro d", work)
    extra = ["-drive", f"if=virtio,format=raw,file={work}/raw"]
    extra += ["-blockdev", f"file,filename={work}/named.qcow2,node-name=f", "-blockdev", "qcow2,file=f,node-name=n"]
    extra += ["-device", "virtio-blk-pci,drive=n", "-drive", f"if=virtio,format=raw,readonly=on,file={work}/ro"]
    extra += ["-device", "virtio-scsi-pci", "-device", "scsi-cd"]
    source = guests.booted("a", disk=disk, extra=extra)
    source.wait_count(3)
    done = save(work, "t1", "--snapshot", "internal")
    assert done.status == 1
    assert "raw, which has no internal snapshots" in done.err
    assert save(work, "t1").status == 0
    made = ["disk.t1.qcow2", "named.t1.qcow2", "raw.t1.qcow2"]
    assert sorted(path.name for path in work.glob("*.t1.qcow2")) == made
    stood = source.count() or 0
    source.end()
    target = Guest(work, "b", disk=disk, extra=extra)
    try:
        done = restore(work, target, "t1", "-v")
        assert done.status == 0, done.err
        for name in ("disk", "raw", "named"):
            assert f"the guest writes into {work.resolve()}/{name}.t1-1.qcow2" in done.err
        target.wait_count(stood + 3)
        assert target.errors() == 0
    finally:
        gone(work, target)


def nothing_happened(work: Path, source: Guest, stood: int) -> None:
    source.wait_count(stood + 5)
    as_it_was(source)
    until(lambda: images(source) == ["disk.qcow2"], 20, "it writes where it did")
    until(lambda: not list(work.glob("disk.*.qcow2")), 20, "no overlay is left")
    assert "disk error" not in source.path("serial").read_text()
    source.end()
    said = shell("qemu-img snapshot -l disk.qcow2", work).text
    assert "t1" not in said
    consistent(work / "disk.qcow2", stood + 5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["--snapshot", "--stop"])
def test_a_sink_that_fails(guests: Guests, work: Path, disk: Path, how: str, mode: str) -> None:
    source = guests.with_disk(disk)
    stood = source.wait_count(5)
    sink = f"vm-dump -q {how} --disks t1 --disks-mode {mode} --manifest m --to 'cat > s; sleep 1; exit 3' a.qmp"
    done = shell(sink, work)
    assert done.status == 1, done.err
    assert "the guest runs on" in done.err
    assert not (work / "m").exists()
    nothing_happened(work, source, stood)


def test_a_manifest_that_cannot_be_written(guests: Guests, work: Path, disk: Path) -> None:
    source = guests.with_disk(disk)
    stood = source.wait_count(5)
    done = shell("vm-dump -q --snapshot --disks t1 --manifest no/m a.qmp > s", work)
    assert done.status == 1
    assert "cannot create no/m" in done.err
    nothing_happened(work, source, stood)


@pytest.fixture
def full(work: Path) -> Iterator[Path]:
    """An image that cannot grow any more."""
    folder = work / "full"
    folder.mkdir()
    script = "mount -t tmpfs -o size=1m none full && qemu-img create -q -f qcow2 full/second.qcow2 64m"
    assert shell(f"{script}; cat /dev/zero > full/rest; true", work).status == 0
    yield folder / "second.qcow2"
    run("umount", "-l", folder)


@pytest.mark.root
def test_a_failure_in_the_middle(guests: Guests, work: Path, disk: Path, full: Path) -> None:
    """Of two disks one has no room for a snapshot: neither gets one, nor does the guest stay stopped."""
    source = guests.with_disk(disk, extra=["-drive", f"if=none,file={full}"])
    stood = source.wait_count(5)
    done = save(work, "t1", "--snapshot", "internal")
    assert done.status == 1
    assert "No space left" in done.err
    nothing_happened(work, source, stood)


def test_a_snapshot_that_is_there(guests: Guests, work: Path, disk: Path) -> None:
    shell("qemu-img create -q -f qcow2 second.qcow2 1m; qemu-img snapshot -c t1 second.qcow2", work)
    source = guests.with_disk(disk, extra=["-drive", f"if=none,file={work}/second.qcow2"])
    stood = source.wait_count(5)
    done = save(work, "t1", "--snapshot", "internal")
    assert done.status == 1
    assert "has a snapshot 't1' already" in done.err
    nothing_happened(work, source, stood)
    assert "t1" in shell("qemu-img snapshot -l second.qcow2", work).text


@pytest.mark.parametrize("how", ["--snapshot", "--stop"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle(guests: Guests, work: Path, disk: Path, how: str, number: int) -> None:
    source = guests.with_disk(disk)
    stood = source.wait_count(5)
    process = start(work, f"vm-dump -q {how} --disks t1 --manifest m --speed 20m a.qmp > s")
    try:
        until(lambda: "disk.t1.qcow2" in images(source), 20, "the disk is frozen")
        os.kill(dumper(process.pid), number)
        process.wait(60)
    finally:
        end(process)
    until(lambda: source.status() == "running", 30, "it runs on")
    until(lambda: not [c for c in source.cmd("query-migrate-capabilities") if c["state"]], 30, "all is put back")
    # Which rate it was told before is known to nobody now.
    source.cmd("migrate-set-parameters", **{"max-bandwidth": 128 << 20})
    nothing_happened(work, source, stood)


def test_what_is_refused(guests: Guests, work: Path, disk: Path) -> None:
    source = guests.with_disk(disk)
    (work / "disk.t1.qcow2").write_text("mine")
    done = save(work, "t1")
    assert done.status == 1
    assert "disk.t1.qcow2 is there already" in done.err
    assert (work / "disk.t1.qcow2").read_text() == "mine"
    for options, words in (
        ("--disks t1", "--disks goes with --snapshot or --stop"),
        ("--snapshot-or-live --disks t1", "--disks goes with --snapshot or --stop"),
        ("--snapshot --manifest m", "go with --disks"),
        ("--snapshot --disks t1 --manifest -", "needs a file of its own"),
        ("--snapshot --disks t1 --manifest m -o m", "needs a file of its own"),
        ("--disks-commit m -n", "does not go with --dry-run"),
        ("--snapshot --disks a/b", "cannot be a tag"),
        ("--snapshot --disks t1 --disks-mode x", "expected overlay or internal"),
    ):
        done = shell(f"vm-dump {options} a.qmp > s", work)
        assert done.status == 2, done.err
        assert words in done.err
    as_it_was(source)


def test_a_guest_with_temporary_disks(guests: Guests, work: Path, disk: Path) -> None:
    guests.with_disk(disk, extra=["-snapshot"])
    done = save(work, "t1")
    assert done.status == 1
    assert "was opened with -snapshot" in done.err


def test_what_a_restore_refuses(guests: Guests, work: Path, disk: Path) -> None:
    source = guests.with_disk(disk)
    source.wait_count(3)
    assert save(work, "t1").status == 0
    assert save(work, "t2").status == 0
    assert images(source) == ["disk.t2.qcow2", "disk.t1.qcow2", "disk.qcow2"]
    source.end()
    before = sorted(path.name for path in work.glob("*.qcow2"))
    target = Guest(work, "b", disk=disk)
    other = Guest(work, "b", disk=work / "other.qcow2")
    command = f"-- {shlex.join(target.args)}"
    for script, status, words in (
        (f"vm-restore --disks t1.json {command} < t2.vmz", 4, "not the one of t1.json"),
        (f"vm-restore --lazy --disks t1.json {command} < t2.vmz", 4, "not the one of t1.json"),
        (f"vm-restore --disks t1.json {command} -m 300 < t1.vmz", 4, "RAM block"),
        (f"vm-restore --disks t1.json -- {shlex.join(other.args)} < t1.vmz", 2, "not among the arguments of QEMU"),
        ("vm-restore --disks t1.json a.qmp < t1.vmz", 2, "for a QEMU to be started"),
        (f"vm-restore --discard-writes {command} < t1.vmz", 2, "goes with --disks"),
        (f"vm-restore --disks t1.vmz {command} < t1.vmz", 3, "no manifest of a checkpoint"),
        (f"vm-restore --disks no.json {command} < t1.vmz", 1, "cannot read no.json"),
        (f"touch disk.qcow2; vm-restore --disks t1.json {command} < t1.vmz", 4, "was written since.*stay as it was"),
        (f"rm disk.t1.qcow2; vm-restore --disks t2.json {command} < t2.vmz", 1, "cannot read the disk"),
    ):
        done = shell(script, work)
        assert done.status == status, (script, done.err)
        assert pytest.importorskip("re").search(words, done.err), done.err
    assert sorted(path.name for path in work.glob("*.qcow2")) == [name for name in before if name != "disk.t1.qcow2"]


def test_a_state_is_restored_once(guests: Guests, work: Path) -> None:
    """The state of a move, whose disks went on."""
    guests.dumped(work / "s", **SMALL)
    assert shell("vm-compress -o s.vmz s", work).status == 0
    for name, how in (("b", ""), ("c", "--lazy")):
        guests.waiting(name, **SMALL)
        done = shell(f"vm-restore --used-states notes-{name} {how} {name}.qmp < s.vmz", work)
        assert done.status == 0, done.err
        second = guests.waiting(f"{name}2", **SMALL)
        for again in ("", "--lazy"):
            done = shell(f"vm-restore --used-states notes-{name} {again} {name}2.qmp < s.vmz", work)
            assert done.status == 4
            assert "a guest was made of this state already (20" in done.err
            assert f"take the line out of notes-{name}" in done.err
            if again == "":
                second.end()
                second = guests.waiting(f"{name}2", **SMALL)
        assert second.status() == "inmigrate"


@pytest.mark.parametrize(
    ("mode", "count"), [("overlay", 6), ("internal", 3), pytest.param("overlay", 20, marks=pytest.mark.more)]
)
def test_a_chain_is_merged(guests: Guests, work: Path, disk: Path, mode: str, count: int) -> None:
    """Many checkpoints, one after the other, then taken away one by one; the guest never stops for it."""
    source = guests.with_disk(disk)
    source.wait_count(3)
    for number in range(count):
        done = shell(
            f"vm-dump -q --snapshot --disks t{number} --disks-mode {mode} --manifest m{number} a.qmp > s", work
        )
        assert done.status == 0, done.err
    assert len(images(source)) == (count + 1 if mode == "overlay" else 1)
    if mode == "overlay":
        done = shell("vm-dump --disks-commit m3 a.qmp", work)
        assert done.status == 1
        assert "later checkpoints go first" in done.err
    for number in reversed(range(count)):
        done = shell(f"vm-dump --disks-commit m{number} a.qmp", work)
        assert (done.status, done.out, done.err) == (0, b"", "")
    nothing_happened(work, source, source.count() or 0)
    assert shell("qemu-img snapshot -l disk.qcow2", work).text == ""
