"""The flows of the old KVM HOWTO, as they stand there and with our filters, on real guests."""

from pathlib import Path

import pytest
from conftest import Guests, shell
from vm import Guest, until

from guest.judge import ram, went_on
from guest.test_migrate import free_port
from guest.test_restore import SMALL

KEY = "me@example.org"


def monitor(guest: Guest, *lines: str) -> None:
    """Lines typed in the human monitor, the last one a `migrate`; returns when that is done."""
    for line in lines:
        guest.cmd("human-monitor-command", **{"command-line": line})
    until(lambda: guest.cmd("query-migrate")["status"] in ("completed", "failed"), 120, "the migration is over")
    assert guest.cmd("query-migrate")["status"] == "completed"


def saved_in_the_monitor(guests: Guests, command: str) -> int:
    """`stop`, then `migrate "exec:COMMAND"`; gives the count at which the guest stood."""
    source = guests.running()
    stood = typed(source, command)
    source.end()
    return stood


def typed(source: Guest, command: str) -> int:
    source.cmd("stop")
    monitor(source, "migrate_set_parameter max-bandwidth 10G", f'migrate "exec:{command}"')
    assert source.status() == "postmigrate"
    return source.count() or 0


def goes_on(guests: Guests, guest: Guest, stood: int) -> None:
    assert shell(f"vm-cont {guest.qmp}", guests.folder).status == 0
    went_on(stood, guest)


def is_the_same(guests: Guests, guest: Guest, stood: int, memory: bytes) -> None:
    """A small guest, which makes no sums, held and then running."""
    assert guest.status() == "paused"
    assert ram(guest) == memory
    assert shell(f"vm-cont {guest.qmp}", guests.folder).status == 0
    guest.wait_count(stood + 1)
    assert guest.counts()[0] in range(stood, stood + 3)


def test_gzip_in_the_monitor_and_back(guests: Guests, work: Path) -> None:
    source = guests.running(**SMALL)
    stood, memory = typed(source, f"gzip -c > {work}/STATEFILE.gz"), ram(source)
    guest = guests.waiting(**SMALL)
    assert shell("gzip -c -d STATEFILE.gz | vm-restore b.qmp", work).status == 0
    is_the_same(guests, guest, stood, memory)


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        ("gzip -c > {}/S", "gzip -c -d {}/S"),
        ("bzip2 -1 -c > {}/S", "bzip2 -d -c {}/S"),
        ("vm-compress > {}/S", "vm-compress -d < {}/S"),
        ("vm-compress > {}/S", "vm-compress -d {}/S"),
        ("vm-compress > {}/S", "zstd -q -d -c {}/S"),
    ],
)
def test_qemu_runs_the_filters_itself(guests: Guests, work: Path, pack: str, unpack: str) -> None:
    """`migrate "exec:..."` in a monitor and `-incoming "exec:..."` on a command line."""
    source = guests.running(**SMALL)
    stood, memory = typed(source, pack.format(work)), ram(source)
    guest = guests.start("b", incoming="exec:" + unpack.format(work), **SMALL)
    guest.wait_status("paused")
    is_the_same(guests, guest, stood, memory)


@pytest.mark.parametrize(("pack", "unpack"), [("gzip -c", "gzip -d -c"), ("bzip2 -1", "bzip2 -d"), ("cat", "cat")])
def test_offline_with_foreign_filters(guests: Guests, work: Path, pack: str, unpack: str) -> None:
    source = guests.running(**SMALL)
    assert shell(f"vm-dump --stop a.qmp | {pack} > F", work).status == 0
    stood, memory = source.count() or 0, ram(source)
    guest = guests.waiting(**SMALL)
    assert shell(f"{unpack} < F | vm-restore b.qmp", work).status == 0
    is_the_same(guests, guest, stood, memory)


GPG, OURS = f"gpg -q -e -r {KEY} -o {{}}/STATEFILE.gpg", f"vm-encrypt -r {KEY} > {{}}/STATEFILE.gpg"


@pytest.mark.parametrize(
    ("packed", "unpacked"),
    [
        (GPG, "vm-encrypt -d STATEFILE.gpg"),
        (OURS, "gpg -q -d STATEFILE.gpg"),
        pytest.param(GPG, "gpg -q -d STATEFILE.gpg", marks=pytest.mark.more),
        pytest.param(OURS, "vm-encrypt -d STATEFILE.gpg", marks=pytest.mark.more),
    ],
)
def test_encrypted_in_the_monitor_and_back(guests: Guests, work: Path, gnupg: Path, packed: str, unpacked: str) -> None:
    source = guests.running(**SMALL)
    stood, memory = typed(source, packed.format(work)), ram(source)
    guest = guests.waiting(**SMALL)
    done = shell(f"{unpacked} | vm-restore b.qmp", work)
    assert done.status == 0, done.err
    is_the_same(guests, guest, stood, memory)


def test_the_main_job(guests: Guests, work: Path, gnupg: Path) -> None:
    """Saved while it runs, packed and encrypted into one file; back, announced, and the counter goes on."""
    source = guests.running()
    done = shell(f"vm-dump -q a.qmp | vm-compress | vm-encrypt -r {KEY} > s.vmz.gpg", work)
    assert (done.status, done.err) == (0, "")
    stood = source.count() or 0
    source.end()
    guest = guests.waiting()
    done = shell("vm-encrypt -d s.vmz.gpg | vm-compress -d | vm-restore b.qmp | vm-announce", work)
    assert (done.status, done.err) == (0, "")
    went_on(stood, guest)


def test_the_main_job_where_every_stage_counts(guests: Guests, work: Path, gnupg: Path) -> None:
    source = guests.running()
    done = shell(f"vm-dump --after quit --to 'vm-compress | vm-encrypt -r {KEY} > s' a.qmp", work)
    assert (done.status, done.err) == (0, "")
    source.wait_gone(10)
    stood = source.count() or 0
    guest = guests.waiting()
    done = shell("vm-restore --from 'gpg -q -d s | zstd -q -dc' b.qmp", work)
    assert (done.status, done.err) == (0, "")
    assert guest.wait_count(stood) >= stood


def test_a_forged_state_never_runs(guests: Guests, work: Path, gnupg: Path) -> None:
    guests.running()
    assert shell(f"vm-dump -q a.qmp | vm-encrypt -r {KEY} > s", work).status == 0
    with Path(work, "s").open("r+b") as file:
        file.seek(40_000_000)
        byte = file.read(1)[0]
        file.seek(40_000_000)
        file.write(bytes([byte ^ 1]))
    guest = guests.waiting()
    done = shell("vm-encrypt -d s | vm-restore b.qmp", work)
    assert done.status == 3
    assert guest.status() in ("inmigrate", "gone")
    assert guest.count() is None
    guest = guests.waiting("c")
    done = shell("vm-restore --from 'gpg -q -d s' c.qmp", work)
    assert done.status == 1
    assert guest.count() is None


def test_tcp_and_exec_as_qemu_has_them(guests: Guests, work: Path) -> None:
    """A state that QEMU sends itself over `exec:nc` arrives in a held guest, too."""
    source = guests.running()
    stood = source.count() or 0
    guest = guests.waiting()
    port = free_port()
    script = f"nc -l 127.0.0.1 {port} > pipe & cat pipe | vm-restore b.qmp & sleep 0.3; echo {source.pid}; wait %2"
    receiving = shell_in_background(f"mkfifo pipe; {script}", work)
    monitor(source, "migrate_set_parameter max-bandwidth 10G", f'migrate "exec:nc -N 127.0.0.1 {port}"')
    assert receiving.wait(60) == 0
    assert guest.wait_count(stood) >= stood
    assert guest.running()


def shell_in_background(script: str, folder: Path):  # type: ignore[no-untyped-def]
    import subprocess
    import time

    started = subprocess.Popen(["bash", "-c", script], cwd=folder, stdout=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.readline()
    time.sleep(0.1)
    return started
