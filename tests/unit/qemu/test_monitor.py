"""The conversation with a monitor that does what a real one does only at a bad moment, or never."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qmp_server import CLOSE, GREETING, SILENCE, QmpServer, empty
from vmstate.errors import CannotDo, GuestGone, Refused
from vmstate.qemu import monitor
from vmstate.qemu.monitor import LONGEST, Decoder, Malformed, Monitor, StandsStill

EVENT = {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}, "data": {"words": 'a "}{" \\ ü'}}


@pytest.fixture
def place(work: Path) -> Path:
    return work / "qmp"


def answering(**answers: Any) -> Callable[[dict[str, Any]], Any]:
    """The negotiation goes well; other commands are answered with what `answers` has, and nothing else."""

    def answer(command: dict[str, Any]) -> Any:
        name = command.get("execute") or command.get("exec-oob")
        said = answers.get(str(name).replace("-", "_"), ({"return": {}},))
        return [one if not isinstance(one, dict) else {**one, "id": command["id"]} for one in said]

    return answer


# the decoder


@pytest.mark.parametrize("indent", [None, 4])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_every_split_of_the_bytes(indent: int | None, end: str) -> None:
    """One object is cut at each byte, also within a character; with `pretty=on` it has lines of its own."""
    said = {"return": [EVENT, {}, "}", 1.5, None]}
    data = json.dumps(said, indent=indent, ensure_ascii=False).encode() + end.encode()
    for cut in range(len(data) + 1):
        decoder = Decoder()
        decoder.feed(data[:cut])
        first = decoder.take()
        decoder.feed(data[cut:])
        assert (first or decoder.take()) == said
        assert decoder.take() is None


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none())), st.integers(1, 40))
def test_objects_in_pieces_of_any_size(objects: list[dict[str, Any]], size: int) -> None:
    data = b"".join(json.dumps(one).encode() + b"\r\n" for one in objects)
    decoder, found = Decoder(), []
    for at in range(0, len(data), size):
        decoder.feed(data[at : at + size])
        while (one := decoder.take()) is not None:
            found.append(one)
    assert found == objects


@pytest.mark.parametrize("data", [b"QEMU 7.2 monitor\n(qemu) ", b"[1]\n", b"null\n", b'{"a":' * 100_000])
def test_what_is_no_qmp(data: bytes) -> None:
    decoder = Decoder()
    decoder.feed(data)
    with pytest.raises(Malformed):
        decoder.take()


def test_what_has_no_end_is_not_kept() -> None:
    decoder, piece = Decoder(), b'{"return": "' + b"x" * (64 << 10)
    with pytest.raises(Malformed):
        for _ in range(2 * LONGEST // len(piece)):
            decoder.feed(piece)
            assert decoder.take() is None


def test_a_long_answer_costs_little() -> None:
    """Not tried again for each piece: linear in what comes."""
    data = json.dumps({"return": ["x" * 30] * 100_000}).encode()
    decoder, begun = Decoder(), time.process_time()
    for at in range(0, len(data), 1000):
        decoder.feed(data[at : at + 1000])
        assert decoder.take() is None or at + 1000 >= len(data)
    assert time.process_time() - begun < 5


# the conversation


@pytest.mark.parametrize("pieces", [1, 7, 1 << 20])
def test_a_conversation(place: Path, pieces: int) -> None:
    answer = answering(query_status=(EVENT, {"return": {"status": "running"}}, EVENT))
    with QmpServer(place, answer, pieces=pieces) as server, Monitor(server.path) as client:
        assert client.ask("query-status", some_name=1) == {"status": "running"}
        assert client.event(1)["event"] == "STOP"  # type: ignore[index]
        assert client.event(5)["data"] == EVENT["data"]  # type: ignore[index]
        assert client.event(0.01) is None
        assert client.pid() == os.getpid()
    assert server.heard[1]["arguments"] == {"some-name": 1}


def test_a_pretty_monitor(place: Path) -> None:
    def pretty(command: dict[str, Any]) -> Any:
        return (json.dumps({"return": {"a": {"b": []}}, "id": command["id"]}, indent=4).encode() + b"\n",)

    greeting = (json.dumps(GREETING, indent=4).encode() + b"\n",)
    with QmpServer(place, pretty, greeting=greeting, pieces=3) as server, Monitor(server.path) as client:
        assert client.ask("query") == {"a": {"b": []}}


def test_events_between_greeting_and_negotiation(place: Path) -> None:
    def answer(command: dict[str, Any]) -> Any:
        return EVENT, *empty(command)

    with QmpServer(place, answer, greeting=(GREETING, EVENT)) as server, Monitor(server.path) as client:
        assert client.ask("anything") == {}
        assert [client.event(1), client.event(1), client.event(1)] == [EVENT] * 3


def test_events_that_nobody_asks_for_are_not_kept_for_ever(place: Path) -> None:
    answer = answering(many=[b'{"event": "X"}\n' * (10 * monitor.EVENTS), {"return": {}}])
    with QmpServer(place, answer) as server, Monitor(server.path) as client:
        assert client.ask("many") == {}
        count = 0
        while client.event(0.01):
            count += 1
        assert count == monitor.EVENTS


@pytest.mark.parametrize("capabilities", [[], ["oob"], None, "oob"])
def test_out_of_band_where_it_is_offered(place: Path, capabilities: Any) -> None:
    offers = capabilities == ["oob"]
    greeting = {"QMP": {"capabilities": capabilities}}
    with QmpServer(place, greeting=(greeting,)) as server, Monitor(server.path) as client:
        client.ask_oob("migrate-recover")
        client.ask("query-status")
    assert server.heard[0]["arguments"] == {"enable": ["oob"] if offers else []}
    assert [("exec-oob" in command) for command in server.heard[1:]] == [offers, False]


def test_what_cannot_be_given_out_of_band(place: Path) -> None:
    def answer(command: dict[str, Any]) -> Any:
        if "exec-oob" in command:
            return ({"error": {"class": "GenericError", "desc": "no such"}, "id": command["id"]},)
        return empty(command)

    with QmpServer(place, answer) as server, Monitor(server.path) as client:
        assert client.ask_oob("stop") == {}


def test_a_descriptor_comes_with_its_command(place: Path) -> None:
    with QmpServer(place) as server:
        with open("/dev/null", "rb") as file, Monitor(server.path) as client:
            client.send_fd("vmstate", file.fileno())
            here = os.fstat(file.fileno())
        assert server.heard[-1]["arguments"] == {"fdname": "vmstate"}
        (there,) = server.taken
        assert os.fstat(there).st_rdev == here.st_rdev


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ({"class": "GenericError", "desc": "not now"}, "not now"),
        ({"class": "GenericError"}, "GenericError"),
        ("no object", "no object"),
        (7, "7"),
    ],
)
def test_qemu_refuses(place: Path, error: Any, words: str) -> None:
    with QmpServer(place, answering(stop=({"error": error},))) as server, Monitor(server.path) as client:
        with pytest.raises(Refused, match=words) as caught:
            client.ask("stop")
        assert words in caught.value.text
        # It goes on.
        assert client.ask("cont") == {}


def test_an_answer_to_another_command_is_none(place: Path) -> None:
    def answer(command: dict[str, Any]) -> Any:
        return {"return": "old", "id": command["id"] - 1}, {"return": "odd", "id": "x"}, *empty(command)

    with QmpServer(place, answer) as server, Monitor(server.path) as client:
        assert client.ask("query") == {}


# bad ends


@pytest.mark.parametrize("last", [(CLOSE,), (b'{"return": {', CLOSE)])
def test_qemu_dies_at_each_step(place: Path, last: Any) -> None:
    with QmpServer(place, greeting=last) as server, pytest.raises(GuestGone, match="went away"):
        Monitor(server.path).__enter__()
    place.unlink()
    with QmpServer(place, lambda _: last) as server, pytest.raises(GuestGone, match="during 'qmp_capabilities'"):
        Monitor(server.path).__enter__()
    place.unlink()
    with QmpServer(place, answering(stop=last)) as server, Monitor(server.path) as client:
        with pytest.raises(GuestGone, match="during 'stop'"):
            client.ask("stop")
        with pytest.raises(GuestGone):
            client.ask("cont")
    place.unlink()
    with QmpServer(place, answering(stop=last)) as server, Monitor(server.path) as client:
        with pytest.raises(GuestGone):
            client.ask("stop")
        with pytest.raises(GuestGone):
            client.event(1)


@pytest.mark.parametrize("greeting", [SILENCE, GREETING])
def test_nobody_greets_or_negotiates(place: Path, greeting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with QmpServer(place, lambda _: (SILENCE,), greeting=(greeting,)) as server:
        begun = time.monotonic()
        with pytest.raises(CannotDo, match="another client holds it"):
            Monitor(server.path, 0.3).__enter__()
        assert time.monotonic() - begun < 3
        monkeypatch.setattr(monitor.userfault, "waits", lambda _: True)
        with pytest.raises(StandsStill):
            Monitor(server.path, 0.3).__enter__()


def test_no_answer_comes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "ANSWER", 0.3)
    with QmpServer(place, answering(stop=(SILENCE,))) as server, Monitor(server.path) as client:
        with pytest.raises(CannotDo, match="no answer to 'stop'"):
            client.ask("stop")
        # One that is late is not taken for that of the next.
        assert client.ask("cont") == {}


@pytest.mark.parametrize("said", [b"SSH-2.0\r\n", b"[]\n", b"{}\n", b'{"QMP": 1}\n', b"\xff\xfe\n"])
def test_it_speaks_something_else(place: Path, said: bytes) -> None:
    with QmpServer(place, greeting=(said,)) as server, pytest.raises(CannotDo, match="does not speak QMP"):
        Monitor(server.path, 1).__enter__()


def test_it_begins_to_speak_something_else(place: Path) -> None:
    said = answering(stop=(b"oops\n",))
    words = "does not speak QMP"
    with QmpServer(place, said) as server, Monitor(server.path) as client, pytest.raises(CannotDo, match=words):
        client.ask("stop")


def test_nobody_listens(place: Path) -> None:
    with pytest.raises(GuestGone, match="no guest at"):
        Monitor(str(place)).__enter__()
    place.touch()
    with pytest.raises(GuestGone, match="nobody listens there"):
        Monitor(str(place)).__enter__()


def test_one_that_was_left(place: Path) -> None:
    with QmpServer(place) as server:
        client = Monitor(server.path).__enter__()
        client.leave()
        client.leave()
        with pytest.raises(GuestGone):
            client.ask("stop")


def test_a_busy_one_is_waited_for(place: Path) -> None:
    """The conversation begins when that of another client has ended."""
    with QmpServer(place) as server:
        first = Monitor(server.path).__enter__()
        threading.Timer(0.5, first.leave).start()
        with Monitor(server.path, 5) as second:
            assert second.ask("query") == {}


def test_a_signal_ends_a_wait(place: Path) -> None:
    class Ended(Exception):
        pass

    def end(_number: int, _frame: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGALRM, end)
    try:
        with QmpServer(place, answering(stop=(SILENCE,))) as server, Monitor(server.path) as client:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(Ended):
                client.ask("stop")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_full_socket_is_waited_for(place: Path) -> None:
    """A command that is longer than what the socket takes at once."""
    with QmpServer(place) as server, Monitor(server.path) as client:
        assert client.ask("object-add", data="x" * (1 << 20)) == {}
    assert len(server.heard[-1]["arguments"]["data"]) == 1 << 20


def test_no_descriptor_is_left(place: Path) -> None:
    count = len(os.listdir("/proc/self/fd"))
    for path in (place, place.with_name("none")):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            for _ in range(5):
                with pytest.raises(CannotDo):
                    Monitor(str(path), 0.01).__enter__()
    assert len(os.listdir("/proc/self/fd")) == count
