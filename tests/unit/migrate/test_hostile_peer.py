"""Another side that says anything at all: an error of the right status comes of it, and the guest is where it says."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qmp_server import QmpServer
from vmstate.dump.watchdog import Guard
from vmstate.errors import VmstateError
from vmstate.io.descriptors import channel
from vmstate.migrate import link, recover
from vmstate.migrate.direct import MigratePlan, MigrationTarget
from vmstate.migrate.link import Link
from vmstate.migrate.proof import Talk, Unknown
from vmstate.migrate.reception import ReceivePlan
from vmstate.migrate.server import Receive
from vmstate.migrate.source import OutgoingHandover
from vmstate.qemu import markers
from vmstate.report import Report

from unit.migrate.both_sides import MOVE, SECRET, TRANSPORT, LoadingQemu, Script, SendingQemu, asks, hear, is_asked
from unit.migrate.test_messages import HELLO, JSON, WHOLE

REPORT = Report("test", quiet=True)
Others = Callable[..., None]
# Each of these is a whole move.
few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def spoilt(right: dict[str, Any], *more: str) -> st.SearchStrategy[dict[str, Any]]:
    """What is right with anything in some of its fields, or anything at all."""
    wrong = st.dictionaries(st.sampled_from((*right, *more)), JSON, min_size=1)
    return wrong.map(lambda values: {**right, **values}) | st.dictionaries(st.text(), JSON)


ACCEPT = {"guest": "b.qmp", "findings": []}
REFUSE = {"status": 4, "message": "no", "hints": []}
RUNNING = {"state": "running"}


@contextlib.contextmanager
def served(qemu: Any) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="vm-")
    try:
        with QmpServer(Path(folder, "qmp"), qemu) as qemu.server:
            yield qemu.server.path
    finally:
        shutil.rmtree(folder)


# at the source

# Whether the watchdog of the last move was let go.
over: list[str] = []


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(name: str) -> Callable[[Guard], None]:
        real = getattr(Guard, name)
        return lambda guard: (over.append(name), real(guard))[1]

    for name in ("leave", "done"):
        monkeypatch.setattr(Guard, name, noted(name))


def move(others: Others, *scripts: Script) -> tuple[BaseException | None, SendingQemu]:
    others(*scripts)
    over.clear()
    qemu = SendingQemu()
    with served(qemu) as path:
        plan = MigratePlan(path, MigrationTarget(TRANSPORT.uri, transport=TRANSPORT), handover=0.2)
        job, found = OutgoingHandover(plan, TRANSPORT, REPORT, "off"), None
        try:
            job.begin()
            job.run()
        except Exception as error:  # noqa: BLE001 - which one it is, is judged
            found = error
        if not over:
            # As when this process ends.
            job._guard.leave()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(job._guard.pid, 0)
    return found, qemu


def judge(found: BaseException | None, qemu: SendingQemu, *statuses: int) -> None:
    assert isinstance(found, VmstateError), repr(found)
    assert found.status in statuses
    assert qemu.run == ("postmigrate" if found.status == 5 else "running")


def accepts(there: Link) -> None:
    hear(there, link.HELLO)
    there.send(link.ACCEPT, findings=[])


def loads(there: Link) -> None:
    accepts(there)
    hear(there, link.DATA)
    there.send(link.LOADED, bytes=9)


@few
@given(spoilt(ACCEPT))
def test_an_accept(moves: None, others: Others, values: dict[str, Any]) -> None:
    def other(there: Link) -> None:
        hear(there, link.HELLO)
        there.send(link.ACCEPT, **values)

    # Where it was right after all, the link is lost then.  4: a finding that is an error.
    judge(*move(others, other), 1, 4)


@few
@given(spoilt({"bytes": 9}))
def test_a_loaded(moves: None, others: Others, values: dict[str, Any]) -> None:
    def other(there: Link) -> None:
        accepts(there)
        hear(there, link.DATA)
        there.send(link.LOADED, **values)
        if hear(there, link.GO, link.CANCEL):
            there.send(link.RUNNING, **RUNNING)

    found, qemu = move(others, other)
    if found:
        judge(found, qemu, 1)
    else:
        assert qemu.run == "postmigrate"


@few
@given(spoilt(RUNNING), st.sampled_from((link.RUNNING, link.REFUSE, link.BACK, link.ACCEPT, 0)))
def test_what_comes_behind_go(moves: None, others: Others, values: dict[str, Any], kind: int) -> None:
    def other(there: Link) -> None:
        loads(there)
        if hear(there, link.GO):
            there.send(kind, **values)

    found, qemu = move(others, other, lambda _: None)
    if found:
        judge(found, qemu, 5)
    assert qemu.run == "postmigrate"
    assert '"granted"' in qemu.objects[markers.DECIDED]


@few
@given(spoilt({"nonce": "0" * 64}), spoilt({"state": "loaded", "run": "paused"}, "proof"), spoilt(RUNNING, "proof"))
def test_what_it_says_when_it_is_asked_anew(
    moves: None,
    others: Others,
    challenge: dict[str, Any],
    answer: dict[str, Any],
    running: dict[str, Any],
) -> None:
    secrets = []

    def again(there: Link) -> None:
        frame = there.receive()
        asked = frame.values if frame else {}
        there.send(link.CHALLENGE, **challenge)
        hear(there, link.PROOF)
        talk = Talk(asked["purpose"], asked["move"], secrets[0], asked["nonce"], str(challenge.get("nonce")))
        right = {"proof": talk.prove("accept", str(answer.get("state")), str(answer.get("run")))}
        there.send(link.ACCEPT, **{**right, **answer})
        if hear(there, link.GO):
            there.send(link.RUNNING, **{"proof": talk.prove("running", str(running.get("state"))), **running})

    def first(there: Link) -> None:
        hello = there.receive()
        secrets.append(hello.values["secret"] if hello else "")
        there.send(link.ACCEPT, findings=[])
        hear(there, link.DATA)
        there.send(link.LOADED, bytes=9)
        hear(there, link.GO)

    found, qemu = move(others, first, again)
    if found:
        judge(found, qemu, 5)


@few
@given(spoilt(REFUSE), st.booleans())
def test_a_refusal(moves: None, others: Others, values: dict[str, Any], late: bool) -> None:
    def other(there: Link) -> None:
        accepts(there) if late else hear(there, link.HELLO)
        there.send(link.REFUSE, **values)

    found, qemu = move(others, other)
    assert isinstance(found, VmstateError), repr(found)
    assert found.status in (1, 3, 4, 5)
    assert qemu.run == "running"


@few
@given(spoilt({"state": "granted", "run": ""}, "proof"))
def test_what_a_source_says_that_is_asked_for_its_guest(moves: None, others: Others, values: dict[str, Any]) -> None:
    def other(there: Link) -> None:
        talk = is_asked(there)
        right = talk.prove("accept", str(values.get("state")), str(values.get("run") or ""))
        there.send(link.ACCEPT, **{"proof": right, **values})

    others(other)
    qemu = LoadingQemu()
    holds(qemu)
    with served(qemu) as path:
        try:
            assert recover.recover(path, TRANSPORT)["state"] == "running"
        except VmstateError as error:
            assert (error.status, qemu.run) == (5, "paused")


# at the receiver


def holds(qemu: LoadingQemu) -> None:
    """It has loaded the guest of the move."""
    qemu.run, qemu.migration = "paused", "completed"
    facts = {"move": MOVE, "secret": SECRET, "run": True, "host": "h", "path": "/a"}
    qemu.objects[markers.TAKEN] = json.dumps(facts)


def receive(qemu: LoadingQemu, source: Script) -> BaseException | None:
    ours, theirs = channel()

    def speak() -> None:
        with contextlib.suppress(OSError):
            source(Link(theirs.fileno(), theirs.fileno()))
        theirs.shutdown(socket.SHUT_WR)

    with served(qemu) as path, ours, theirs:
        thread = threading.Thread(target=speak)
        thread.start()
        try:
            Receive(ReceivePlan(path, announce=False), REPORT, ours.fileno(), ours.fileno()).run()
        except Exception as error:  # noqa: BLE001 - which one it is, is judged
            return error
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            thread.join(10)
    return None


@few
@given(spoilt({**HELLO, **WHOLE}))
def test_a_hello(moves: None, values: dict[str, Any]) -> None:
    qemu = LoadingQemu()
    found = receive(qemu, lambda there: there.send(link.HELLO, **values))
    # Of another purpose it may be a right one.
    assert found is None or isinstance(found, VmstateError), repr(found)
    assert found is None or found.status in (1, 3, 4)
    assert "migrate-incoming" not in qemu.heard


@few
@given(st.lists(st.tuples(st.sampled_from(b"HARSELGNC"), st.dictionaries(st.text(), JSON)), max_size=4))
def test_frames_in_any_order(moves: None, frames: list[tuple[int, dict[str, Any]]]) -> None:
    def source(there: Link) -> None:
        there.send(link.HELLO, **HELLO)
        hear(there, link.ACCEPT)
        for kind, values in frames:
            there.send(kind, **values)

    qemu = LoadingQemu()
    found = receive(qemu, source)
    assert isinstance(found, VmstateError), repr(found)
    assert found.status in (1, 3)
    assert "cont" not in qemu.heard


def speaks_to_the_end(kind: int, values: dict[str, Any]) -> Script:
    def source(there: Link) -> None:
        there.send(link.HELLO, **HELLO)
        hear(there, link.ACCEPT)
        there.send_bytes(link.DATA, memoryview(b"all!"))
        if hear(there, link.LOADED):
            there.send(kind, **values)
            hear(there, link.RUNNING)

    return source


@few
@given(spoilt({"move": MOVE}), st.sampled_from((link.GO, link.RUNNING, link.DATA, link.HELLO, 0)))
def test_a_go(moves: None, values: dict[str, Any], kind: int) -> None:
    qemu = LoadingQemu()
    found = receive(qemu, speaks_to_the_end(kind, values))
    if found is None:
        assert (kind, values["move"], qemu.run) == (link.GO, MOVE, "running")
        return
    assert isinstance(found, VmstateError), repr(found)
    assert (found.status, qemu.run) == (5, "paused")


@few
@given(spoilt({"move": MOVE}, "proof"))
def test_a_go_to_one_that_is_settled(moves: None, values: dict[str, Any]) -> None:
    def source(there: Link) -> None:
        talk = asks(there, "settle")
        hear(there, link.ACCEPT)
        there.send(link.GO, **{"proof": talk.prove("go"), **values})
        hear(there, link.RUNNING)

    qemu = LoadingQemu()
    holds(qemu)
    found = receive(qemu, source)
    if found is None:
        assert qemu.run == "running"
        return
    assert isinstance(found, VmstateError), repr(found)
    assert qemu.run == "paused"
    assert found.status == 5 or isinstance(found, Unknown)


@pytest.mark.parametrize("kind", [link.GO, link.CANCEL])
def test_an_honest_one(moves: None, kind: int) -> None:
    """The tests above would find nothing if none came so far."""
    qemu = LoadingQemu()
    found = receive(qemu, speaks_to_the_end(kind, {"move": MOVE}))
    assert (found is None, qemu.run) == ((True, "running") if kind == link.GO else (False, "paused"))
