"""A peer is bound to its migration: who has not its secret hears nothing of the guest, and is not believed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest
from vmstate.errors import CannotDo, InDoubt, VmstateError
from vmstate.migrate import decision, link, proof, recover, server
from vmstate.migrate.direct import MigratePlan, MigrationTarget
from vmstate.migrate.link import Link, LinkFrame
from vmstate.migrate.proof import Talk, Unknown
from vmstate.migrate.source import OutgoingHandover
from vmstate.qemu import markers, status
from vmstate.qemu.markers import ARRIVED, DECIDED, GRANTED, KEPT, MOVED, TAKEN
from vmstate.qemu.monitor import Monitor
from vmstate.qemu.state import GuestState
from vmstate.report import Report

from unit.migrate import test_hostile_peer
from unit.migrate.both_sides import (
    GUESS,
    MOVE,
    SECRET,
    TRANSPORT,
    LoadingQemu,
    Script,
    SendingQemu,
    asks,
    hear,
    is_asked,
)
from unit.migrate.test_hostile_peer import holds, move, receive, served
from unit.qemu.fake_qemu import FakeQemu

Others = Callable[..., None]
# For `move`.
watched = test_hostile_peer.watched
FACTS = {"move": MOVE, "secret": SECRET, "run": True, "ran": True, "host": "a-host", "path": "/a-path", "uri": "link:x"}


class Holder(LoadingQemu):
    """It has a guest of the move, and can take up a postcopy."""

    def __init__(self, run: str, migration: str, mark: str, **facts: Any) -> None:
        super().__init__()
        self.run, self.migration = run, migration
        self.objects[mark] = json.dumps({**FACTS, **facts})


# For each purpose the QEMU that is asked, and what is heard of it by one who may.
ASKED: dict[str, tuple[tuple[str, str, str], str]] = {
    "settle": (("paused", "completed", TAKEN), "loaded"),
    "grant": (("postmigrate", "completed", MOVED), "granted"),
    "resume": (("running", "postcopy-paused", ARRIVED), "postcopy"),
}


def heard_by(source: Script, qemu: LoadingQemu) -> tuple[BaseException | None, list[LinkFrame]]:
    """The receiver's error, and all frames that came from it."""
    frames: list[LinkFrame] = []

    def listens(there: Link) -> None:
        real = there.receive

        def receive() -> LinkFrame | None:
            if frame := real():
                frames.append(frame)
            return frame

        there.receive = receive  # type: ignore[method-assign]
        with contextlib.suppress(OSError):
            source(there)
        with socket.socket(fileno=os.dup(there.reading)) as end:
            end.shutdown(socket.SHUT_WR)
        while there.receive():
            pass

    return receive(qemu, listens), frames


def without(purpose: str) -> Script:
    return lambda there: there.send(link.HELLO, version=1, purpose=purpose, move=MOVE)


def guessed(purpose: str) -> Script:
    return lambda there: asks(there, purpose, GUESS)


def for_another_purpose(purpose: str) -> Script:
    def source(there: Link) -> None:
        talk = Talk.about(purpose, MOVE, SECRET)
        there.send(link.HELLO, version=1, purpose=purpose, move=MOVE, nonce=talk.asker)
        frame = there.receive()
        talk.asked = frame.values["nonce"] if frame else ""
        talk.purpose = "move"
        there.send(link.PROOF, proof=talk.prove("ask"))

    return source


def replayed(purpose: str) -> Script:
    """A proof that was good in another conversation."""

    def source(there: Link) -> None:
        there.send(link.HELLO, version=1, purpose=purpose, move=MOVE, nonce="0" * 64)
        hear(there, link.CHALLENGE)
        there.send(link.PROOF, proof=Talk(purpose, MOVE, SECRET, "0" * 64, "1" * 64).prove("ask"))

    return source


def with_the_secret_of_another(purpose: str) -> Script:
    """Of a migration that this one has begun itself."""

    def source(there: Link) -> None:
        talk = Talk.about(purpose, "f" * 16, GUESS)
        there.send(link.HELLO, version=1, purpose=purpose, move=talk.move, nonce=talk.asker)
        frame = there.receive()
        talk.asked = frame.values["nonce"] if frame else ""
        there.send(link.PROOF, proof=talk.prove("ask"))
        there.send(link.GO, move=MOVE, proof=talk.prove("go"))

    return source


STRANGERS = [guessed, for_another_purpose, replayed, with_the_secret_of_another]


@pytest.mark.parametrize("purpose", ASKED)
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_hears_nothing(moves: None, purpose: str, stranger: Callable[[str], Script]) -> None:
    qemu = Holder(*ASKED[purpose][0])
    before = dict(qemu.objects), qemu.run, qemu.migration
    found, frames = heard_by(stranger(purpose), qemu)
    assert type(found) is Unknown, repr(found)
    assert found.told, "nothing is printed by the receiver, whose words a stranger may read"
    assert [frame.kind for frame in frames] == [link.CHALLENGE, link.REFUSE]
    assert set(frames[0].values) == {"nonce"}
    assert frames[1].values == {"status": 1, "message": str(Unknown()), "hints": [], "unknown": True}
    assert (dict(qemu.objects), qemu.run, qemu.migration) == before
    assert set(qemu.heard) <= {"qmp_capabilities", "qom-list", "qom-get"}


@pytest.mark.parametrize("purpose", ASKED)
def test_who_shows_nothing_hears_nothing(moves: None, purpose: str) -> None:
    qemu = Holder(*ASKED[purpose][0])
    found, frames = heard_by(without(purpose), qemu)
    assert isinstance(found, CannotDo)
    assert [frame.kind for frame in frames] == [link.CHALLENGE, link.REFUSE]
    assert not qemu.heard


@pytest.mark.parametrize("purpose", ASKED)
@pytest.mark.parametrize("secret", [SECRET, GUESS])
def test_no_guest_of_it_is_the_same_to_a_stranger(moves: None, purpose: str, secret: str) -> None:
    """Where another guest is, or none: also who has the secret is told no more."""
    empty, other = LoadingQemu(), Holder("paused", "completed", TAKEN, move="f" * 16, secret=GUESS)
    gone = Holder(*ASKED[purpose][0])
    gone.dies_in = 2
    for qemu in (empty, other, gone):
        found, frames = heard_by(lambda there: asks(there, purpose, secret), qemu)
        assert type(found) is Unknown, repr(found)
        assert frames[1].values["message"] == str(Unknown())


@pytest.mark.parametrize("purpose", ASKED)
def test_one_that_has_left_is_not_one_that_has_come(moves: None, purpose: str) -> None:
    """So what one side is asked cannot be answered by the other."""
    run, migration, mark = ASKED[purpose][0]
    qemu = Holder(run, migration, {TAKEN: MOVED, ARRIVED: MOVED, MOVED: TAKEN}[mark])
    found, _ = heard_by(lambda there: asks(there, purpose), qemu)
    assert type(found) is Unknown


@pytest.mark.parametrize("purpose", ["settle", "grant"])
def test_who_has_the_secret_is_answered(moves: None, purpose: str) -> None:
    qemu = Holder(*ASKED[purpose][0])
    talks: list[Talk] = []
    found, frames = heard_by(lambda there: talks.append(asks(there, purpose)), qemu)
    assert found is None
    assert [frame.kind for frame in frames] == [link.CHALLENGE, link.ACCEPT]
    said = frames[1].values
    assert (set(said), said["state"]) == ({"state", "run", "proof"}, ASKED[purpose][1])
    assert talks[0].proves(said["proof"], "accept", said["state"], said["run"])
    for secret_or_fact in (SECRET, MOVE, "a-host", "/a-path", "link:x"):
        assert secret_or_fact not in json.dumps([frame.values for frame in frames])


def test_who_has_the_secret_takes_up_a_postcopy(moves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, str]] = []

    class Resumed:
        def __init__(self, *_: object) -> None:
            pass

        def resume(self, accept: dict[str, str]) -> dict[str, str]:
            answers.append(accept)
            return {"state": "running"}

    monkeypatch.setattr(server, "IncomingMigration", Resumed)
    for secret, count in ((GUESS, 0), (SECRET, 1)):
        receive(Holder(*ASKED["resume"][0]), lambda there, secret=secret: asks(there, "resume", secret))
        assert len(answers) == count
    assert answers[0]["state"] == "postcopy"


# go


def test_the_number_of_a_migration_is_no_word_for_it(moves: None) -> None:
    """As it was: `settle` told it to anybody, and go was believed with it."""

    def anybody(there: Link) -> None:
        there.send(link.HELLO, version=1, purpose="settle")
        frame = there.receive()
        there.send(link.GO, move=(frame.values.get("move") if frame else None) or MOVE)

    qemu = Holder("paused", "completed", TAKEN)
    found, frames = heard_by(anybody, qemu)
    assert type(found) is Unknown
    assert [frame.kind for frame in frames] == [link.CHALLENGE, link.REFUSE]
    assert MOVE not in json.dumps([frame.values for frame in frames])
    assert (qemu.run, "cont" in qemu.heard) == ("paused", False)


@pytest.mark.parametrize("said", ["none", "ask", "guess", "other", "go"])
def test_go_is_proven_by_itself(moves: None, said: str) -> None:
    """Who carries a question of the source's cannot add to it."""

    def source(there: Link) -> None:
        talk = asks(there, "settle")
        hear(there, link.ACCEPT)
        proofs = {
            "none": {},
            "ask": {"proof": talk.prove("ask")},
            "guess": {"proof": GUESS},
            "other": {"proof": talk.prove("go"), "move": "f" * 16},
            "go": {"proof": talk.prove("go")},
        }
        there.send(link.GO, **{"move": MOVE, **proofs[said]})
        hear(there, link.RUNNING, link.REFUSE)

    qemu = LoadingQemu()
    holds(qemu)
    found = receive(qemu, source)
    if said == "go":
        assert (found, qemu.run) == (None, "running")
    else:
        assert (type(found), qemu.run) == (Unknown, "paused")


def test_go_is_for_the_guest_that_has_come(moves: None) -> None:
    def source(there: Link) -> None:
        there.send(link.HELLO, version=1, purpose="move", move=MOVE, secret=SECRET)
        hear(there, link.ACCEPT)
        there.send_bytes(link.DATA, memoryview(b"all!"))
        hear(there, link.LOADED)
        there.send(link.GO, move="f" * 16)
        hear(there, link.REFUSE)

    qemu = LoadingQemu()
    found = receive(qemu, source)
    assert isinstance(found, InDoubt)
    assert "the source's 'go' is for another migration" in str(found)
    assert (qemu.run, json.loads(qemu.objects[TAKEN])["secret"]) == ("paused", SECRET)


# whoever answers is not believed either


def answers(state: str, secret: str, then: Callable[[Link, Talk], object] = lambda *_: None) -> Script:
    def other(there: Link) -> None:
        talk = is_asked(there, secret)
        there.send(link.ACCEPT, **talk.answer(state))
        then(there, talk)

    return other


def changed(there: Link) -> None:
    """One that carries the conversation changes what is said."""
    there.send(link.ACCEPT, **{**is_asked(there).answer("undecided"), "state": "granted"})


def echoed(there: Link) -> None:
    """What is asked is given back."""
    frame = there.receive()
    there.send(link.CHALLENGE, nonce=frame.values["nonce"] if frame else "")
    shown = there.receive()
    there.send(link.ACCEPT, state="granted", run="", proof=shown.values["proof"] if shown else "")


def heard_before(there: Link) -> None:
    """What was answered once, to somebody with the secret, is answered again."""
    talk = is_asked(there)
    there.send(link.ACCEPT, **Talk("grant", MOVE, SECRET, "1" * 64, talk.asked).answer("granted"))


@pytest.mark.parametrize("other", [answers("granted", GUESS), changed, echoed, heard_before])
def test_an_impostor_grants_nothing(moves: None, others: Others, other: Script) -> None:
    others(other)
    qemu = LoadingQemu()
    holds(qemu)
    with served(qemu) as path, pytest.raises(InDoubt, match="does not have the secret of this migration"):
        recover.recover(path, TRANSPORT)
    assert (qemu.run, "cont" in qemu.heard) == ("paused", False)


def test_an_impostor_has_no_copy_ended(moves: None, others: Others) -> None:
    """That it runs at its source is advice to end this one."""
    others(answers("here", GUESS))
    qemu = LoadingQemu()
    holds(qemu)
    with served(qemu) as path, pytest.raises(InDoubt) as found:
        recover.recover(path, TRANSPORT)
    assert "of no use" not in str(found.value)
    assert not [hint for hint in found.value.hints if "end this QEMU" in hint]


def test_what_an_impostor_says_of_a_guest_given_away(moves: None, others: Others) -> None:
    """Nobody has been heard to have it, and it was not granted: it is taken back."""
    others(answers("loaded", GUESS))
    qemu = Holder("postmigrate", "completed", MOVED)
    with served(qemu) as path:
        assert recover.recover(path, TRANSPORT)["where"] == "here"
    assert qemu.run == "running"
    decided = json.loads(qemu.objects[DECIDED])
    assert (decided["what"], decided["secret"]) == (KEPT, SECRET)


@pytest.mark.parametrize("secret", [SECRET, GUESS])
def test_that_it_runs_is_proven(moves: None, others: Others, secret: str) -> None:
    def runs(there: Link, talk: Talk) -> None:
        hear(there, link.GO)
        talk = Talk(talk.purpose, talk.move, secret, talk.asker, talk.asked)
        there.send(link.RUNNING, state="running", proof=talk.prove("running", "running"))

    others(answers("loaded", SECRET), answers("loaded", SECRET, runs))
    qemu = Holder("postmigrate", "completed", MOVED)
    with served(qemu) as path:
        if secret == SECRET:
            assert recover.recover(path, TRANSPORT)["where"] == "there"
        else:
            with pytest.raises(InDoubt, match="does not have the secret"):
                recover.recover(path, TRANSPORT)
    assert markers.decision({DECIDED: json.loads(qemu.objects[DECIDED])}) == GRANTED
    assert (markers.HEARD in qemu.objects) is (secret == SECRET)


@pytest.mark.parametrize("purpose", ASKED)
def test_whoever_is_asked_does_not_learn_it(moves: None, others: Others, purpose: str) -> None:
    """The URI of a recovery may lead to anybody."""
    frames: list[dict[str, Any]] = []

    def other(there: Link) -> None:
        there.send(link.CHALLENGE, nonce="0" * 64)
        while frame := there.receive():
            frames.append(frame.values)
            if frame.kind == link.PROOF:
                there.send(link.ACCEPT, state="loaded", run="paused", proof=frame.values["proof"])

    others(other)
    asker = {"settle": ("postmigrate", "completed", MOVED), "grant": ("paused", "completed", TAKEN)}
    qemu = Holder(*asker.get(purpose, ("paused", "postcopy-paused", MOVED)))
    with served(qemu) as path:
        try:
            recover.recover(path, TRANSPORT)
        except VmstateError as error:
            assert SECRET not in f"{error} {error.hints}"
    assert [frame.get("purpose") for frame in frames] == [purpose, None]
    assert SECRET not in json.dumps(frames)


# a marker of an older version


@pytest.mark.parametrize("purpose", ["settle", "grant"])
@pytest.mark.parametrize("secret", [None, "", "short", SECRET.upper(), 5])
def test_a_marker_without_a_secret_is_not_spoken_of(moves: None, purpose: str, secret: object) -> None:
    qemu = Holder(*ASKED[purpose][0], secret=secret)
    found, frames = heard_by(lambda there: asks(there, purpose), qemu)
    assert type(found) is CannotDo
    assert "its migration was begun by an older vmstate" in str(found)
    assert "recover it with that version" in frames[1].values["message"]
    assert (qemu.run, DECIDED in qemu.objects) == (ASKED[purpose][0][0], False)


def test_who_has_such_a_marker_asks_nobody(moves: None, others: Others) -> None:
    def nobody(there: Link) -> None:
        pytest.fail("the other side was called")

    others(nobody)
    loaded = Holder("paused", "completed", TAKEN, secret=None)
    with served(loaded) as path, pytest.raises(InDoubt, match="was begun by an older vmstate"):
        recover.recover(path, TRANSPORT)
    assert loaded.run == "paused"
    given = Holder("postmigrate", "completed", MOVED, secret=None)
    with served(given) as path:
        assert recover.recover(path, TRANSPORT)["where"] == "here"
    crossed = Holder("paused", "postcopy-paused", MOVED, secret=None)
    with served(crossed) as path, pytest.raises(CannotDo, match="was begun by an older vmstate"):
        recover.recover(path, TRANSPORT)


# where it is


def test_it_stays_as_long_as_somebody_may_ask(qemu: FakeQemu, path: str) -> None:
    qemu.run, qemu.migration = "postmigrate", "completed"
    qemu.objects[MOVED] = json.dumps(FACTS)
    with Monitor(path) as monitor:
        assert decision.take_back_given(monitor)
        found = markers.read(monitor)
        assert found == {DECIDED: {"move": MOVE, "what": KEPT, "secret": SECRET}}
        assert Talk.of("grant", MOVE, found, "", "").prove("x") == Talk("grant", MOVE, SECRET, "").prove("x")
        markers.forget(monitor, "f" * 16)
        assert markers.read(monitor) == found
        markers.forget(monitor, MOVE)
        assert markers.read(monitor) == {}


def test_it_arrives_with_the_guest(qemu: FakeQemu, path: str) -> None:
    qemu.run, qemu.migration = "paused", "completed"
    qemu.objects[TAKEN] = json.dumps(FACTS)
    with Monitor(path) as monitor:
        decision.arrive(monitor, FACTS)
        assert markers.read(monitor)[ARRIVED]["secret"] == SECRET


def accepts(told: list[str]) -> Script:
    def other(there: Link) -> None:
        if frame := there.receive():
            told.append(json.dumps(frame.values))
        there.send(link.ACCEPT, findings=[])
        hear(there, link.DATA)
        there.send(link.LOADED, bytes=9)
        hear(there, link.GO)
        there.send(link.RUNNING, state="running")

    return other


def test_each_migration_has_its_own(moves: None, others: Others) -> None:
    told: list[str] = []
    secrets = set()
    for _ in range(3):
        found, qemu = move(others, accepts(told))
        assert found is None
        secret = json.loads(qemu.objects[MOVED])["secret"]
        assert re.fullmatch("[0-9a-f]{64}", secret)
        assert json.loads(told[-1])["secret"] == secret
        secrets.add(secret)
    assert len(secrets) == 3


def test_a_question_whether_it_would_do_tells_none(sending: SendingQemu, others: Others) -> None:
    told: list[str] = []
    others(accepts(told))
    plan = MigratePlan(sending.server.path, MigrationTarget(TRANSPORT.uri, transport=TRANSPORT))
    job = OutgoingHandover(plan, TRANSPORT, Report("test"), "off")
    job.check()
    assert job._secret not in told[0]
    assert "secret" not in json.loads(told[0])


ROWS = [(*ASKED[purpose][0], None) for purpose in ASKED] + [
    ("running", "active", MOVED, None),
    ("finish-migrate", "device", MOVED, None),
    ("paused", "postcopy-paused", MOVED, GRANTED),
    ("postmigrate", "completed", MOVED, GRANTED),
    ("running", "completed", ARRIVED, None),
    ("running", "cancelled", DECIDED, KEPT),
]


@pytest.mark.parametrize(("run", "migration", "mark", "decided"), ROWS)
def test_it_is_in_no_status(run: str, migration: str, mark: str, decided: str | None) -> None:
    qemu = Holder(run, migration, mark, what=decided)
    if decided:
        qemu.objects[DECIDED] = json.dumps({"move": MOVE, "what": decided, "secret": SECRET})
    with served(qemu) as path:
        found = status.of(path)
        assert SECRET not in json.dumps([found.lines(), found.values()])
        with Monitor(path) as monitor:
            marks = markers.read(monitor)
            with_words = [markers.recover_command(path, marks), markers.resume_command(path, marks)]
            assert SECRET not in json.dumps(with_words)
            try:
                markers.refuse(marks, GuestState(run, migration), path)
            except InDoubt as error:
                assert SECRET not in f"{error} {error.hints}"


def test_it_is_in_no_words_of_a_migration(
    moves: None, others: Others, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is said with -v, whatever breaks off."""
    monkeypatch.setattr("unit.migrate.test_hostile_peer.REPORT", Report("test", verbose=True))
    secrets: list[str] = []
    monkeypatch.setattr(proof, "draw", lambda: secrets.append(SECRET[:-2] + f"{len(secrets):02}") or secrets[-1])
    told: list[str] = []

    def refuses(there: Link) -> None:
        there.send(link.REFUSE, status=4, message="no")

    for script in (accepts(told), refuses, lambda _: None):
        found, _ = move(others, script)
        if found:
            assert SECRET[:40] not in f"{found} {getattr(found, 'hints', '')} {found.__dict__}"
    receive(LoadingQemu(), lambda there: there.send(link.HELLO, **json.loads(told[0])))
    said = capfd.readouterr()
    assert secrets
    assert SECRET[:40] in told[0]
    assert SECRET[:40] not in said.out + said.err
