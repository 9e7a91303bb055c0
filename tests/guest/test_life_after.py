"""What a guest can still do once our commands have handled it: each way, then each deed, one after the other.

A guest here has a card that can be unplugged, and an image beside it for QEMU's own snapshots.  The commands run as one
types them, without the --live-anyway that `tests/conftest.py` adds elsewhere.
"""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import AS_TYPED, LIVE, Done, shell
from vm import Guest, QmpError, saved_guest, until

CARDS = ("virtio-net-pci", "e1000e", "rtl8139")
# A way that a guest took tells how it came, and where it is; all else is as in a QEMU that nobody has touched.
TELLS = {"vmstate-arrived"}


@dataclass
class Life:
    """One guest after the other, of one card; `a` has run before, `b` waits."""

    folder: Path
    states: Path
    card: str
    started: list[Guest] = field(default_factory=list)
    background: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    rate_set: bool = False

    def machine(self, name: str) -> dict[str, Any]:
        wire = f"local.type=unix,local.path={self.folder}/{name}.net,remote.type=unix,remote.path={self.folder}/wire"
        card = f"{self.card},netdev=net0,id=card,bus=slot1,romfile="
        net = ["-device", "pcie-root-port,id=slot1,slot=1", "-netdev", f"dgram,id=net0,{wire}", "-device", card]
        return {"mem": 192, "net": net, "append": "block=4 dirty=1"}

    def running(self, name: str = "a") -> Guest:
        saved = Life(self.states, self.states, self.card)
        state = saved_guest(self.states, **saved.machine("saved"))
        guest = self._guest(name)
        guest.start(state).wait_count(1)
        return guest

    def waiting(self, name: str = "b") -> Guest:
        return self._guest(name, incoming="defer").start()

    def _guest(self, name: str, **more: Any) -> Guest:
        image = self.folder / "store.qcow2"
        if not image.exists():
            self.do(f"qemu-img create -q -f qcow2 {image} 256M")
        extra = ["-drive", f"if=none,id=store,format=qcow2,file={image}"]
        guest = Guest(self.folder, name, extra=extra, **self.machine(name), **more)
        self.started.append(guest)
        return guest

    def do(self, script: str, status: int = 0, timeout: float = 90) -> Done:
        done = shell(script, self.folder, timeout, env=AS_TYPED)
        assert done.status == status, f"{script}: {done.status}: {done.err}"
        return done

    def saved(self) -> None:
        """A state in `s`, of a guest that has ended."""
        guest = self.running()
        self.do("vm-dump -q --stop -o s a.qmp")
        guest.end()

    def end(self) -> None:
        for process in self.background:
            process.kill()
            process.wait(10)
        for guest in self.started:
            guest.end()


@pytest.fixture
def life(work: Path, states: Path, request: pytest.FixtureRequest) -> Iterator[Life]:
    made = Life(work, states, request.param)
    yield made
    made.end()


# the ways


def live(life: Life) -> Guest:
    guest = life.running()
    life.do("vm-dump -q --after running -o s a.qmp")
    return guest


def stopped(life: Life) -> Guest:
    guest = life.running()
    life.do("vm-dump -q --stop --after running -o s a.qmp")
    return guest


def snapshot(life: Life) -> Guest:
    guest = life.running()
    life.do("vm-dump --snapshot -o s a.qmp")
    return guest


def failed(life: Life) -> Guest:
    guest = life.running()
    life.do("vm-dump -q --to 'head -c 1000000 > /dev/null; exit 3' a.qmp", 1)
    return guest


def killed(life: Life) -> Guest:
    guest = life.running()
    life.rate_set = True
    life.do("vm-speed a.qmp 10m")
    life.do(f"vm-dump {LIVE} -o s a.qmp & sleep 1.5; kill -KILL $!; wait $!", 137)
    until(lambda: guest.cmd("query-migrate")["status"] == "failed", 20, "QEMU sees that its channel has ended")
    until(lambda: not _switched_on(guest), 20, "the capabilities are off again")
    until(lambda: guest.status() == "running", 20, "the guest runs")
    life.do("vm-speed a.qmp 0")
    return guest


def cancelled(life: Life) -> Guest:
    guest = life.running()
    life.waiting()
    life.rate_set = True
    life.do("vm-speed a.qmp 10m")
    move = f"vm-migrate -q {LIVE} a.qmp 'link:vm-restore --receive b.qmp'"
    life.do(f"(sleep 2; vm-cancel a.qmp) & {move}; status=$?; wait; exit $status", 1)
    life.do("vm-speed a.qmp 0")
    return guest


def eager(life: Life) -> Guest:
    life.saved()
    guest = life.waiting()
    life.do("vm-restore -q --run b.qmp < s")
    return guest


def lazy(life: Life) -> Guest:
    life.saved()
    guest = life.waiting()
    life.do("vm-compress -o s.vmz s; vm-restore -q --run --lazy b.qmp < s.vmz")
    return guest


def on_demand(life: Life) -> Guest:
    life.saved()
    guest = life.waiting()
    life.do("vm-compress -o s.vmz s")
    with (life.folder / "s.vmz").open("rb") as state, (life.folder / "words").open("wb") as words:
        command = ["vm-restore", "-q", "--run", "--lazy", "--on-demand", "b.qmp"]
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=state, stdout=null, stderr=words, cwd=life.folder, env=AS_TYPED)
    life.background.append(process)
    guest.wait_status("running")
    return guest


def over_link(life: Life) -> Guest:
    life.running()
    guest = life.waiting()
    life.do("vm-migrate -q a.qmp 'link:vm-restore --receive b.qmp'")
    return guest


def postcopy(life: Life) -> Guest:
    life.running()
    guest = life.waiting()
    life.do(f"vm-migrate -q --postcopy {LIVE} --speed 60m a.qmp 'link:vm-restore --receive b.qmp'")
    return guest


def over_unix(life: Life) -> Guest:
    life.running()
    guest = life._guest("b", incoming=f"unix:{life.folder}/in").start()
    life.do(f"vm-migrate -q {LIVE} a.qmp unix:in")
    guest.wait_status("running")
    return guest


def there_and_back(life: Life) -> Guest:
    over_link(life)
    life.started[0].end()
    guest = life.waiting("a")
    life.do("vm-migrate -q b.qmp 'link:vm-restore --receive a.qmp'")
    return guest


def from_snapshot(life: Life) -> Guest:
    source = life.running()
    life.do("vm-dump --snapshot -o s a.qmp")
    source.end()
    guest = life.waiting()
    life.do("vm-restore -q --run b.qmp < s")
    return guest


WAYS = (live, stopped, snapshot, failed, killed, cancelled, eager, lazy, on_demand, over_link, postcopy)
WAYS += (over_unix, there_and_back, from_snapshot)


# the deeds


def settings_as_before(life: Life, guest: Guest) -> None:
    with contextlib.closing(life._guest("fresh", incoming="defer").start().connect()) as fresh:
        assert guest.cmd("query-migrate-capabilities") == fresh.cmd("query-migrate-capabilities")
        ours, theirs = guest.cmd("query-migrate-parameters"), fresh.cmd("query-migrate-parameters")
        objects = {entry["name"] for entry in fresh.cmd("qom-list", path="/objects")}
    life.started.pop().end()
    if life.rate_set:
        ours["max-bandwidth"] = theirs["max-bandwidth"]
    assert ours == theirs
    left = {entry["name"] for entry in guest.cmd("qom-list", path="/objects")} - objects
    # The last claim stays, whose holder has ended.
    assert {name for name in left if not name.startswith("vmstate-claim-")} <= TELLS


def link_down_and_up(_life: Life, guest: Guest) -> None:
    guest.cmd("set_link", name="card", up=False)
    guest.wait_advance()
    guest.cmd("set_link", name="card", up=True)


def unplug_and_plug(life: Life, guest: Guest) -> None:
    guest.cmd("device_del", id="card")

    def gone() -> bool:
        return "card" not in [entry["name"] for entry in guest.cmd("qom-list", path="/machine/peripheral")]

    until(gone, 30, "the card is gone")
    guest.cmd("device_add", driver=life.card, netdev="net0", id="card", bus="slot1", romfile="")


def savevm_and_loadvm(_life: Life, guest: Guest) -> None:
    assert not _human(guest, "savevm x")
    guest.wait_advance()
    assert not _human(guest, "loadvm x")
    guest.wait_status("running")


def migration_by_qemu(_life: Life, guest: Guest) -> None:
    guest.cmd("migrate", uri="exec:cat > /dev/null")
    ended = ("completed", "failed")
    until(lambda: guest.cmd("query-migrate")["status"] in ended, 60, "a migration by QEMU alone ends")
    assert guest.cmd("query-migrate")["status"] == "completed"
    guest.cmd("cont")


def snapshot_of_ours(life: Life, guest: Guest) -> None:
    life.do(f"vm-dump --snapshot -o t {guest.qmp}")


def stop_and_dump(life: Life, guest: Guest) -> None:
    life.do(f"vm-dump -q --stop --after running -o t {guest.qmp}")


def status_without_advice(life: Life, guest: Guest) -> None:
    said = life.do(f"vm-status {guest.qmp}").text
    assert "left over" not in said
    assert "next:" not in said


def reset(_life: Life, guest: Guest) -> None:
    guest.cmd("system_reset")
    _boots(guest)


def reboot_from_within(_life: Life, guest: Guest) -> None:
    # Linux restarts by itself at these keys.
    assert not _human(guest, "sendkey ctrl-alt-delete")
    _boots(guest)


Deeds = tuple[Callable[[Life, Guest], None], ...]
DEEDS: Deeds = (settings_as_before, link_down_and_up, unplug_and_plug)
DEEDS += (savevm_and_loadvm, migration_by_qemu, snapshot_of_ours, stop_and_dump, status_without_advice)
BOOTS = (reset, reboot_from_within)
DEEDS += BOOTS
# In postcopy until it has all of its pages, QEMU cannot save it.
NOT_ON_DEMAND = {settings_as_before, savevm_and_loadvm, migration_by_qemu, snapshot_of_ours, stop_and_dump}
NOT_ON_DEMAND |= {status_without_advice}


def _human(guest: Guest, line: str) -> str:
    return str(guest.cmd("human-monitor-command", **{"command-line": line})).strip()


def _boots(guest: Guest) -> None:
    """From the start: it says once more that it is ready."""
    before = guest.path("serial").read_text(errors="replace").count("ready ")

    def ready() -> bool:
        assert guest.alive(), guest.stderr()
        return guest.path("serial").read_text(errors="replace").count("ready ") > before

    until(ready, 60, "the guest boots")


def _switched_on(guest: Guest) -> list[str]:
    return [c["capability"] for c in guest.cmd("query-migrate-capabilities") if c["state"]]


def lives_on(
    life: Life, way: Callable[[Life], Guest], deeds: tuple[Callable[[Life, Guest], None], ...] = DEEDS
) -> None:
    """The guest goes on after the way, and does each deed and goes on; what fails is named by the deed."""
    guest = way(life)
    assert guest.running(), guest.status()
    for deed in deeds:
        if way is on_demand and deed in NOT_ON_DEMAND:
            continue
        try:
            deed(life, guest)
            assert guest.running(), guest.status()
        except (AssertionError, QmpError, OSError) as error:
            raise AssertionError(f"{deed.__name__}: {error}; QEMU: {guest.stderr()}") from error


# Each way once, the cards in turn, and one of the two boots in turn, which take longest; the other boot only in
# `make check-rest`; all ways with each card and both in tests/long/check_life_after.py.
TURNS = [
    pytest.param(CARDS[at % 3], way, BOOTS[at % 2], id=f"{way.__name__}-{CARDS[at % 3]}") for at, way in enumerate(WAYS)
]
OTHERS = [
    pytest.param(CARDS[at % 3], way, BOOTS[1 - at % 2], id=f"{way.__name__}-{CARDS[at % 3]}")
    for at, way in enumerate(WAYS)
]


@pytest.mark.parametrize(("life", "way", "boot"), TURNS, indirect=["life"])
def test_a_guest_lives_on(life: Life, way: Callable[[Life], Guest], boot: Callable[[Life, Guest], None]) -> None:
    lives_on(life, way, (*(deed for deed in DEEDS if deed not in BOOTS), boot))


@pytest.mark.more
@pytest.mark.parametrize(("life", "way", "boot"), OTHERS, indirect=["life"])
def test_a_guest_boots(life: Life, way: Callable[[Life], Guest], boot: Callable[[Life, Guest], None]) -> None:
    lives_on(life, way, (boot,))


def test_a_user_who_silenced_qemu_is_heard(work: Path, states: Path) -> None:
    """announce-rounds=0 is put back, and the guest can reboot all the same."""
    life = Life(work, states, "virtio-net-pci")
    try:
        life.saved()
        for name, command in (("b", "vm-restore -v --run b.qmp < s"), ("c", "vm-restore -v --run --lazy c.qmp < s")):
            guest = life.waiting(name)
            guest.cmd("migrate-set-parameters", **{"announce-rounds": 0})
            done = life.do(command)
            assert "announce-rounds was 0" in done.err
            assert guest.cmd("query-migrate-parameters")["announce-rounds"] == 0
            assert guest.running()
            reset(life, guest)
            assert guest.running()
            guest.end()
    finally:
        life.end()
