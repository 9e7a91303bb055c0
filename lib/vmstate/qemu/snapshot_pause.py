"""How long a guest stands for its snapshot, and when it may run on."""

from ..deadline import Deadline
from ..errors import CannotDo
from . import answers
from .monitor import Monitor
from .run_states import RUNS
from .state import BUSY, look_until, query

# How long QEMU may take to begin with a snapshot, in seconds
BEGINS = 60.0


def run_on_once_kept(monitor: Monitor) -> None:
    """Let a guest run that was stopped for its snapshot, as soon as QEMU keeps its pages as they are: it has sent some.

    'active' alone is too early.  Some versions let it run themselves.
    """
    guest_state = look_until(monitor, lambda found: not found.moving or bool(found.ram and found.ram.pages), BEGINS)
    if guest_state.migration in BUSY | {"completed"}:
        monitor.ask("cont")


def stood_for(monitor: Monitor) -> float | None:
    """From QEMU's STOP to its RESUME, in ms, by its own clock; None where it is over without them (a guest that ends).

    None as well where the monitor sends no events: then the guest is seen to run.  CannotDo where the migration fails
    before.
    """
    stopped, deadline = None, Deadline(BEGINS)
    while not deadline.over:
        event = answers.event(monitor, 1)
        if event is None:
            guest_state = query(monitor)
            if not guest_state.moving and guest_state.migration != "completed":
                raise CannotDo(f"QEMU ended the snapshot as '{guest_state.migration}': {guest_state.reason}")
            if not guest_state.moving or guest_state.run in RUNS:
                return None
            continue
        if event.name == "STOP":
            stopped = event.at
        elif event.name == "RESUME" and stopped is not None:
            return round(event.at - stopped, 3)
    raise CannotDo(f"QEMU has not let the guest run for its snapshot in {BEGINS:.0f} s")
