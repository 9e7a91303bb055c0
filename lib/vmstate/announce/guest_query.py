"""What a guest's QEMU, and the agent in the guest, tell of its cards; and to have QEMU announce them itself."""

from typing import NamedTuple

from ..errors import CannotDo, Refused
from ..net.nic import Nic, announceable
from ..qemu import answers, control, guest_agent, state
from ..qemu.monitor import Monitor
from ..qemu.nics import from_info_network

# A guest that listens to more VLANs than that, to all of them perhaps, is not announced in each.
MOST_VLANS = 64


class Told(NamedTuple):
    """`further`: main MAC -> other MACs that the card takes frames for; `vlans`: main MAC -> VLANs it listens to.

    `addresses`: MAC -> addresses in the guest, as its agent tells; `silent`: why the agent told nothing, if so;
    `state`: the guest's run state.
    """

    nics: list[Nic]
    further: dict[str, tuple[str, ...]]
    vlans: dict[str, tuple[int, ...]]
    addresses: dict[str, tuple[str, ...]]
    silent: str | None
    state: str


def ask(path: str) -> Told:
    """One conversation with the monitor at `path`, one with the agent if there is one; CannotDo."""
    with Monitor(path) as monitor:
        state = _require_here(monitor, path)
        filters = answers.rx_filters(monitor)
        nics = from_info_network(answers.human(monitor, "info network"), monitor.pid(), filters)
        place = guest_agent.path_of(monitor)
    addresses, silent = _of_agent(place) if place else ({}, "the guest has no port for an agent")
    further = {entry.mac: unicast(entry) for entry in filters}
    return Told(nics, further, {entry.mac: vlans(entry) for entry in filters}, addresses, silent, state)


def _require_here(monitor: Monitor, path: str) -> str:
    """The run state; CannotDo where the guest was moved away: its frames would go to where it no longer is."""
    guest_state = state.query(monitor)
    if guest_state.given_away:
        raise CannotDo(f"the guest at {path} was moved away, and is to be announced where it runs", f"vm-status {path}")
    return guest_state.run


def unicast(entry: answers.RxFilter) -> tuple[str, ...]:
    """The further addresses of a card."""
    return tuple(mac for mac in dict.fromkeys(entry.unicast) if mac != entry.mac)


def vlans(entry: answers.RxFilter) -> tuple[int, ...]:
    """The VLANs that a card listens to beside untagged frames; none where it does not say which."""
    found = sorted(set(entry.vlans or ()) - {0})
    return tuple(found) if len(found) <= MOST_VLANS else ()


def _of_agent(path: str) -> tuple[dict[str, tuple[str, ...]], str | None]:
    try:
        told = guest_agent.addresses(path)
    except CannotDo as error:
        return {}, str(error)
    return {mac: tuple(filter(announceable, found)) for mac, found in told.items()}, None


def have_announced(path: str, rhythm: dict[str, int]) -> str:
    """Have QEMU announce all cards in a rhythm (as `settings.ANNOUNCE`); gives the guest's run state.

    A guest with virtio cards is asked to announce itself by that, with its addresses; CannotDo where QEMU cannot.
    """
    try:
        with Monitor(path) as monitor:
            state = _require_here(monitor, path)
            control.announce(monitor, rhythm)
            return state
    except Refused as error:
        raise CannotDo(f"the guest at {path} is not announced by its QEMU: {error.text}") from error
