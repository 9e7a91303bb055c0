"""The rounds: their moments, and what one card's failure is to the others."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.announce import rounds as announce_rounds
from vmstate.announce.lookup import Candidate
from vmstate.net import egress
from vmstate.net.nic import Nic

MAC = "52:54:00:12:34:56"
RARP = "ffffffffffff 525400123456 8035  0001 0800 06 04 0003  525400123456 00000000 525400123456 00000000" + "00" * 18


def test_schedule_is_qemus():
    assert announce_rounds.schedule() == [0, 50, 200, 450, 800]


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ((50, 550, 1, 100), [0]),
        ((50, 550, 9, 100), [0, 50, 200, 450, 800, 1250, 1800, 2350, 2900]),
        ((10, 100, 4, 0), [0, 10, 20, 30]),
        ((500, 100, 3, 10), [0, 100, 200]),
        ((0, 0, 3, 5), [0, 0, 0]),
    ],
)
def test_schedule_never_waits_longer_than_max(given_, expected):
    assert announce_rounds.schedule(*given_) == expected


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 50), st.integers(0, 500))
def test_schedule_waits_grow_up_to_max(initial, maximum, rounds, step):
    moments = announce_rounds.schedule(initial, maximum, rounds, step)
    waits = [later - sooner for sooner, later in zip(moments, moments[1:], strict=False)]
    assert len(moments) == rounds
    assert waits == sorted(waits)
    assert all(wait <= maximum for wait in waits)


class Sender:
    """Stands for the packet socket; 'bad' interfaces refuse."""

    def __init__(self):
        self.sent = []

    def sendto(self, frame, place):
        if place[0] == "bad":
            raise OSError(100, "Network is down")
        self.sent.append((place, frame))


def item(iface):
    return announce_rounds.Item(Candidate(egress.Egress(Nic(MAC, iface), iface), {None: "the line"}))


def test_one_that_fails_keeps_no_other_back():
    good, bad = item("good"), item("bad")
    sender = Sender()
    rounds = announce_rounds.Rounds(sender, [0, 1])
    events = [*rounds.start(bad), *rounds.start(good)]
    while (wait := rounds.wait()) is not None:
        time.sleep(wait)
        events += rounds.due()
    missed = [event for event in events if isinstance(event, announce_rounds.Missed)]
    assert missed == [announce_rounds.Missed(bad, number, "Network is down") for number in (1, 2)]
    assert sender.sent == [(("good", 0x8035), bytes.fromhex(RARP))] * 2
    assert (bad.failed, good.failed, good.done, good.sent) == (True, False, 2, 2)


def test_moments_do_not_drift(monkeypatch):
    """A round that takes long shortens the wait behind it."""
    now, waits = [1000.0], []

    class Slow(Sender):
        def sendto(self, frame, place):
            now[0] += 0.020

    monkeypatch.setattr(announce_rounds.time, "monotonic", lambda: now[0])
    rounds = announce_rounds.Rounds(Slow(), [0, 50, 60, 200])
    list(rounds.start(item("x")))
    while (wait := rounds.wait()) is not None:
        waits.append(round(wait, 6))
        now[0] += wait
        list(rounds.due())
    assert waits == [0.030, 0.110]
