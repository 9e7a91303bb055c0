"""What another side says in its frames is read or refused, with the field by name; nothing else comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.errors import CannotDo, Damaged, InDoubt, Misfit, VmstateError
from vmstate.migrate import link, messages
from vmstate.migrate.finding import Finding
from vmstate.migrate.link import LinkFrame
from vmstate.migrate.messages import Accepted, Challenge, Go, Hello, Loaded, Proof, Running, Stand
from vmstate.migrate.preflight import compare
from vmstate.migrate.proof import Unknown

MOVE = "0123456789abcdef"
SECRET = "5ec7e7" + "0" * 58
HELLO = {"version": 1, "purpose": "move", "move": MOVE, "secret": SECRET}
WHOLE = {
    "facts": {"kvm": False},
    "run": False,
    "through": ["gzip"],
    "announce": False,
    "clock": True,
    "postcopy": True,
    "from": {"host": "h", "path": "/p"},
}
# Of each frame: its reader, a right one, the error of a wrong one, and the fields that there are.
FRAMES: dict[str, tuple[Callable[[LinkFrame], Any], dict[str, Any], type[VmstateError]]] = {
    "hello": (Hello.of, {**HELLO, **WHOLE}, Damaged),
    "accept": (Accepted.of, {"findings": [{"level": "error", "text": "t", "hint": "h"}]}, CannotDo),
    "stand": (Stand.of, {"state": "loaded", "run": "paused", "proof": SECRET}, CannotDo),
    "challenge": (Challenge.of, {"nonce": SECRET}, CannotDo),
    "proof": (Proof.of, {"proof": SECRET}, Damaged),
    "loaded": (Loaded.of, {"bytes": 5}, CannotDo),
    "go": (Go.of, {"move": MOVE, "proof": SECRET}, InDoubt),
    "running": (Running.of, {"state": "running", "proof": SECRET}, InDoubt),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=8,
)


def frame(values: dict[str, Any]) -> LinkFrame:
    return LinkFrame(link.ACCEPT, values=values)


def test_a_hello_and_its_defaults() -> None:
    hello = Hello.of(frame({**HELLO, **WHOLE}))
    assert hello == ("move", MOVE, {"kvm": False}, False, ["gzip"], False, True, True, ("h", "/p"), SECRET, "")
    assert Hello.of(frame(HELLO)) == ("move", MOVE, {}, True, [], True, False, False, ("", ""), SECRET, "")
    asks = Hello.of(frame({**HELLO, "purpose": "settle", "nonce": SECRET[::-1]}))
    assert (asks.secret, asks.nonce) == ("", SECRET[::-1]), "to ask, the secret itself is not told"
    assert Hello.of(frame({"version": 1, "purpose": "settle"}))[1::9] == ("", "")


@pytest.mark.parametrize("name", FRAMES)
def test_fields_of_a_later_version_are_passed_over(name: str) -> None:
    read, values, _ = FRAMES[name]
    assert read(frame({**values, "later": [1]})) == read(frame(values))


def test_another_version_is_told_before_its_fields_are_read() -> None:
    with pytest.raises(CannotDo, match="the source speaks version 2 of the link, this side version 1"):
        Hello.of(frame({"version": 2, "purpose": 7, "move": None}))
    with pytest.raises(CannotDo, match="the source asks for 'dance', which this version does not know"):
        Hello.of(frame({"version": 1, "purpose": "dance", "move": None}))


@pytest.mark.parametrize("purpose", ["move", "grant", "resume"])
def test_what_is_for_one_move_names_it(purpose: str) -> None:
    with pytest.raises(Damaged, match="the source's hello: field 'move': expected a value, found none"):
        Hello.of(frame({"version": 1, "purpose": purpose}))


@pytest.mark.parametrize("secret", [SECRET.upper(), SECRET + "\n", SECRET[2:], [SECRET], int(SECRET, 16)])
def test_a_secret_is_in_no_error(secret: Any) -> None:
    with pytest.raises(Damaged, match="the source's hello: field 'secret': expected a text like ") as found:
        Hello.of(frame({**HELLO, "secret": secret}))
    assert "5ec7e7" not in str(found.value).lower()
    assert str(int(SECRET, 16))[:20] not in str(found.value)


def test_a_move_has_a_secret() -> None:
    with pytest.raises(Damaged, match="field 'secret': expected a value, found none"):
        Hello.of(frame({"version": 1, "purpose": "move", "move": MOVE}))


def test_what_has_no_known_level_is_an_error() -> None:
    found = Accepted.of(frame({"findings": [{"level": "disaster", "text": "x"}, {"level": "warning"}]})).findings
    assert found == [Finding("error", "x"), Finding("warning", "")]


def test_findings_travel() -> None:
    findings = [Finding("error", "a", "b"), Finding("warning", "c")]
    values = json.loads(json.dumps({"findings": messages.told(findings)}))
    assert Accepted.of(frame(values)).findings == findings
    many = messages.told(findings * messages.FINDINGS)
    assert len(Accepted.of(frame({"findings": many})).findings) == messages.FINDINGS


def test_a_finding_cannot_command_a_terminal() -> None:
    (found,) = Accepted.of(frame({"findings": [{"text": "\x1b[2J", "hint": "\ud800"}]})).findings
    assert (found.text, found.hint) == ("\\x1b[2J", "\\ud800")


def test_a_guest_that_has_no_run_state() -> None:
    assert Stand.of(frame({"state": "granted", "run": "", "proof": SECRET})).run == ""
    assert Stand.of(frame({"state": "granted", "proof": SECRET})).run == ""


@pytest.mark.parametrize("family", [CannotDo, Damaged, Misfit, InDoubt])
def test_a_refusal_travels(family: type[VmstateError]) -> None:
    there = messages.refused(frame(messages.refusal(family("no", *["because"] * 99))))
    assert type(there) is family
    assert str(there) == "the other side: no"
    assert there.hints == ("because",) * messages.HINTS


def test_one_without_a_word() -> None:
    assert str(messages.refused(frame({}))) == "the other side: it gave no reason"
    assert messages.refused(frame({"status": 77})).status == 1


def test_who_is_not_known_is_told_as_that() -> None:
    there = messages.refused(frame(json.loads(json.dumps(messages.refusal(Unknown())))))
    assert (type(there), there.status) == (Unknown, 1)
    assert str(there) == f"the other side: {Unknown()}"


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("hello", "version", "1"),
        ("hello", "version", True),
        ("hello", "purpose", ["move"]),
        ("hello", "move", MOVE.upper()),
        ("hello", "move", MOVE + "\n"),
        ("hello", "facts", []),
        ("hello", "run", 1),
        ("hello", "through", "gzip"),
        ("hello", "through", ["gzip"] * 9),
        ("hello", "through", [{}]),
        ("hello", "announce", None),
        ("hello", "clock", "no"),
        ("hello", "postcopy", {}),
        ("hello", "from", "h"),
        ("hello", "from", {"path": "x" * 4097}),
        ("hello", "from", {"host": 5}),
        ("accept", "findings", {}),
        ("accept", "findings", [{}] * 4097),
        ("accept", "findings", [{"text": 5}]),
        ("accept", "findings", [{"hint": "x" * 65537}]),
        ("stand", "state", "Loaded"),
        ("stand", "run", "r" * 33),
        ("stand", "proof", None),
        ("challenge", "nonce", SECRET[1:]),
        ("proof", "proof", SECRET.upper()),
        ("loaded", "bytes", -1),
        ("go", "move", None),
        ("go", "proof", []),
        ("running", "proof", 1),
        ("running", "state", "\x1b"),
    ],
)
def test_a_wrong_one_is_named(name: str, field: str, value: Any) -> None:
    read, values, family = FRAMES[name]
    with pytest.raises(family, match=f"field '{field}") as found:
        read(frame({**values, field: value}))
    assert type(found.value) is family


@pytest.mark.parametrize(("field", "value"), [("status", [1]), ("message", 5), ("hints", 5), ("hints", ["x"] * 65)])
def test_a_refusal_that_is_wrong_is_one_nevertheless(field: str, value: Any) -> None:
    there = messages.refused(frame({field: value}))
    assert (type(there), field in str(there)) == (CannotDo, True)


@given(st.data())
def test_whatever_comes_is_read_or_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(FRAMES)))
    read, values, family = FRAMES[name]
    wrong = data.draw(st.dictionaries(st.sampled_from(list(values)), JSON) | st.dictionaries(st.text(), JSON))
    try:
        read(frame({**values, **wrong}))
    except VmstateError as error:
        assert error.status == family.status or "version" in str(error)
    except Exception as error:
        raise AssertionError(f"{name} with {wrong}") from error


@given(st.dictionaries(st.sampled_from(("status", "message", "hints")), JSON))
def test_whatever_refuses_is_an_error(values: dict[str, Any]) -> None:
    assert isinstance(messages.refused(frame(values)), VmstateError)


FACTS = ("blocked", "blocks", "cpu", "devices", "disks", "host", "kvm", "machine", "nics", "qemu", "vcpus")


@given(st.dictionaries(st.sampled_from(FACTS), JSON), st.dictionaries(st.sampled_from(FACTS), JSON))
def test_whatever_is_known_of_a_guest_is_compared(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert all(isinstance(finding, Finding) for finding in compare(ours, theirs))
