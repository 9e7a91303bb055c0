"""A guest's way out over a link: the phases, and what all parts of it know once the other side is called.

Source: docs/link.md, "A move".
"""

from enum import Enum

from ..errors import GuestGone, VmstateError
from ..phases import Phases
from ..qemu import markers
from ..qemu.outgoing import OutgoingMigration
from ..report import Report
from ..rollback import Rollback
from .direct import MigratePlan
from .near import NearMonitor
from .remote import Peer
from .uri import Transport


class Phase(Enum):
    """Where the guest of a move stands, as its source knows."""

    ASKING = "it runs here, and the other side is asked"
    SENDING = "QEMU sends it, and it runs here; with postcopy perhaps there"
    SENT = "all of it is sent, and it stands here"
    CROSSED = "it runs there, and all of its pages are sent"
    LOADED = "it is loaded there, and QEMU here may give it away"
    GIVEN = "QEMU has given it away; it can be taken back"
    GRANTED = "it may run there, and never again here"
    KEPT = "it was taken back"


STEPS = {
    Phase.ASKING: frozenset({Phase.SENDING}),
    Phase.SENDING: frozenset({Phase.SENT, Phase.CROSSED}),
    Phase.SENT: frozenset({Phase.LOADED}),
    Phase.LOADED: frozenset({Phase.GIVEN, Phase.KEPT}),
    # It is looked at anew where the decision could not be put down.
    Phase.GIVEN: frozenset({Phase.GIVEN, Phase.GRANTED, Phase.KEPT}),
}
# Names of what is undone.
WATCHDOG, LINK, GUEST = "the watchdog", "the link", "the guest"
THERE = "where this QEMU is gone, on the other side: vm-status there tells how to let the guest go on"


class Handover:
    """move: its number, secret: its secret.  reasons: why it was interrupted from here; the first one counts."""

    def __init__(
        self,
        plan: MigratePlan,
        transport: Transport,
        report: Report,
        move: str,
        secret: str,
        peer: Peer,
        migration: OutgoingMigration,
        near: NearMonitor,
        undo: Rollback,
    ) -> None:
        self.plan, self.transport, self.report = plan, transport, report
        self.move, self.secret = move, secret
        self.peer, self.migration, self.near, self.undo = peer, migration, near, undo
        self.phases: Phases[Phase] = Phases(Phase.ASKING, STEPS)
        self.reasons: list[VmstateError] = []

    @property
    def midway(self) -> bool:
        """In the midst of the data there is nothing else to say; the end of the link says the same."""
        return self.phases.now is Phase.SENDING and self.migration.begun

    @property
    def gone(self) -> bool:
        """Its QEMU has ended before the other side could have the guest whole: there is nothing to be put back."""
        gone = all(isinstance(error, GuestGone) for _, error in self.undo.trouble)
        return bool(self.undo.trouble) and gone and self.phases.now in (Phase.ASKING, Phase.SENDING)

    def recover_words(self) -> str:
        return markers.recover_command(self.plan.path, {markers.MOVED: {"uri": self.plan.target.uri}})
