"""Rounds of frames for many cards, each card in its own time from the moment that it came."""

import heapq
import itertools
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..net.egress import send
from ..net.frames import EthernetFrame, of_addresses, of_card
from ..net.sniffer import Sniffer
from .lookup import Candidate


class Item:
    """What is announced of one card together; `done` rounds of it, `sent` frames, of which `left` left the interface.

    left: None where that could not be seen.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.place, self.why, self.tags = candidate.place, candidate.why, candidate.tags
        addresses = [address for address in candidate.why if address is not None]
        make = of_card if candidate.fresh else of_addresses
        self.frames = make(self.place.nic.mac, addresses, self.tags)
        self.addresses = tuple(addresses)
        self.start = 0.0
        self.done = 0
        self.sent = 0
        self.left: int | None = None
        self.failed = False
        self.ended = False

    @property
    def mac(self) -> str:
        return self.place.nic.mac


class Sent(NamedTuple):
    """ms: since the card's first round."""

    item: Item
    frame: EthernetFrame
    round: int
    ms: float


class Missed(NamedTuple):
    """A round, counted from 1, that could not be sent."""

    item: Item
    round: int
    reason: str


class Over(NamedTuple):
    """The rounds of a card are over."""

    item: Item


Event = Sent | Missed | Over


class Rounds:
    """moments: of the rounds, in ms from the first.  grace: how long a card's end waits behind its last round, in ms.

    each: whether every frame is an event.
    """

    def __init__(self, sender: socket.socket, moments: Sequence[int], *, grace: int = 0, each: bool = False) -> None:
        self._sender, self._moments, self._grace, self._each = sender, moments, grace, each
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, Item]] = []
        self._witnesses = Witnesses()

    def start(self, item: Item) -> Iterator[Event]:
        """The first round, at once."""
        item.start = time.monotonic()
        self._witnesses.expect(item)
        yield from self._next(item)

    def due(self) -> Iterator[Event]:
        """All rounds whose time has come."""
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, item = heapq.heappop(self._waiting)
            if not item.ended:
                yield from self._next(item)

    def end(self, item: Item) -> Iterator[Event]:
        """No more rounds of this one."""
        if not item.ended:
            item.ended = True
            item.left = self._witnesses.count(item)
            yield Over(item)

    def wait(self) -> float | None:
        """Seconds to the next round; None where all are over."""
        while self._waiting and self._waiting[0][2].ended:
            heapq.heappop(self._waiting)
        return max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None

    def _next(self, item: Item) -> Iterator[Event]:
        if item.done == len(self._moments):
            yield from self.end(item)
            return
        item.done += 1
        yield from self._send(item)
        self._witnesses.look(item.place.iface)
        last = item.done == len(self._moments)
        if last and not self._grace:
            yield from self.end(item)
            return
        moment = self._moments[-1] + self._grace if last else self._moments[item.done]
        heapq.heappush(self._waiting, (item.start + moment / 1000, next(self._order), item))

    def _send(self, item: Item) -> Iterator[Event]:
        try:
            for frame in item.frames:
                send(self._sender, item.place, frame.data)
                item.sent += 1
                if self._each:
                    yield Sent(item, frame, item.done, (time.monotonic() - item.start) * 1000)
        except OSError as error:
            item.failed |= item.done == 1
            yield Missed(item, item.done, error.strerror or str(error))


class Witnesses:
    """Sees our frames leave: a second packet socket on each interface gets what is handed to its driver."""

    def __init__(self) -> None:
        self._sniffers: dict[str, Sniffer | None] = {}
        self._seen: Counter[tuple[str, bytes]] = Counter()
        self._expected: Counter[tuple[str, bytes]] = Counter()

    def expect(self, item: Item) -> None:
        iface = item.place.iface
        if item.place.switched:
            # They leave by ports of the switch, not by this interface.
            return
        sniffer = self._sniffers.get(iface)
        if not sniffer or not sniffer.is_there():
            try:
                self._sniffers[iface] = Sniffer(iface, all=False)
            except OSError:
                self._sniffers[iface] = None
        self._expected.update((iface, frame.data) for frame in item.frames)

    def look(self, iface: str) -> None:
        sniffer = self._sniffers.get(iface)
        for data in sniffer.raw() if sniffer else ():
            if (iface, data) in self._expected:
                self._seen[iface, data] += 1

    def count(self, item: Item) -> int | None:
        """How many of its frames have left; it is not expected any longer."""
        iface = item.place.iface
        if item.place.switched:
            return None
        self.look(iface)
        total = 0
        for frame in item.frames:
            key = (iface, frame.data)
            # Two lines of one card send the same frames.
            share = min(self._seen[key], item.done)
            self._seen[key] -= share
            total += share
            self._expected[key] -= 1
            if not self._expected[key]:
                del self._expected[key], self._seen[key]
        return None if self._sniffers.get(iface) is None else total


def schedule(initial: int = 50, maximum: int = 550, rounds: int = 5, step: int = 100) -> list[int]:
    """The moments of the rounds in ms; QEMU's announce-initial, -max, -rounds and -step: 0, 50, 200, 450, 800."""
    moments = [0]
    for number in range(rounds - 1):
        moments.append(moments[-1] + wait_behind(number, initial, maximum, step))
    return moments


def wait_behind(number: int, initial: int, maximum: int, step: int) -> int:
    """The wait in ms behind a round, counted from 0."""
    return min(initial + number * step, maximum)
