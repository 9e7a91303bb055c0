"""The talk with an agent that says what a real one says only at a bad moment, or never."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vmstate.errors import CannotDo
from vmstate.qemu.guest_agent import Agent, addresses, set_time, time_of

MAC = "52:54:00:00:00:0c"
Answers = Callable[[dict[str, Any]], bytes]


def line(said: Any) -> bytes:
    return json.dumps(said).encode() + b"\n"


def synced(command: dict[str, Any]) -> bytes:
    return b"\xff" + line({"return": command["arguments"]["id"]})


class Fake:
    """Listens at `path`; each command is answered with what `answers` has for its name."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.answers: dict[str, Answers] = {"guest-sync-delimited": synced}
        self.heard: list[str] = []
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen(0)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def says(self, command: str, said: Any) -> None:
        self.answers[command] = lambda _: said if isinstance(said, bytes) else line(said)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with client, client.makefile("rb") as commands:
                for text in commands:
                    command = json.loads(text.removeprefix(b"\xff"))
                    self.heard.append(command["execute"])
                    try:
                        client.sendall(self.answers[command["execute"]](command))
                    except OSError:
                        break

    def end(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(10)


@pytest.fixture
def fake(work: Path) -> Iterator[Fake]:
    made = Fake(work / "agent")
    yield made
    made.end()


@pytest.mark.parametrize(
    "stale",
    [
        line({"return": 1}),
        line({"error": {"class": "GenericError", "desc": "JSON parse error"}}),
        b"\xff" + line({"return": 7}),
        b'{"return": {"ha',
        b'{"return": {"ha\xff' + line({"return": 7}) + b"\n\n\xff\xff",
    ],
)
def test_stale_answers(fake: Fake, stale: bytes) -> None:
    fake.answers["guest-sync-delimited"] = lambda command: stale + synced(command)
    fake.says("guest-get-time", {"return": 5})
    assert time_of(fake.path) == 5


def test_no_command_leaves_before_the_agent_has_answered(fake: Fake) -> None:
    fake.answers["guest-sync-delimited"] = lambda _: line({"return": 1})
    with pytest.raises(CannotDo, match="does not answer within 0.3 s"):
        set_time(fake.path, 0.3)
    assert fake.heard == ["guest-sync-delimited"]


def test_the_deadline_is_for_everything(fake: Fake) -> None:
    def slow(_: dict[str, Any]) -> bytes:
        time.sleep(0.2)
        return line({"return": 5})

    fake.answers["guest-get-time"] = slow
    begun = time.monotonic()
    with pytest.raises(CannotDo, match="does not answer"), Agent(fake.path, 0.5) as agent:
        for _ in range(10):
            agent.ask("guest-get-time")
    assert time.monotonic() - begun < 1.5


def test_an_answer_without_an_end(fake: Fake) -> None:
    fake.says("guest-get-time", b"[" * (2 << 20))
    with pytest.raises(CannotDo, match="broke off"):
        time_of(fake.path)


@pytest.mark.parametrize(
    "said", [b"x\n", b"\xfe\n", b"[]\n", b"5\n", b"[" * 100000 + b"\n", b"{}\n", b'{"error": 1}\n']
)
def test_what_is_no_answer(fake: Fake, said: bytes) -> None:
    fake.says("guest-get-time", said)
    with pytest.raises(CannotDo, match="refuses 'guest-get-time'") as error:
        time_of(fake.path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("told", ["5", None, 1.5, {}, []])
def test_a_time_that_is_none(fake: Fake, told: Any) -> None:
    fake.says("guest-get-time", {"return": told})
    with pytest.raises(CannotDo, match="field 'return': expected a whole number"):
        time_of(fake.path)


@pytest.mark.parametrize(("off", "well"), [(0, True), (-(10**11), False)])
def test_a_clock_that_is_set_while_the_chip_is_not(fake: Fake, off: int, well: bool) -> None:
    fake.says("guest-set-time", {"error": {"class": "GenericError", "desc": "hwclock failed\x1b[2J"}})
    fake.answers["guest-get-time"] = lambda _: line({"return": time.time_ns() + off})
    if well:
        set_time(fake.path)
    else:
        with pytest.raises(CannotDo, match=r"refuses 'guest-set-time': 'hwclock failed\\x1b\[2J'"):
            set_time(fake.path)


def test_addresses(fake: Fake) -> None:
    def address(text: Any) -> dict[str, Any]:
        return {"ip-address": text, "ip-address-type": "ipv4", "prefix": 24}

    cards: list[Any] = [
        {"name": "lo", "hardware-address": "00:00:00:00:00:00", "ip-addresses": [address("127.0.0.1")]},
        {"name": "tun0", "ip-addresses": [address("10.8.0.2")]},
        {"name": "eth0", "hardware-address": "52:54:00:00:00:0A", "ip-addresses": [address("192.0.2.7")]},
        {
            "name": "eth0.5",
            "hardware-address": "52:54:00:00:00:0a",
            "ip-addresses": [address("fe80::1"), address("::1")],
        },
        {"name": "br0", "hardware-address": "52:54:00:00:00:0a", "ip-addresses": [address("192.0.2.7")]},
        {"name": "eth1", "hardware-address": "52:54:00:00:00:0b"},
        {"name": "ib0", "hardware-address": "80:00:02:08:fe:80:00:00", "ip-addresses": [address("192.0.2.8")]},
    ]
    fake.says("guest-network-get-interfaces", {"return": cards})
    assert addresses(fake.path) == {
        "52:54:00:00:00:0a": ["192.0.2.7", "fe80::1"],
        "52:54:00:00:00:0b": [],
    }


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (5, "field 'return': expected a list, found 5"),
        (["eth4"], r"field 'return\[0\]': expected an object, found 'eth4'"),
        ([{"hardware-address": 5}], r"field 'return\[0\].hardware-address': expected a text, found 5"),
        ([{"hardware-address": MAC, "ip-addresses": 5}], r"field 'return\[0\].ip-addresses': expected a list, found 5"),
        ([{"hardware-address": MAC, "ip-addresses": [{}]}], r"\[0\].ip-address': expected a value, found none"),
        (
            [{"hardware-address": MAC, "ip-addresses": [{"ip-address": "x\n"}]}],
            r"\[0\].ip-address': expected an IP address, found 'x\\n'",
        ),
    ],
)
def test_addresses_that_are_none(fake: Fake, told: Any, words: str) -> None:
    fake.says("guest-network-get-interfaces", {"return": told})
    with pytest.raises(CannotDo, match=words):
        addresses(fake.path)


def test_a_queue_that_is_full(fake: Fake) -> None:
    held = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    try:
        for number, client in enumerate(held):
            client.setblocking(False)
            try:
                client.connect(fake.path)
            except BlockingIOError:
                break
            if number == 0:
                time.sleep(0.2)
        begun = time.monotonic()
        with pytest.raises(CannotDo, match="does not answer within 0.3 s"):
            time_of(fake.path, 0.3)
        assert time.monotonic() - begun < 1
    finally:
        for client in held:
            client.close()
