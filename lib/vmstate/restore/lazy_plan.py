"""What a lazy restore is to do."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .page_order import Place
from .used_states import UsedStates

if TYPE_CHECKING:
    from ..checkpoint.revert import Revert


class LazyPlan(NamedTuple):
    """path: the waiting guest, or command: the QEMU to start.  run: None as saved, else whether it is to run.

    first: pages to be sent before the rest.  resume: the guest runs already, and has lost its server; sure: though it
    is not marked with the state that it runs on.  disks, used: as in `eager.RestorePlan`.
    """

    path: str | None = None
    command: Sequence[str] = ()
    run: bool | None = None
    on_demand: bool = False
    first: Sequence[Place] = ()
    resume: bool = False
    sure: bool = False
    disks: "Revert | None" = None
    used: UsedStates | None = None
