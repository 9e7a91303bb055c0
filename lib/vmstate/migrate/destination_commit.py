"""The last step of a guest's arrival: it is loaded and held, and runs once its source has let it go.

Source: docs/link.md, "A move".
"""

import contextlib

from ..errors import CannotDo, InDoubt, VmstateError
from ..qemu import control
from ..qemu.monitor import Monitor
from ..qemu.state import query_once, with_retry
from ..signals import no_more_signals, step_back
from . import decision, link
from .destination_load import silent
from .messages import Go
from .reception import Phase, Reception

# A source that has heard 'loaded' goes on at once.
SOON = 1.0


def commit(of: Reception, count: int) -> str:
    """Loaded, of `count` bytes: tell it, wait for the word, let it run; its run state."""
    try:
        # The guest stands still: the monitor is kept for what comes, if not for long.
        monitor = of.near.open()
        of.waiting.loaded_in(monitor)
        rhythm = control.rhythm_of(monitor) if of.may_announce else None
        of.phases.go(Phase.LOADED)
        of.link.tell(link.LOADED, bytes=count)
        if of.link.comes(SOON):
            return _arrive(of, monitor, rhythm)
    finally:
        of.near.leave()
    if not of.link.comes(link.SILENT):
        raise silent()
    return with_retry(of.path, lambda monitor: _arrive(of, monitor, rhythm))


def _arrive(of: Reception, monitor: Monitor, rhythm: dict[str, int] | None) -> str:
    """Let it run as soon as that is granted; also called anew, when the monitor could not be had for it."""
    if of.phases.now is Phase.LOADED:
        _await_go(of)
    state = decision.arrive(monitor, of.facts, rhythm)
    step_back()
    with contextlib.suppress(OSError):
        of.link.send(link.RUNNING, state=state)
    with contextlib.suppress(VmstateError):
        of.waiting.afterwards(monitor)
    of.phases.go(Phase.ARRIVED)
    return state


def _await_go(of: Reception) -> None:
    frame = of.link.receive()
    if frame is not None and frame.kind == link.CANCEL:
        raise of.taken_back()
    if frame is None or frame.kind != link.GO:
        raise CannotDo("the link is lost")
    # Who can write here has carried the secret, too: to ask for it would prove nothing.
    if Go.of(frame).move != of.hello.move:
        raise InDoubt("the source's 'go' is for another migration")
    of.phases.go(Phase.GRANTED)
    no_more_signals()


def finish_postcopy(of: Reception) -> str:
    """All pages are here, and the source knows; its run state."""
    of.waiting.loaded()
    state = query_once(of.path).run
    with contextlib.suppress(OSError):
        of.link.send(link.RUNNING, state=state)
    with contextlib.suppress(VmstateError):
        with_retry(of.path, of.waiting.afterwards)
    of.phases.go(Phase.ARRIVED)
    return state
