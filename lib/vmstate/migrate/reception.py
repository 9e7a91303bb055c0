"""A guest's arrival over a link: what is asked for, the phases, and what all parts of it know.

Source: docs/link.md, "A move".
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from ..errors import CannotDo, VmstateError
from ..phases import Phases
from ..qemu.incoming import Waiting
from ..qemu.launch import Process
from ..report import Report
from ..restore.outcome import refusal_of
from ..rollback import Rollback
from .link import Link
from .messages import Hello
from .near import NearMonitor


class ReceivePlan(NamedTuple):
    """path: the waiting guest, or command: the QEMU to start.  back: the inverse of the filters on the way.

    announce: whether to announce the guest in the network once it runs.
    """

    path: str | None = None
    command: Sequence[str] = ()
    back: str | None = None
    announce: bool = True


class Phase(Enum):
    """Where the guest of a move stands, as its receiver knows."""

    ACCEPTED = "nothing of it has come"
    LOADING = "QEMU loads it; it runs at its source"
    SWITCHING = "the same, and its source goes over to postcopy"
    CROSSED = "it runs here, on pages that are still at its source"
    LOADED = "it is held here, whole; perhaps the only one there is"
    GRANTED = "its source has let it go"
    ARRIVED = "it is here, and its source has been told"
    TAKEN_BACK = "it runs on at its source, which has said so"


STEPS = {
    Phase.ACCEPTED: frozenset({Phase.LOADING, Phase.CROSSED, Phase.TAKEN_BACK}),
    Phase.LOADING: frozenset({Phase.SWITCHING, Phase.LOADED, Phase.TAKEN_BACK}),
    Phase.SWITCHING: frozenset({Phase.CROSSED, Phase.LOADED, Phase.TAKEN_BACK}),
    Phase.CROSSED: frozenset({Phase.ARRIVED}),
    Phase.LOADED: frozenset({Phase.GRANTED, Phase.TAKEN_BACK}),
    Phase.GRANTED: frozenset({Phase.ARRIVED}),
}
# Those in which there may be no other whole guest.
HELD = (Phase.LOADED, Phase.GRANTED, Phase.ARRIVED)


class Reception:
    """hello: what its source has said; process: the QEMU, where we have started it."""

    def __init__(
        self,
        plan: ReceivePlan,
        path: str,
        report: Report,
        link: Link,
        hello: Hello,
        process: Process | None,
        waiting: Waiting,
        near: NearMonitor,
        undo: Rollback,
    ) -> None:
        self.plan, self.path, self.report, self.link = plan, path, report, link
        self.hello, self.process, self.waiting, self.near = hello, process, waiting, near
        self.undo = undo
        self.phases: Phases[Phase] = Phases(Phase.ACCEPTED, STEPS)

    @property
    def facts(self) -> dict[str, Any]:
        """Of the mark in its QEMU."""
        hello = self.hello
        return {"move": hello.move, "secret": hello.secret, "run": hello.run, **hello.origin._asdict()}

    @property
    def may_announce(self) -> bool:
        return self.plan.announce and self.hello.announce

    def taken_back(self) -> CannotDo:
        """The guest runs on at its source, which has said so."""
        self.phases.go(Phase.TAKEN_BACK)
        return CannotDo("the source has taken its guest back, which runs on there")

    def refusal(self, error: Exception, whole: bool) -> VmstateError:
        """Why QEMU did not take it; `whole`: its source had sent all of it."""
        return refusal_of(self.waiting, self.process, error, whole)
