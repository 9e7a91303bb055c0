"""The decision of a move over a link at its source: the guest is loaded there, and is granted or taken back.

Source: docs/link.md, "Who stands where".
"""

import contextlib

from ..deadline import Deadline
from ..errors import CannotDo, GuestGone, InDoubt, VmstateError
from ..qemu import markers
from ..qemu.migration_progress import words_of
from ..qemu.monitor import Monitor
from ..qemu.state import look_until, query_once, with_retry
from ..signals import step_back
from . import decision, link, recover
from .handover import GUEST, THERE, Handover, Phase
from .messages import Loaded, Running
from .remote import Silent

# A receiver that has heard 'go' needs no more than this, if it is there at all.
RUNS = 10.0
# As in `destination_commit`: a receiver loads the last of it at once.
SOON = 1.0
# How long QEMU may take to complete once it has heard that all is there.
COMPLETES = 60.0


def await_loaded(of: Handover) -> None:
    """The guest stands still: the monitor is kept for what comes behind it, if not for long."""
    of.undo.add("the talk with QEMU", of.near.leave)
    of.near.keep()
    try:
        frame = of.peer.expect(link.LOADED, min(SOON, of.plan.handover))
    except Silent:
        of.near.leave()
        frame = of.peer.expect(link.LOADED, of.plan.handover)
    Loaded.of(frame)


def decide(of: Handover) -> str:
    """The state is loaded there and given away here: grant it, or take it back; where it runs then."""
    path = of.plan.path
    try:
        granted = of.near.do(lambda monitor: _grant(of, monitor))
    except Exception as error:  # noqa: BLE001 - whatever it is, the guest may be given away
        of.near.leave()
        if not (isinstance(error, GuestGone) and of.phases.now is Phase.GIVEN):
            text = f"the guest is loaded there, and has not been let go here: {error}"
            raise InDoubt(text, of.recover_words(), THERE) from error
        # Its QEMU died when it had been seen to have given it away: the other one is the only one.
        of.report.warning(f"the QEMU of {path} has ended; its guest goes on there")
        granted = True
    of.phases.go(Phase.GRANTED if granted else Phase.KEPT)
    if not granted:
        of.near.leave()
        why = "the link was lost" if of.peer.lost else "the move was cancelled"
        leave(of)
        raise CannotDo(f"{why} before the guest was let go; it {words_of(query_once(path).run)}")
    state = _let_go(of)
    of.report.note("the other side lets it run")
    return state


def _grant(of: Handover, monitor: Monitor) -> bool:
    """In one conversation, so that nobody can take the guest back meanwhile."""
    guest_state = look_until(monitor, lambda found: found.at_rest, COMPLETES)
    if not guest_state.at_rest:
        raise CannotDo("QEMU does not complete")
    if not guest_state.given_away:
        of.migration.taken_back(monitor)
        return False
    if of.peer.lost and decision.take_back_given(monitor):
        of.migration.saved.put_back(monitor)
        return False
    of.phases.go(Phase.GIVEN)
    return markers.decide(monitor, markers.GRANTED, of.move) == markers.GRANTED


def _let_go(of: Handover) -> str:
    """Its run state there."""
    try:
        of.peer.tell(link.GO, move=of.move)
        step_back()
        # Leaving takes time, and others may want it now.
        of.near.leave()
        return Running.of(of.peer.expect(link.RUNNING, RUNS)).state
    except Exception as error:  # noqa: BLE001 - whatever it is, the guest has been granted
        of.near.leave()
        return _settle(of, error)


def _settle(of: Handover, error: Exception) -> str:
    """The link was lost behind the grant: ask anew."""
    of.peer.cut()
    last: Exception = error
    for _ in Deadline(of.plan.handover).tries(0.5):
        try:
            return recover.go(of.transport, of.move, of.secret)
        except InDoubt as found:
            last = found
            break
        except VmstateError as found:
            last = found
    text = f"the guest was given away, and whether it runs there is not known: {error}; {last}"
    raise InDoubt(text, of.recover_words()) from last


def leave(of: Handover) -> None:
    """Say cancel, but only where the guest is known to be back: the other side may have the only whole one."""
    trouble = [found.error for found in of.undo.trouble if found.step == GUEST]
    if trouble and not of.gone:
        return of.peer.cut()
    if not of.midway and not trouble:
        with contextlib.suppress(VmstateError):
            of.peer.tell(link.CANCEL)
    of.peer.leave()
    said = of.peer.refusal()
    if of.migration.begun and said and not isinstance(said, InDoubt):
        # It holds no guest, so nobody will ask whether it may run.
        with contextlib.suppress(VmstateError):
            with_retry(of.plan.path, lambda monitor: markers.forget(monitor, of.move))
    return None
