"""What brings a move to its end whose commands have died: the table "Killed in the middle" of docs/link.md."""

import contextlib
from typing import Any

from ..errors import CannotDo, Unsettled, VmstateError
from ..qemu import control, markers, settings, state
from ..qemu.monitor import Monitor
from ..signals import no_more_signals
from . import decision, link
from .decision import standing_of
from .postcopy_link import resume
from .remote import Far
from .uri import Way


def go(way: Way, move: str) -> str:
    """Ask the other side for the guest of this move and, where it waits for it, say go; its run state there.

    Unsettled where it is not there any more, CannotDo where the other side is not reached.
    """
    far = Far(way)
    try:
        there = far.ask("settle", move=move)
        if there.get("move") == move and there.get("state") == "running":
            return str(there.get("run"))
        if there.get("move") != move or there.get("state") != "loaded":
            raise Unsettled(f"the guest of this move is not there: the one there is '{there.get('state')}'")
        far.tell(link.GO, move=move)
        return str(far.expect(link.RUNNING, link.ANSWERS).values.get("state"))
    finally:
        far.leave()


def settle(path: str, way: Way | None, *, sure: bool = False) -> dict[str, Any]:
    """Take the way out for the guest at `path`; where it runs then: `where` 'here' or 'there'.

    Unsettled where it cannot be told, with what a person must know before.
    """
    here = standing_of(path)
    move = str(here.get("move"))
    if here["state"] == "gone":
        raise CannotDo(f"no guest at {path}: its QEMU has ended", "settle it on the other side")
    if here["state"] in ("waiting", "loading", "undecided"):
        raise CannotDo(f"the guest at {path} is '{here['run']}': its move is still under way", f"vm-status {path}")
    if here["state"] != "postcopy":
        no_more_signals()
    outcome = _settle(path, way, here, sure)

    def tidy(monitor: Monitor) -> None:
        if outcome["where"] == "there":
            decision.heard(monitor, move)
        settings.tidy(monitor)

    with contextlib.suppress(VmstateError):
        state.patiently(path, tidy)
    return outcome


def _settle(path: str, way: Way | None, here: dict[str, Any], sure: bool) -> dict[str, Any]:
    move = str(here.get("move"))
    if here["state"] == "postcopy":
        if way is None or "ran" not in here["facts"]:
            text = f"the guest at {path} has crossed over, and one side has pages that the other lacks"
            raise Unsettled(text, "on its source: vm-migrate --settle GUEST URI takes the move up again")
        return {"guest": path, "where": "there", "state": resume(path, way, move)}
    if here["state"] == "loaded":
        return _destination(path, way, move, here["facts"], sure)
    if here["state"] in ("given", "granted") and here.get("move"):
        return _source(path, way, move)
    if here["state"] == "here" and here.get("move") and way:
        _forget(path, way, move)
    return {"guest": path, "where": "here", "state": here["run"]}


def _forget(path: str, way: Way, move: str) -> None:
    """Where the other side does not hold the guest of a move that was taken back, nobody will ask for it any more."""
    with contextlib.suppress(VmstateError):
        if _ask(way, move) not in ("loaded", "loading"):
            state.patiently(path, markers.clear)


def _source(path: str, way: Way | None, move: str) -> dict[str, Any]:
    """One that was given away: forward if the other side has it, else back if it has not been granted."""
    force = f"only once it is gone there: vm-cont --force {path}"
    try:
        there = _ask(way, move) if way else "not asked"
    except VmstateError as error:
        there = f"not reached: {error}"
    if (
        there in ("loaded", "running")
        and state.patiently(path, lambda monitor: decision.grant(monitor, move)) == "granted"
    ):
        assert way
        try:
            return {"guest": path, "where": "there", "state": go(way, move)}
        except VmstateError as error:
            raise Unsettled(f"the guest at {path} was given away, and does not run there: {error}", force) from error
    if state.patiently(path, decision.take_back_given):
        return {"guest": path, "where": "here", "state": state.glance(path).run}
    text = f"the guest at {path} was given away, and may run where it was sent to ({there})"
    raise Unsettled(text, *([] if way else [f"to ask there: vm-migrate --settle {path} URI"]), force)


def _ask(way: Way, move: str) -> str:
    far = Far(way)
    try:
        there = far.ask("settle", move=move)
    finally:
        far.leave()
    return str(there.get("state")) if there.get("move") == move else "not there"


def _destination(path: str, way: Way | None, move: str, facts: dict[str, Any], sure: bool) -> dict[str, Any]:
    """One that was loaded: it runs only when its source has let it go, or is gone."""
    source = f"{facts.get('path')} on {facts.get('host')}"
    if not sure:
        _require_grant(path, way, move, facts, source)

    def arrive(monitor: Monitor) -> str:
        state = decision.arrive(monitor, facts)
        if state == "running":
            control.announce(monitor)
        return state

    try:
        return {"guest": path, "where": "here", "state": state.patiently(path, arrive)}
    except VmstateError as error:
        raise Unsettled(f"the guest at {path} has been let go by its source, but does not run: {error}") from error


def _require_grant(path: str, way: Way | None, move: str, facts: dict[str, Any], source: str) -> None:
    sure = f"only if it has not gone on at its source: vm-migrate --settle --i-am-sure {path}"
    if way is None:
        hint = f"vm-migrate --settle {path} URI, with URI the way to {source}"
        raise Unsettled(
            f"the guest at {path} was loaded, and whether its source has let it go is not known", hint, sure
        )
    far = Far(way)
    try:
        there = far.ask("grant", move=move)
    except VmstateError as error:
        raise Unsettled(f"the source of the guest at {path}, {source}, was not reached: {error}", sure) from error
    finally:
        far.leave()
    state = there.get("state")
    if state == "granted":
        return
    if state == "here":
        text = f"the guest at {path} runs at its source, {source}: this copy is of no use"
        raise Unsettled(text, "end this QEMU, and start it again with -incoming defer")
    if state == "undecided":
        text = f"the source of the guest at {path}, {source}, has not decided yet"
        raise Unsettled(text, "ask again in a moment")
    # It may have run on there, and have been ended: then this copy is an old one.
    asked = f"{there.get('guest')} on {there.get('host')}"
    what = "is no QEMU any more" if state == "gone" else "knows nothing of it"
    raise Unsettled(f"the source of the guest at {path} was {source}; now {asked} {what}", sure)
