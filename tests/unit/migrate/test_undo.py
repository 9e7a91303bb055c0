"""Each step in the undoing of a move fails once: the others are done all the same, and the error names it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable

import pytest
from vmstate.errors import CannotDo, InDoubt, VmstateError
from vmstate.io.descriptors import channel
from vmstate.migrate import link
from vmstate.migrate.destination import IncomingMigration
from vmstate.migrate.direct import MigratePlan, MigrationTarget, Move
from vmstate.migrate.link import Link
from vmstate.migrate.messages import Hello, Origin
from vmstate.migrate.reception import ReceivePlan
from vmstate.migrate.source import OutgoingHandover
from vmstate.report import Report

from unit.migrate.both_sides import MOVE, TRANSPORT, LoadingQemu, SendingQemu, hear
from unit.undoing import Undone

REPORT = Report("test", quiet=True)
ERRORS = [CannotDo("it does not go"), KeyError("a bug")]
Others = Callable[..., None]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """The steps that were undone.  `bad` of the test fails with `error`, after its work."""
    bad, error = (request.node.callspec.params.get(name) for name in ("bad", "error"))
    return Undone(monkeypatch, bad, error).ran


def each(steps: set[str]) -> pytest.MarkDecorator:
    """Every step, with every error; and none."""
    rows = [(bad, error) for bad in sorted(steps) for error in ERRORS]
    return pytest.mark.parametrize(("bad", "error"), [("", None), *rows])


def judge(found: BaseException, steps: set[str], done: list[str], bad: str) -> None:
    assert isinstance(found, VmstateError)
    assert set(done) == steps
    assert len(done) == len(steps)
    if bad:
        assert isinstance(found, InDoubt)
        assert f"could not put back {bad}: " in str(found)


def ends(guard: object) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(guard.pid, 0)


# the source

THROUGH = {"the watchdog", "the link", "the guest", "the filter", "the channel to QEMU"}
PLAIN = {"the watchdog", "the link", "the guest", "the channel to QEMU", "the talk with QEMU"}


def accepts(there: Link) -> None:
    hear(there, link.HELLO)
    there.send(link.ACCEPT, findings=[])


def move(sending: SendingQemu, through: str | None) -> tuple[BaseException, OutgoingHandover]:
    target = MigrationTarget(TRANSPORT.uri, transport=TRANSPORT)
    plan = MigratePlan(sending.server.path, target, handover=3, through=through)
    job = OutgoingHandover(plan, TRANSPORT, REPORT, "off")
    with pytest.raises(Exception) as found:
        job.begin()
        job.run()
    ends(job._guard)
    return found.value, job


@each(THROUGH)
def test_the_source_in_the_midst_of_its_data(
    sending: SendingQemu, others: Others, done: list[str], bad: str, error: Exception | None
) -> None:
    def other(there: Link) -> None:
        accepts(there)
        hear(there, link.CANCEL)

    others(other)
    # No stream of QEMU at all.
    found, _ = move(sending, "cat")
    judge(found, THROUGH, done, bad)
    assert "QEMU's stream is not as it should be" in str(found)
    assert sending.run == "running"
    if not bad:
        assert (found.status, str(found).endswith("; the guest runs on")) == (1, True)


@each(PLAIN)
def test_the_source_when_all_is_sent(
    sending: SendingQemu, others: Others, done: list[str], bad: str, error: Exception | None
) -> None:
    heard = []

    def other(there: Link) -> None:
        accepts(there)
        hear(there, link.DATA)
        there.send(link.LOADED, bytes="many")
        heard.append(hear(there, link.CANCEL))

    others(other)
    found, job = move(sending, None)
    judge(found, PLAIN, done, bad)
    assert "the other side's 'loaded': field 'bytes': expected a whole number, found 'many'" in str(found)
    assert sending.run == "running"
    # Who does not know that the guest is back does not say so.
    job._of.peer.cut()
    assert heard == [bad != "the guest"]


# the destination

RECEIVING = {"the guest", "the talk with QEMU", "the channel to QEMU", "the filter"}


def receive(loading: LoadingQemu, source: Callable[[Link], object], postcopy: bool = False) -> BaseException:
    ours, theirs = channel()
    plan = ReceivePlan(loading.server.path, back="cat", announce=False)
    hello = Hello("move", MOVE, {}, True, ["cat"], False, False, postcopy, Origin("h", "/p"))

    def speak() -> None:
        with contextlib.suppress(OSError):
            source(Link(theirs.fileno(), theirs.fileno()))
        theirs.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=speak)
    thread.start()
    there = Link(ours.fileno(), ours.fileno())
    with ours, theirs:
        with pytest.raises(Exception) as found:
            IncomingMigration(plan, loading.server.path, REPORT, there, hello, None).run([])
        thread.join(10)
    return found.value


@each(RECEIVING)
def test_the_destination_in_the_midst_of_the_data(
    loading: LoadingQemu, done: list[str], bad: str, error: Exception | None
) -> None:
    def source(there: Link) -> None:
        hear(there, link.ACCEPT)
        there.send_bytes(link.DATA, memoryview(b"some"))
        there.send(link.SWITCH)

    found = receive(loading, source, postcopy=True)
    judge(found, RECEIVING, done, bad)
    assert "the link was lost before the source had sent all of its guest" in str(found)
    assert "quit" in loading.heard
    if not bad:
        assert found.status == 1


@each(RECEIVING)
def test_the_destination_when_all_is_loaded(
    loading: LoadingQemu, done: list[str], bad: str, error: Exception | None
) -> None:
    def source(there: Link) -> None:
        hear(there, link.ACCEPT)
        there.send_bytes(link.DATA, memoryview(b"all!"))
        there.send(link.END, bytes=4)
        hear(there, link.LOADED)

    found = receive(loading, source)
    judge(found, RECEIVING, done, bad)
    assert found.status == 5
    assert "is loaded and held, and it is not known whether its source has let it go: the link is lost" in str(found)
    assert not {"quit", "cont"} & set(loading.heard)


# without a link

DIRECT = {"the watchdog", "the guest", "the migration"}


@each(DIRECT)
def test_a_direct_move(sending: SendingQemu, done: list[str], bad: str, error: Exception | None) -> None:
    job = Move(MigratePlan(sending.server.path, MigrationTarget("tcp:there:1"), timeout=0.1), REPORT, "off")
    with pytest.raises(Exception) as found:
        job.run()
    ends(job._guard)
    judge(found.value, DIRECT, done, bad)
    assert "the move was not over in 0.1 s" in str(found.value)
    assert sending.migration == "cancelled"
    if not bad:
        assert (found.value.status, str(found.value).endswith("; the guest runs on")) == (1, True)


# a guest that powers off


@pytest.mark.parametrize("held", [False, True])
def test_the_guest_powers_off(
    sending: SendingQemu, others: Others, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """While it is sent there is nothing in doubt, unless the other side has all of it."""

    def end(qemu: SendingQemu, channel: socket.socket) -> None:
        with channel:
            channel.sendall(qemu.data)
            os.unlink(qemu.server.path)
            channel.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr(SendingQemu, "_send", end)

    def other(there: Link) -> None:
        accepts(there)
        hear(there)
        there.send(link.REFUSE, status=5 if held else 1, message="held" if held else "the link was lost", hints=[])

    others(other)
    found, _ = move(sending, None)
    assert isinstance(found, VmstateError)
    assert found.status == (5 if held else 1), found
    assert "has ended: the guest has shut down" in str(found)
    assert ("could not put back the guest" in str(found)) == held
