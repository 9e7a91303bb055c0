"""The one decision of a migration over a link: grant the guest to its destination, or take it back.

Source: docs/link.md, "Who stands where".
"""

import contextlib
from typing import Any

from ..errors import GuestGone, Refused
from ..qemu import markers
from ..qemu.control import run_on
from ..qemu.monitor import Monitor
from ..qemu.state import GuestState, query


def migration_state(path: str) -> dict[str, Any]:
    """`state` is a row of docs/link.md, `run` QEMU's run state, `move` the number, `facts` those of the mark."""
    try:
        with Monitor(path) as monitor:
            guest_state, found = query(monitor), markers.read(monitor)
    except GuestGone:
        return {"state": "gone"}
    return {"state": state_of(guest_state, found), "run": guest_state.run, **_facts(found)}


def state_of(guest_state: GuestState, found: markers.Marks) -> str:
    if guest_state.migration.startswith("postcopy"):
        return "postcopy"
    if guest_state.run == "inmigrate":
        return "waiting" if guest_state.migration == "none" else "loading"
    if markers.ARRIVED in found:
        return "running"
    if markers.TAKEN in found:
        # A reset has ended the guest that was held.
        return "reset" if guest_state.run == "prelaunch" else "loaded"
    if "move" in found.get(markers.MOVED, {}):
        if not guest_state.at_rest:
            return "undecided"
        if markers.has_left(found, guest_state):
            return "granted" if markers.decision(found) == markers.GRANTED else "given"
    return "undecided" if guest_state.run == "finish-migrate" else "here"


def _facts(found: markers.Marks) -> dict[str, Any]:
    for name in (markers.ARRIVED, markers.TAKEN, markers.MOVED, markers.DECIDED):
        if name in found:
            return {"move": found[name].get("move"), "facts": found[name]}
    return {"move": None, "facts": {}}


def grant(monitor: Monitor, move: str, *, decides: bool = True) -> str:
    """Where the guest of this move is: 'granted' (now, if it was given away), 'undecided', 'here', or 'unknown'.

    decides: else one that was given away is left to whoever decides about it, and 'undecided'.
    """
    guest_state, found = query(monitor), markers.read(monitor)
    if _facts(found)["move"] != move:
        # Another QEMU may have come to the same path.
        return "unknown"
    state = state_of(guest_state, found)
    if state == "given" and not decides:
        return "undecided"
    if state == "given":
        return "granted" if markers.decide(monitor, markers.GRANTED, move) == markers.GRANTED else "here"
    return state


def take_back_given(monitor: Monitor) -> bool:
    """Let a guest run on that was given away; False where it has been granted, or where nothing is decided yet."""
    guest_state, found = query(monitor), markers.read(monitor)
    state = state_of(guest_state, found)
    if state in ("granted", "undecided", "postcopy"):
        return False
    mark = found.get(markers.MOVED, {})
    if state == "given":
        if markers.decide(monitor, markers.KEPT, str(mark.get("move"))) == markers.GRANTED:
            return False
        if mark.get("ran", True):
            run_on(monitor)
    if mark:
        markers.keep(monitor, mark.get("move"))
    return True


def heard(monitor: Monitor, move: str) -> None:
    """The guest of this move runs on the other side, which has said so."""
    if markers.HEARD not in markers.names(monitor):
        markers.put(monitor, markers.HEARD, move=move)


def arrive(monitor: Monitor, facts: dict[str, Any], rhythm: dict[str, int] | None = None) -> str:
    """Let a guest run that was taken and is now granted, or leave it paused as it was at its source; its run state.

    facts: those of its mark.  rhythm: of the announcement of its cards, at once, since until then nobody finds it.
    Raises Refused where it does not run, for example over the lock of a disk image.
    """
    state = run_on(monitor, rhythm).run if facts.get("run", True) else "paused"
    # Another command may have been first, with the same outcome.
    with contextlib.suppress(Refused):
        markers.put(monitor, markers.ARRIVED, **facts)
    with contextlib.suppress(Refused):
        monitor.ask("object-del", id=markers.TAKEN)
    return state
