"""What happens during an announcement, in words and in JSON, and what becomes of the exit status by it."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import CannotDo, Damaged, VmstateError
from ..net.egress import Egress, lower_of
from ..report import Report
from .announcer import Bad, Happening, Heard, Nowhere, Placed
from .lookup import Silent
from .rounds import Item, Missed, Over, Sent

FORMS = {"rarp": "RARP", "arp-request": "ARP", "advertisement": "ND"}
# Of thousands of lines with the same fault so many are told; the rest is counted.
MOST = 20


class Narrator:
    """`status` is that of the command so far.  say: for what has been asked for; until_heard: whether that has been.

    at_once: the warnings that are otherwise put together at the end.  fail: for a card or line that cannot be
    announced, as an error unless told.
    """

    def __init__(
        self,
        report: Report,
        say: Callable[[str], Any],
        *,
        until_heard: bool = False,
        at_once: bool = False,
        fail: Callable[[VmstateError], Any] | None = None,
    ) -> None:
        self.status = 0
        self._report = report
        self._say = say
        self._until_heard = until_heard
        self._at_once = at_once
        self._report_failure = fail or report.error
        self._times: Counter[str] = Counter()
        self._unsteered: dict[Egress, str] = {}
        self._heard: set[Item] = set()
        self._missed: Counter[tuple[str, str]] = Counter()

    def tell(self, what: Happening) -> None:
        match what:
            case Sent():
                self._record("frame", what.item, **_frame_values(what))
            case Missed():
                self._missed_round(what)
            case Placed():
                self._placed(what)
            case Over():
                self._over(what.item)
            case Heard():
                self._heard_of(what)
            case Nowhere():
                self._nowhere(what)
            case Bad():
                self._fail(what.error, "lines are no NIC lines")
            case Silent():
                (self._report.warning if what.serious else self._report.note)(what.reason)

    def end(self) -> None:
        """What can only be said when all is over."""
        self._tell_unsteered()
        for (iface, reason), count in self._missed.items():
            if count > 1:
                self._report.warning(f"the same {count - 1} times more on {iface}: {reason}")
        for what, count in self._times.items():
            if count > MOST:
                self._report.warning(f"{count - MOST} more {what}")

    def _fail(self, error: CannotDo | Damaged, what: str) -> None:
        self.status = max(self.status, error.status)
        self._times[what] += 1
        if self._times[what] <= MOST:
            self._report_failure(error)

    def _nowhere(self, what: Nowhere) -> None:
        if what.error is None:
            self._report.note(f"{what.nic.mac} has no interface on this host")
            return
        error = CannotDo(f"{what.nic.mac} is not announced: {what.error}", *what.error.hints)
        self._fail(error, "cards are not announced")

    def _placed(self, what: Placed) -> None:
        self._report.note(where(what.item))
        if what.unsteered:
            self._unsteered[what.item.place] = what.unsteered
            if self._at_once:
                self._tell_unsteered()

    def _tell_unsteered(self) -> None:
        if not self._unsteered:
            return
        places = list(self._unsteered)
        which = ", ".join(f"{place.nic.mac} to {place.tap}" for place in places[:MOST])
        which += f" and {len(places) - MOST} more" if len(places) > MOST else ""
        why = "; ".join(dict.fromkeys(self._unsteered.values()))
        self._unsteered = {}
        self._report.warning(f"forwarding entries were not moved in their bridge, {which}: {why}")
        self._report.hint(
            "it needs CAP_NET_ADMIN and a port that forwards; else the bridge learns with the guest's first frame"
        )

    def _missed_round(self, what: Missed) -> None:
        """A card that the first round missed has failed; what a later one misses had been told before."""
        item, text = what.item, f"round {what.round} on {what.item.place.iface}: {what.reason}"
        if what.round == 1:
            self._fail(CannotDo(f"{item.mac} is not announced: {text}"), "cards are not announced")
            return
        self._missed[item.place.iface, what.reason] += 1
        if self._missed[item.place.iface, what.reason] == 1:
            self._report.warning(f"{item.mac}: {text}")

    def _over(self, item: Item) -> None:
        if self._until_heard and item not in self._heard:
            self._answer(item, f"{item.mac} was not heard of on {item.place.own} in {_rounds(item)}", None)
        self._heard.discard(item)
        if item.failed:
            return
        if item.left is None:
            self._report.note(f"{item.mac}: it could not be seen whether frames left {item.place.iface}")
        elif item.left < item.sent:
            self._report.warning(f"{item.mac}: of {item.sent} frames {item.left} have left {item.place.iface}")
        else:
            self._report.note(f"{item.mac}: {item.left} frames have left {item.place.iface}")
        self._record("announced", item, rounds=item.done, sent=item.sent, left=item.left)

    def _heard_of(self, what: Heard) -> None:
        self._heard.add(what.item)
        text = f"{what.item.mac} was heard of on {what.item.place.own} after {what.ms:.0f} ms, {_rounds(what.item)}"
        self._answer(what.item, text, round(what.ms, 3))

    def _answer(self, item: Item, text: str, ms: float | None) -> None:
        if self._report.as_json:
            self._record("heard", item, rounds=item.done, ms=ms)
        else:
            self._say(text)

    def _record(self, kind: str, item: Item, **values: Any) -> None:
        if self._report.as_json:
            self._report.record(kind, sys.stdout, **item_values(item), **values)


def _rounds(item: Item) -> str:
    return f"{item.done} round{'s' if item.done != 1 else ''}"


def _frame_values(what: Sent) -> dict[str, Any]:
    frame = what.frame
    return {"frame": frame.kind, "address": frame.address, "round": what.round, "ms": round(what.ms, 3)}


def item_values(item: Item) -> dict[str, Any]:
    """A card in JSON."""
    place = item.place
    return {
        "mac": item.mac,
        "addresses": list(item.addresses),
        "iface": place.iface,
        "tap": place.tap,
        "vlan": list(item.tags),
    }


def where(item: Item) -> str:
    """Where a card is announced, in words."""
    place = item.place
    behind = f", the bridge of {place.tap}" if place.tap else ""
    if lower := lower_of(place.iface):
        behind = f", which leads to {lower}"
    tags = f" in VLAN {'.'.join(map(str, item.tags))}" if item.tags else ""
    return f"{item.mac} is announced on {place.iface}{behind}{tags}"


def would(item: Item, moments: Sequence[int]) -> str:
    """What would be sent of a card, why, and when; one line."""
    frames = {(frame.kind, frame.address) for frame in item.frames if frame.kind in FORMS}
    order = {address: number for number, address in enumerate([None, *item.addresses])}
    parts = [
        f"{FORMS[kind]} {address} ({item.why[address]})" if address else f"{FORMS[kind]} ({item.why[None]})"
        for kind, address in sorted(frames, key=lambda pair: order[pair[1]])
    ]
    return f"{where(item)}: {', '.join(parts)}; at {' '.join(map(str, moments))} ms"


def would_values(item: Item, moments: Sequence[int]) -> dict[str, Any]:
    """The same for JSON, with the frames byte for byte."""
    frames = [
        {"frame": frame.kind, "address": frame.address, "why": item.why[frame.address], "bytes": frame.data.hex()}
        for frame in item.frames
    ]
    return {**item_values(item), "frames": frames, "moments": list(moments)}
