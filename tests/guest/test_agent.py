"""The agent in a guest: a real qemu-ga, none at all, one that another client holds."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Guests, shell
from vm import MAC, Guest, until
from vmstate.errors import CannotDo
from vmstate.qemu.guest_agent import Agent, addresses, path_of, set_time, time_of
from vmstate.qemu.monitor import Monitor

from guest.judge import went_on

SECOND = 10**9
NAME = "org.qemu.guest_agent.0"
SERVER = "server=on,wait=off"
WIDE = 20.0
IN_2020 = 1577836800
# One for all of them, which boots once a run.
WITH_AGENT: dict[str, Any] = {"agent": True, "append": "ip=192.0.2.7/24"}


def found(guest: Guest) -> str | None:
    with Monitor(guest.qmp) as monitor:
        return path_of(monitor)


def answering(guest: Guest) -> str:
    """The socket of a guest's agent, once that is up."""
    path = str(guest.path("agent"))

    def up() -> bool:
        try:
            return time_of(path) > 0
        except CannotDo:
            return False

    until(up, 60, "the agent answers")
    return path


def wrong_by(path: str) -> float:
    """Seconds that a guest's clock is behind the host's."""
    return (time.time_ns() - time_of(path, WIDE)) / SECOND


def in_time(do: Callable[[], Any], patience: float) -> CannotDo:
    begun = time.monotonic()
    with pytest.raises(CannotDo) as error:
        do()
    assert time.monotonic() - begun < patience + 1
    return error.value


def test_the_path_is_found(guests: Guests) -> None:
    guest = guests.start("a", kind="metal", agent=True)
    assert found(guest) == str(guest.path("agent"))
    # Also while somebody talks there.
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(guest.path("agent")))
        until(lambda: any(c["frontend-open"] for c in guest.cmd("query-chardev")), 10, "a client")
        assert found(guest) == str(guest.path("agent"))


def test_no_path_where_there_is_no_agent(guests: Guests, work: Path) -> None:
    other = ["-chardev", f"socket,id=x,path={work / 'x'},{SERVER}", "-device", "virtio-serial-pci"]
    other += ["-device", "virtserialport,chardev=x,name=org.qemu.guest_agent.1"]
    assert found(guests.start("a", kind="metal")) is None
    assert found(guests.start("b", kind="metal", extra=other)) is None


def test_no_path_where_the_port_leads_to_no_socket(guests: Guests, work: Path) -> None:
    other = ["-chardev", f"file,id=x,path={work / 'x'}", "-device", "virtio-serial-pci"]
    other += ["-device", f"virtserialport,chardev=x,name={NAME}"]
    assert found(guests.start("a", kind="metal", extra=other)) is None


@pytest.mark.parametrize("device", ["-device isa-serial,chardev=qga0", f"-device isa-serial,chardev=x,id={NAME}"])
def test_the_path_of_a_serial_line(guests: Guests, work: Path, device: str) -> None:
    label = "qga0" if "qga0" in device else "x"
    chardev = f"socket,id={label},path={work / 'with,,comma'},{SERVER}"
    assert found(guests.start("a", kind="metal", extra=["-chardev", chardev, *device.split()])) == f"{work}/with,comma"


def test_a_path_from_where_qemu_was_started(guests: Guests, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    extra = ["-chardev", f"socket,id=qga0,path=there,{SERVER}", "-device", "isa-serial,chardev=qga0"]
    guest = guests.start("a", kind="metal", extra=extra)
    monkeypatch.chdir("/")
    assert found(guest) == f"{work}/there"


def test_the_clock_is_set(guests: Guests) -> None:
    guest = guests.running(**WITH_AGENT)
    path = answering(guest)
    assert found(guest) == path
    with Agent(path, WIDE) as agent:
        agent.ask("guest-set-time", time=IN_2020 * SECOND)
    assert wrong_by(path) > 10**8
    set_time(path)
    assert abs(wrong_by(path)) < 2
    # Backwards as well.
    with Agent(path, WIDE) as agent:
        agent.ask("guest-set-time", time=time.time_ns() + 3600 * SECOND)
    assert wrong_by(path) < -3000
    set_time(path)
    assert abs(wrong_by(path)) < 2
    assert guest.running()


def test_the_clock_after_a_restore(guests: Guests, work: Path) -> None:
    """The state lies for a while: the guest's clock is behind by that, what counts from its start goes on evenly."""
    source = guests.running(**WITH_AGENT)
    behind = wrong_by(answering(source))
    target = guests.waiting(**WITH_AGENT)
    done = shell("vm-dump -q a.qmp > s", work)
    assert done.status == 0, done.err
    count, uptimes = source.count() or 0, source.uptimes()
    time.sleep(3)
    done = shell("vm-restore b.qmp < s", work)
    assert done.status == 0, done.err
    went_on(count, target)
    path = answering(target)
    assert wrong_by(path) > behind + 2
    set_time(path)
    assert abs(wrong_by(path)) < 2
    count = target.count() or 0
    target.wait_count(count + 5)
    assert len(uptimes) > 0 and len(target.uptimes()) > 5
    uptimes += target.uptimes()
    assert uptimes == sorted(uptimes)
    assert max(after - before for before, after in zip(uptimes, uptimes[1:], strict=False)) < 60


def test_a_client_that_left_in_the_middle(guests: Guests) -> None:
    path = answering(guests.running(**WITH_AGENT))
    for left in (b'{"execute": "guest-g', b'{"execute": "guest-info"}\n' * 20, b"\xff}]\n", b"no json\n"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(left)
            time.sleep(0.2)
        with Agent(path, WIDE) as agent:
            agent.ask("guest-ping")
            assert agent.ask("guest-get-time") > 0


def test_what_the_agent_refuses(guests: Guests) -> None:
    path = answering(guests.running(**WITH_AGENT))
    with Agent(path, WIDE) as agent:
        with pytest.raises(CannotDo, match="refuses 'guest-set-time': "):
            agent.ask("guest-set-time", time="soon")
        with pytest.raises(CannotDo, match="refuses 'guest-no-such': "):
            agent.ask("guest-no-such", a_b=1)
        agent.ask("guest-ping")


@pytest.mark.parametrize("ask", [set_time, time_of, addresses])
def test_an_agent_that_does_not_run(guests: Guests, ask: Callable[[str], Any]) -> None:
    guest = guests.start("a", kind="metal", agent=True)
    error = in_time(lambda: ask(str(guest.path("agent"))), 3)
    assert str(error) == f"the agent at {guest.path('agent')} does not answer within 3 s"


def test_an_agent_that_another_client_holds(guests: Guests) -> None:
    path = answering(guests.running(**WITH_AGENT))
    with Agent(path, WIDE) as agent:
        assert "does not answer within 0.5 s" in str(in_time(lambda: set_time(path, 0.5), 0.5))
        agent.ask("guest-ping")
    # Its turn comes once that one has left.
    assert time_of(path, WIDE) > 0


def test_a_guest_that_stands(guests: Guests) -> None:
    guest = guests.running(**WITH_AGENT)
    path = answering(guest)
    guest.cmd("stop")
    in_time(lambda: set_time(path, 0.5), 0.5)
    guest.cmd("cont")
    assert time_of(path, WIDE) > 0


def test_a_socket_that_is_none(work: Path) -> None:
    assert "No such file" in str(in_time(lambda: set_time(str(work / "none")), 1))
    Path(work, "file").touch()
    assert "refused" in str(in_time(lambda: set_time(str(work / "file")), 1))
    assert "too long" in str(in_time(lambda: set_time("x" * 200), 1))


def test_addresses(guests: Guests) -> None:
    path = answering(guests.running(**WITH_AGENT))
    known = addresses(path, WIDE)
    assert list(known) == [MAC]
    assert "192.0.2.7" in known[MAC]
    # Of the link, in time; and nothing of lo.
    assert all(address == "192.0.2.7" or address.startswith("fe80::") for address in known[MAC])
