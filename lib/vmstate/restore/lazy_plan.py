"""What a lazy restore is to do."""

from dataclasses import dataclass, field

from ..checkpoint.revert import Revert
from .page_order import Place
from .used_states import UsedStates


@dataclass(frozen=True)
class LazyPlan:
    """path: the waiting guest, or command: the QEMU to start.  run: None as saved, else whether it is to run.

    first: pages to be sent before the rest.  resume: the guest runs already, and has lost its server; sure: though it
    is not marked with the state that it runs on.  disks, used: as in `eager.RestorePlan`.
    """

    path: str | None = None
    command: list[str] = field(default_factory=list)
    run: bool | None = None
    on_demand: bool = False
    first: list[Place] = field(default_factory=list)
    resume: bool = False
    sure: bool = False
    disks: Revert | None = None
    used: UsedStates | None = None
