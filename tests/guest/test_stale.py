"""No page of a guest is older than the others: a guest that writes all the time is saved, restored and migrated live.

QEMU before 9.0 loses such pages under TCG, so that the guest is paused first there; the commands run as one types them.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import AS_TYPED, LIVE, Done, Guests, shell
from vm import Guest, made_once

HERE = Path(__file__).parent
# Enough rounds for each page to be sent again several times, and little time in each.
SLOWLY = "--speed 40m --downtime 1"
PAUSED = "was paused first, since QEMU 7"


@pytest.fixture(scope="session")
def walk(states: Path) -> Path:
    """An initramfs of one static program."""
    made = states / "walk.gz"
    with made_once(made):
        if not made.exists():
            folder = states / "walk"
            folder.mkdir()
            for command in (
                f"gcc -static -O2 -o init {HERE}/walk.c",
                "mkdir dev && mknod dev/console c 5 1",
                f"printf '%s\\n' init dev dev/console | cpio --quiet -o -H newc | gzip > {made}",
            ):
                subprocess.run(["bash", "-ec", command], cwd=folder, check=True, timeout=120)
    return made


class Walks(Guests):
    """Guests of that program."""

    def walking(self, name: str, initrd: Path, incoming: str | None = None) -> Guest:
        machine: dict[str, Any] = {"mem": 128, "net": [], "extra": ["-initrd", str(initrd), "-cpu", "max"]}
        if incoming:
            return self.start(name, incoming=incoming, **machine)
        guest = self.running(name, **machine)
        guest.wait_count((guest.count() or 0) + 2)
        return guest


@pytest.fixture
def walks(work: Path, states: Path) -> Iterator[Walks]:
    made = Walks(work, states)
    yield made
    made.end()


def typed(script: str, folder: Path, status: int = 0) -> Done:
    done = shell(script, folder, env=AS_TYPED)
    assert done.status == status, done.err
    return done


def is_sound(guest: Guest, seconds: float = 0.5) -> None:
    """It goes on, and has found no old page."""
    assert guest.running(), guest.path("serial").read_text()[-300:]
    time.sleep(seconds)
    assert "stale" not in guest.path("serial").read_text(errors="replace")
    assert guest.running()


def saved_live(walks: Walks, walk: Path) -> None:
    """One live dump and its restore, with new guests."""
    source = walks.walking("a", walk)
    waiting = walks.walking("b", walk, "defer")
    done = typed(f"vm-dump {SLOWLY} a.qmp > s; vm-restore -q --run b.qmp < s", walks.folder)
    assert (PAUSED in done.err) == bool(LIVE)
    if LIVE:
        assert "vm-restore --run" in done.err
        assert "--live-anyway" in done.err
    is_sound(waiting)
    for guest in (source, waiting):
        guest.end()


def migrated_live(walks: Walks, walk: Path) -> None:
    """One migration over a link at its defaults: the guest runs there as it ran here, paused first or not."""
    source = walks.walking("a", walk)
    waiting = walks.walking("b", walk, "defer")
    done = typed("vm-migrate a.qmp 'link:vm-restore --receive b.qmp'", walks.folder)
    assert (PAUSED in done.err) == bool(LIVE)
    is_sound(waiting)
    for guest in (source, waiting):
        guest.end()


@pytest.mark.root
def test_a_live_dump_has_no_old_page(walks: Walks, walk: Path) -> None:
    for _ in range(2):
        saved_live(walks, walk)


@pytest.mark.root
def test_a_live_migration_has_no_old_page(walks: Walks, walk: Path) -> None:
    for _ in range(2):
        migrated_live(walks, walk)


@pytest.mark.root
def test_a_dump_that_fails_has_the_guest_run_on(walks: Walks, walk: Path) -> None:
    """Also where it was paused first: refused by its sink, cancelled, killed."""
    guest = walks.walking("a", walk)
    typed("vm-dump --to 'head -c 100000 > /dev/null; exit 3' a.qmp", walks.folder, 1)
    is_sound(guest, 0)
    typed("vm-dump --speed 1m a.qmp > /dev/null & sleep 1; vm-cancel a.qmp; wait $!", walks.folder, 1)
    is_sound(guest, 0)
    typed("vm-dump --speed 1m a.qmp > /dev/null & sleep 1; kill -KILL $!; wait $!", walks.folder, 137)
    guest.wait_status("running", timeout=20)
    is_sound(guest, 0)


@pytest.mark.root
def test_a_migration_that_fails_has_the_guest_run_on(walks: Walks, walk: Path) -> None:
    guest = walks.walking("a", walk)
    walks.walking("b", walk, "defer")
    typed("vm-migrate --speed 1m a.qmp 'link:timeout -s KILL 1 vm-restore --receive b.qmp'", walks.folder, 1)
    is_sound(guest, 0)
    walks.walking("c", walk, "defer")
    move = "vm-migrate --speed 1m a.qmp 'link:vm-restore --receive c.qmp'"
    typed(f"{move} & sleep 1; kill -KILL $!; wait $!", walks.folder, 137)
    guest.wait_status("running", timeout=20)
    is_sound(guest, 0)


@pytest.mark.root
def test_where_nobody_can_resume_it_there_it_is_refused(walks: Walks, walk: Path) -> None:
    guest = walks.walking("a", walk)
    uris = (f"unix:{walks.folder}/no", "tcp:127.0.0.1:9", "'exec:cat > /dev/null'", "fd:9 9> /dev/null")
    for uri in uris:
        done = shell(f"vm-migrate a.qmp {uri}", walks.folder, env=AS_TYPED)
        assert (done.status == 2) == bool(LIVE), done.err
        assert ("--live-anyway" in done.err) == bool(LIVE)
        if not LIVE:
            guest.cmd("cont")
        is_sound(guest, 0)
    done = shell("vm-migrate --postcopy a.qmp 'link:vm-restore --receive b.qmp'", walks.folder, env=AS_TYPED)
    assert done.status == (2 if LIVE else 1), done.err


@pytest.mark.root
def test_one_that_is_paused_already_needs_nothing(walks: Walks, walk: Path) -> None:
    walks.walking("a", walk).cmd("stop")
    waiting = walks.walking("b", walk, f"unix:{walks.folder}/in")
    done = typed("vm-migrate a.qmp unix:in", walks.folder)
    assert PAUSED not in done.err
    waiting.wait_status("paused")
