"""The whole job: cards as they come, their rounds, what is looked up beside them, and who is heard meanwhile.

One loop waits for all of it.  A card is announced with what its line says before anything else is done about it.
"""

import select
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import CannotDo, Damaged
from ..net.egress import Egress, EgressFinder, packet_socket, steer
from ..net.frames import packed
from ..net.nic import Nic, announceable
from ..net.sniffer import Seen, Sniffer, address_told, is_for
from .lookup import LINE, QEMU, TRAFFIC, Candidate, Lookup, Silent
from .nic_input import Lines
from .rounds import Event, Item, Rounds

if TYPE_CHECKING:
    from .guest_query import Told


class AnnouncePlan(NamedTuple):
    """moments: of the rounds in ms; grace: how long an answer to the last one is waited for, in ms.

    tags: VLANs of every frame, from the outermost; given: the interface to send on whatever the lines say; guest: a QMP
    socket to ask; look_up: ask anybody beyond the lines; learn: seconds to listen to the cards' own traffic;
    until_heard: end a card's rounds with the first frame for it; again: a line that comes again counts again; each:
    every frame is an event; dry: send nothing.
    """

    moments: Sequence[int]
    grace: int = 0
    tags: tuple[int, ...] = ()
    given: str | None = None
    guest: str | None = None
    look_up: bool = True
    learn: float = 0.0
    until_heard: bool = False
    again: bool = False
    each: bool = False
    dry: bool = False


class Bad(NamedTuple):
    """A line that is none."""

    error: Damaged


class Nowhere(NamedTuple):
    """A card without an interface, or (error) one that cannot be announced there."""

    nic: Nic
    error: CannotDo | None = None


class Placed(NamedTuple):
    """A card that is announced; unsteered: why its bridge's entry could not be moved."""

    item: Item
    unsteered: str | None


class Heard(NamedTuple):
    """A frame for a card has come, so many ms after the card's first round."""

    item: Item
    ms: float


Happening = Event | Bad | Nowhere | Placed | Heard | Silent
Card = tuple[str, str, tuple[int, ...]]


class Announcer:
    """`run` gives what happens; CannotDo where nothing can be sent.  told: what the guest has told already, if so.

    items: what a dry run would have sent.
    """

    def __init__(self, plan: AnnouncePlan, told: "Told | None" = None) -> None:
        self.items: list[Item] = []
        self._plan = plan
        self._origin = QEMU if told else LINE
        self._egress_finder = EgressFinder(plan.given)
        self._rounds: Rounds | None = None
        self._lookup = Lookup(plan.guest, told) if plan.look_up else None
        self._new: list[Egress] = []
        self._known: dict[Card, set[str]] = {}
        # By interface, and there by MAC
        self._sniffers: dict[str, Sniffer] = {}
        self._wanted: dict[tuple[str, bytes], list[Item]] = {}
        self._learners: dict[tuple[str, bytes], tuple[float, Egress]] = {}

    def run(self, cards: Iterable[Nic | Damaged] = (), lines: Lines | None = None) -> Iterator[Happening]:
        yield from self._take(cards)
        while True:
            if self._rounds:
                yield from self._rounds.due()
            # Beside the rounds, so that these never wait for it.
            self._look_up()
            if not self._goes_on(lines):
                return
            yield from self._wait(lines)

    def _goes_on(self, lines: Lines | None) -> bool:
        now = time.monotonic()
        self._learners = {key: entry for key, entry in self._learners.items() if entry[0] > now}
        pending = self._rounds is not None and self._rounds.wait() is not None
        looking = self._lookup is not None and self._lookup.jobs > 0
        return bool((lines and lines.open) or pending or looking or self._learners)

    def _wait(self, lines: Lines | None) -> Iterator[Happening]:
        poll = select.poll()
        sniffers = {sniffer.fileno(): sniffer for sniffer in self._needed_sniffers()}
        watched = [*sniffers, *([lines.fd] if lines and lines.open else [])]
        for fd in [*watched, *([self._lookup.fileno()] if self._lookup else [])]:
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(self._patience())]
        if lines and lines.open and lines.fd in ready:
            yield from self._take(lines.read())
        if self._lookup and self._lookup.fileno() in ready:
            yield from self._use(self._lookup.take())
        for sniffer in [sniffers[fd] for fd in ready if fd in sniffers]:
            for seen in sniffer.frames():
                yield from self._hear(sniffer.iface, seen)

    def _patience(self) -> float | None:
        """Milliseconds."""
        waits = [end - time.monotonic() for end, _ in self._learners.values()]
        round_ = self._rounds.wait() if self._rounds else None
        waits += [] if round_ is None else [round_]
        return max(0.0, min(waits)) * 1000 if waits else None

    # cards

    def _take(self, cards: Iterable[Nic | Damaged]) -> Iterator[Happening]:
        for nic in cards:
            if isinstance(nic, Damaged):
                yield Bad(nic)
            elif nic.iface is None:
                yield Nowhere(nic)
            else:
                yield from self._announce(nic)

    def _announce(self, nic: Nic) -> Iterator[Happening]:
        try:
            place = self._egress_finder.of(nic)
        except CannotDo as error:
            yield Nowhere(nic, error)
            return
        if self._plan.again:
            self._known.pop(_card(place, self._plan.tags), None)
        if self._plan.learn:
            self._learners[place.own, packed(nic.mac)] = (time.monotonic() + self._plan.learn, place)
            yield from self._open_sniffer(place.own)
        why: dict[str | None, str] = {None: self._origin, **dict.fromkeys(nic.addresses, self._origin)}
        yield from self._start(Candidate(place, why, self._plan.tags))
        self._new.append(place)

    def _start(self, candidate: Candidate) -> Iterator[Happening]:
        """The first round of what is not announced yet."""
        key = _card(candidate.place, candidate.tags)
        known = self._known.get(key)
        addresses = {ip: source for ip, source in candidate.why.items() if ip and ip not in (known or ())}
        fresh = known is None and None in candidate.why
        if not (fresh or addresses):
            return
        self._known.setdefault(key, set()).update(addresses)
        why: dict[str | None, str] = {}
        why.update(addresses)
        if fresh:
            why[None] = candidate.why[None]
        item = Item(Candidate(candidate.place, why, candidate.tags, fresh))
        if self._plan.dry:
            self.items.append(item)
        else:
            yield from self._send(item, steer(item.place) if fresh else None)

    def _send(self, item: Item, unsteered: str | None) -> Iterator[Happening]:
        if not self._rounds:
            self._rounds = Rounds(packet_socket(), self._plan.moments, grace=self._plan.grace, each=self._plan.each)
        if self._plan.until_heard:
            yield from self._open_sniffer(item.place.own)
            self._wanted.setdefault((item.place.own, packed(item.mac)), []).append(item)
        yield from self._rounds.start(item)
        yield Placed(item, unsteered)

    def _look_up(self) -> None:
        if self._lookup and self._new:
            self._lookup.look(self._new)
        self._new = []

    def _use(self, found: list[Candidate] | Silent) -> Iterator[Happening]:
        if isinstance(found, Silent):
            yield found
            return
        for one in found:
            # Whoever names a VLAN knows in which one the card is.
            if not (self._plan.tags and one.tags):
                yield from self._start(one._replace(tags=one.tags or self._plan.tags))

    # what is heard

    def _needed_sniffers(self) -> list[Sniffer]:
        self._wanted = {key: left for key, items in self._wanted.items() if (left := [i for i in items if not i.ended])}
        needed = {iface for iface, _ in (*self._wanted, *self._learners)}
        for iface in [iface for iface in self._sniffers if iface not in needed]:
            self._sniffers.pop(iface).close()
        return list(self._sniffers.values())

    def _open_sniffer(self, iface: str) -> Iterator[Happening]:
        if iface not in self._sniffers:
            try:
                self._sniffers[iface] = Sniffer(iface)
            except OSError as error:
                yield Silent(f"nothing can be heard on {iface}: {error.strerror or error}")

    def _hear(self, iface: str, seen: Seen) -> Iterator[Happening]:
        for item in self._wanted.get((iface, seen.data[:6]), ()):
            if not item.ended and is_for(packed(item.mac), seen, item.place.tap is not None) and self._rounds:
                yield Heard(item, (time.monotonic() - item.start) * 1000)
                yield from self._rounds.end(item)
        _, place = self._learners.get((iface, seen.data[6:12]), (0.0, None))
        if place:
            address = address_told(seen.data)
            why: dict[str | None, str] = {None: TRAFFIC}
            if address and announceable(address):
                why[address] = TRAFFIC
            if len(why) > 1 or seen.tags:
                yield from self._start(Candidate(place, why, seen.tags or self._plan.tags))


def _card(place: Egress, tags: tuple[int, ...]) -> Card:
    return place.iface, place.nic.mac, tags
