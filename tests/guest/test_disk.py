"""A guest with a writable qcow2 on a path that both sides see: one writes, never both, and it stays clean."""

from pathlib import Path

from conftest import Guests, shell
from vm import disk_counts, fsck


def test_after_a_failed_restore_the_source_goes_on_writing(guests: Guests, work: Path, disk: Path) -> None:
    source = guests.with_disk(disk)
    source.wait_count(5)
    guest = guests.waiting("b", disk=disk, mem=384)
    # One pipeline: what the far end refuses is not given away.
    done = shell("vm-dump --to 'vm-restore b.qmp' a.qmp", work)
    assert done.status == 1
    assert "'pc.ram' has" in done.err
    assert "the guest runs on" in done.err
    before = source.wait_advance()
    source.wait_count(before + 10)
    assert source.errors() == 0
    assert guest.status() == "inmigrate"
    source.end()
    guest.end()
    status, said = fsck(disk)
    assert status == 0, said
    assert disk_counts(disk)[-1] >= before


def test_a_loaded_guest_does_not_take_the_images_of_its_source(guests: Guests, work: Path, disk: Path) -> None:
    """The destination has all but the last word; then its sink fails, and the source writes on."""
    source = guests.with_disk(disk)
    source.wait_count(5)
    guest = guests.waiting("b", disk=disk)
    done = shell("vm-dump --to 'vm-restore --paused b.qmp && exit 3' a.qmp", work)
    assert done.status == 1
    assert guest.status() == "paused"
    before = source.wait_advance()
    source.wait_count(before + 10)
    assert source.errors() == 0
    done = shell("vm-cont b.qmp", work)
    assert done.status == 1
    assert "lock" in done.err
    assert source.running()
    assert source.errors() == 0
    guest.end()
    source.end()
    assert fsck(disk)[0] == 0


def test_after_a_good_one_only_the_destination_can(guests: Guests, work: Path, disk: Path) -> None:
    source = guests.with_disk(disk)
    source.wait_count(5)
    guest = guests.waiting("b", disk=disk)
    assert shell("vm-dump -q -o s a.qmp && vm-restore b.qmp < s", work).status == 0
    stood = source.count() or 0
    guest.wait_count(stood + 10)
    assert source.status() == "postmigrate"
    assert source.standing()
    done = shell("vm-cont a.qmp", work)
    assert done.status == 1
    assert source.standing()
    last = guest.wait_advance()
    assert guest.errors() == 0
    source.end()
    guest.wait_count(last + 5)
    guest.end()
    status, said = fsck(disk)
    assert status == 0, said
    written = disk_counts(disk)
    assert written == sorted(set(written))
    assert written[-1] >= last


def test_a_locked_image_is_status_5_and_the_way_out_works(guests: Guests, work: Path, disk: Path) -> None:
    """The source runs on when the restored one would run: loaded, but paused, and told so."""
    source = guests.with_disk(disk)
    source.wait_count(5)
    assert shell("vm-dump -q --after running -o s a.qmp", work).status == 0
    guest = guests.waiting("b", disk=disk)
    done = shell("vm-restore b.qmp < s", work)
    assert done.status == 5
    assert "lock" in done.err
    assert "vm-cont b.qmp" in done.err
    assert guest.status() == "paused"
    assert source.running()
    assert source.errors() == 0
    source.end()
    assert shell("vm-cont b.qmp", work).status == 0
    assert guest.running()
