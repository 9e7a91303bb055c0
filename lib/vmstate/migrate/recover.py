"""What brings a move to its end whose commands have died: the table "Killed in the middle" of docs/link.md."""

import contextlib
from typing import Any

from ..errors import CannotDo, InDoubt, VmstateError
from ..qemu import claim, control, markers, settings, state
from ..qemu.monitor import Monitor
from ..signals import no_more_signals
from . import decision, link, messages
from .decision import migration_state
from .postcopy_link import resume
from .proof import Talk, Unknown
from .remote import Peer
from .uri import Transport


def go(transport: Transport, move: str, secret: object) -> str:
    """Ask the other side for the guest of this move and, where it waits for it, say go; its run state there.

    InDoubt where it is not there any more, CannotDo where the other side is not reached.
    """
    talk = Talk.about("settle", move, secret)
    peer = Peer(transport)
    try:
        there = peer.ask_about(talk)
        if there.state == "running":
            return there.run
        if there.state != "loaded":
            raise InDoubt(f"the guest of this move is not there: the one there is '{there.state}'")
        peer.tell(link.GO, move=move, proof=talk.prove("go"))
        running = messages.Running.of(peer.expect(link.RUNNING, link.ANSWERS))
        if not talk.proves(running.proof, "running", running.state):
            raise InDoubt("the peer that says that the guest runs does not have the secret of its migration")
        return running.state
    except Unknown as error:
        raise InDoubt(f"the guest of this move is not there: {error}") from error
    finally:
        peer.leave()


def recover(path: str, transport: Transport | None, *, sure: bool = False) -> dict[str, Any]:
    """Take the way out for the guest at `path`; `where` it runs then: 'here' or 'there'; 'not here': it waits.

    InDoubt where it cannot be told, with what a person must know before.
    """
    here = migration_state(path)
    move = str(here.get("move"))
    _require_over(path, here)
    if here["state"] == "waiting":
        return {"guest": path, "where": "not here", "state": here["run"]}
    try:
        here = _claimed(path, move)
    except CannotDo:
        if here["state"] in ("here", "running"):
            # Nothing is in doubt, whoever works on it.
            return {"guest": path, "where": "here", "state": here["run"]}
        raise
    if here["state"] != "postcopy":
        no_more_signals()
    outcome = _recover(path, transport, here, sure)

    def clear(monitor: Monitor) -> None:
        if outcome["where"] == "there":
            decision.heard(monitor, move)
        settings.clear_leftovers(monitor)

    with contextlib.suppress(VmstateError):
        state.with_retry(path, clear)
    return outcome


def _require_over(path: str, here: dict[str, Any]) -> None:
    if here["state"] == "gone":
        raise CannotDo(f"no guest at {path}: its QEMU has ended", "settle it on the other side")
    if here["state"] in ("loading", "undecided"):
        raise CannotDo(f"the guest at {path} is '{here['run']}': its move is still under way", f"vm-status {path}")
    if here["state"] == "reset":
        text = f"the guest at {path} was reset while it was held for its source: its memory is not here any more"
        raise InDoubt(text, "end this QEMU; --recover at its source takes the guest back")


def _claimed(path: str, move: str) -> dict[str, Any]:
    """`migration_state` once nobody else works on the guest, who may have changed it before."""
    with Monitor(path) as monitor:
        claim.take(monitor, path, move=move)
    here = migration_state(path)
    if here["state"] == "gone" or str(here.get("move")) != move:
        raise CannotDo(f"the guest at {path} was settled meanwhile", f"vm-status {path}")
    return here


def _recover(path: str, transport: Transport | None, here: dict[str, Any], sure: bool) -> dict[str, Any]:
    move, secret = str(here.get("move")), here["facts"].get("secret")
    if here["state"] == "postcopy":
        if transport is None or "ran" not in here["facts"]:
            text = f"the guest at {path} has crossed over, and one side has pages that the other lacks"
            raise InDoubt(text, "on its source: vm-migrate --recover GUEST URI takes the move up again")
        return {"guest": path, "where": "there", "state": resume(path, transport, Talk.about("resume", move, secret))}
    if here["state"] == "loaded":
        return _destination(path, transport, move, here["facts"], sure)
    if here["state"] in ("given", "granted") and here.get("move"):
        return _source(path, transport, move, secret)
    if here["state"] == "here" and here.get("move") and transport:
        _forget(path, transport, move, secret)
    return {"guest": path, "where": "here", "state": here["run"]}


def _forget(path: str, transport: Transport, move: str, secret: object) -> None:
    """Where the other side does not hold the guest of a move that was taken back, nobody will ask for it any more."""
    with contextlib.suppress(VmstateError):
        if _ask(transport, move, secret) not in ("loaded", "loading"):
            state.with_retry(path, lambda monitor: markers.forget(monitor, move))


def _source(path: str, transport: Transport | None, move: str, secret: object) -> dict[str, Any]:
    """One that was given away: forward if the other side has it, else back if it has not been granted."""
    force = f"only once it is gone there: vm-cont --force {path}"
    try:
        there = _ask(transport, move, secret) if transport else "not asked"
    except VmstateError as error:
        there = f"not heard of: {error}"
    if (
        there in ("loaded", "running")
        and state.with_retry(path, lambda monitor: decision.grant(monitor, move)) == "granted"
    ):
        assert transport
        try:
            return {"guest": path, "where": "there", "state": go(transport, move, secret)}
        except VmstateError as error:
            raise InDoubt(f"the guest at {path} was given away, and does not run there: {error}", force) from error
    if state.with_retry(path, decision.take_back_given):
        return {"guest": path, "where": "here", "state": state.query_once(path).run}
    text = f"the guest at {path} was given away, and may run where it was sent to ({there})"
    raise InDoubt(text, *([] if transport else [f"to ask there: vm-migrate --recover {path} URI"]), force)


def _ask(transport: Transport, move: str, secret: object) -> str:
    try:
        return _asked("settle", transport, move, secret)
    except Unknown:
        return "not there"


def _asked(purpose: str, transport: Transport, move: str, secret: object) -> str:
    talk = Talk.about(purpose, move, secret)
    peer = Peer(transport)
    try:
        return peer.ask_about(talk).state
    finally:
        peer.leave()


def _destination(
    path: str, transport: Transport | None, move: str, facts: dict[str, Any], sure: bool
) -> dict[str, Any]:
    """One that was loaded: it runs only when its source has let it go, or is gone."""
    source = f"{facts.get('path')} on {facts.get('host')}"
    if not sure:
        _require_grant(path, transport, move, facts, source)

    def arrive(monitor: Monitor) -> str:
        state = decision.arrive(monitor, facts)
        if state == "running":
            control.announce(monitor)
        return state

    try:
        return {"guest": path, "where": "here", "state": state.with_retry(path, arrive)}
    except VmstateError as error:
        raise InDoubt(f"the guest at {path} has been let go by its source, but does not run: {error}") from error


def _require_grant(path: str, transport: Transport | None, move: str, facts: dict[str, Any], source: str) -> None:
    sure = f"only if it has not gone on at its source: vm-migrate --recover --force {path}"
    if transport is None:
        hint = f"vm-migrate --recover {path} URI, with URI the way to {source}"
        raise InDoubt(f"the guest at {path} was loaded, and whether its source has let it go is not known", hint, sure)
    try:
        there = _asked("grant", transport, move, facts.get("secret"))
    except Unknown as error:
        # It may have run on there, and have been ended: then this copy is an old one.
        text = f"the source of the guest at {path} was {source}; what was asked knows nothing of it: {error}"
        raise InDoubt(text, sure) from error
    except VmstateError as error:
        raise InDoubt(f"the source of the guest at {path}, {source}, was not heard of: {error}", sure) from error
    if there == "granted":
        return
    if there == "here":
        text = f"the guest at {path} runs at its source, {source}: this copy is of no use"
        raise InDoubt(text, "end this QEMU, and start it again with -incoming defer")
    if there == "undecided":
        text = f"the source of the guest at {path}, {source}, has not decided yet"
        raise InDoubt(text, "ask again in a moment")
    raise InDoubt(f"the source of the guest at {path}, {source}, has neither granted nor kept it: {there}", sure)
