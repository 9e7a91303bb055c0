"""What a line leaves out of a card, looked up beside the rounds: addresses, further MACs, VLANs.

Sources in their order: the line; the agent in the guest; the host's neighbour table.  Where one knows addresses of a
family, IPv4 or IPv6, the next one is not asked for that.  (What is heard of the card's own traffic comes on top.)
"""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import VmstateError
from ..net import neighbours as net_neighbours
from ..net.egress import Egress

if TYPE_CHECKING:
    from .guest_query import Told

LINE, QEMU, AGENT, NEIGHBOURS = "the line", "QEMU", "the guest's agent", "the host's neighbour table"
FILTER, FORWARDING, TRAFFIC = "QEMU's filter of the card", "the bridge's forwarding table", "the card's own traffic"


class Candidate(NamedTuple):
    """A card as it is to be announced: `why` has the source of each address, and of the card itself under None.

    fresh: the card itself is announced by this as well, and not only addresses of one that is.
    """

    place: Egress
    why: Mapping[str | None, str]
    tags: tuple[int, ...] = ()
    fresh: bool = True


class Silent(NamedTuple):
    """Somebody who was asked tells nothing.  serious: who had been named for that, and not just tried."""

    reason: str
    serious: bool = True


class Lookup:
    """Looks up in a thread, one job at a time; `fileno` is readable when `take` has something.

    guest: the QMP socket to ask, if any; told: what it has told already.
    """

    def __init__(self, guest: str | None = None, told: "Told | None" = None) -> None:
        self._guest = guest
        self._told = told
        self._waiting: deque[Sequence[Egress]] = deque()
        self._done: deque[list[Candidate] | Silent] = deque()
        self._wake, self._waker = os.pipe()
        self.jobs = 0

    def fileno(self) -> int:
        return self._wake

    def look(self, places: Sequence[Egress]) -> None:
        self.jobs += 1
        self._waiting.append(places)
        if self.jobs == 1:
            self._start()

    def take(self) -> list[Candidate] | Silent:
        """What was found; or that somebody tells nothing.  Waits where nothing was found yet."""
        os.read(self._wake, 1)
        found = self._done.popleft()
        if not isinstance(found, Silent):
            self.jobs -= 1
            if self.jobs:
                self._start()
        return found

    def _start(self) -> None:
        # Not before there is something to look up, which is after the first frames.
        from threading import Thread

        Thread(target=self._work, args=(self._waiting.popleft(),), daemon=True).start()

    def _work(self, places: Sequence[Egress]) -> None:
        found: list[Candidate] = []
        try:
            found = list(find(places, self._ask()))
        except (OSError, ValueError) as error:
            self._put(Silent(f"nothing could be looked up: {error}"))
        finally:
            # Whatever happened: somebody waits for it.
            self._put(found)

    def _put(self, what: "list[Candidate] | Silent") -> None:
        self._done.append(what)
        os.write(self._waker, b"\0")

    def _ask(self) -> "Told | None":
        if self._guest and not self._told:
            # Heavy, and of use only to who has a guest.
            from .guest_query import ask

            try:
                self._told = ask(self._guest)
            except VmstateError as error:
                self._put(Silent(str(error)))
                self._guest = None
            else:
                if self._told.silent:
                    self._put(Silent(self._told.silent, False))
        return self._told


def find(places: Sequence[Egress], told: "Told | None") -> Iterator[Candidate]:
    """What there is beyond the lines."""
    neighbours = net_neighbours.neighbours()
    learned = net_neighbours.learned() if any(place.tap for place in places) else {}
    ours = {place.nic.mac for place in places}
    for place in places:
        mac = place.nic.mac
        sources = ((AGENT, told.addresses if told else {}), (NEIGHBOURS, neighbours))
        if more := further(place.nic.addresses, [(why, known.get(mac, ())) for why, known in sources]):
            yield Candidate(place, dict(more), fresh=False)
        others = dict.fromkeys(learned.get(place.tap or "", ()), FORWARDING)
        others |= dict.fromkeys(told.further.get(mac, ()), FILTER) if told else {}
        for other, why in others.items():
            if other not in ours:
                ours.add(other)
                there = further((), [(name, known.get(other, ())) for name, known in sources])
                yield Candidate(place._replace(nic=place.nic._replace(mac=other, addresses=())), {None: why, **there})
        for vlan in told.vlans.get(mac, ()) if told else ():
            yield Candidate(place, {None: FILTER}, (vlan,))


def further(known: Sequence[str], sources: Sequence[tuple[str, Sequence[str]]]) -> dict[str | None, str]:
    """Address -> source of what the sources add: each one only in families in which those before it knew nothing."""
    have = {":" in address for address in known}
    found: dict[str | None, str] = {}
    for why, addresses in sources:
        new = [address for address in addresses if (":" in address) not in have]
        found |= dict.fromkeys(new, why)
        have |= {":" in address for address in new}
    return found
