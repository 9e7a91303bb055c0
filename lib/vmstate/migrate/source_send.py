"""What QEMU sends of a guest to the other side, until all of it is there or on its way.

Source: docs/link.md.
"""

import contextlib
import socket

from ..dump.live import paused_first_words, wakes_words
from ..errors import VmstateError
from ..io.descriptors import channel
from ..progress import Progress
from ..qemu import markers
from ..qemu.channel import QemuChannel
from ..qemu.migration_progress import sample
from ..qemu.monitor import Monitor
from ..signals import hold_signals, release_signals
from . import link
from .filters import FilteredStream
from .handover import Handover, Phase
from .link import LinkFrame
from .pacing import Watch
from .postcopy_link import PostcopyBridge


class Sending:
    """`way` is what carries QEMU's bytes.  Its undoing lets go of QEMU, which has the guest run on then."""

    def __init__(self, of: Handover) -> None:
        self._of = of
        self._qemu, self._theirs = channel(link.ROOM)
        self._channel = QemuChannel(of.plan.path, self._qemu)
        of.peer.heard = self._hear
        self.way: FilteredStream | PostcopyBridge
        if of.plan.through:
            hold_signals()
            self.way = FilteredStream(of.plan.through, self._channel, of.peer)
            of.undo.add("the filter", self.way.end)
            release_signals()
        else:
            self.way = PostcopyBridge(of.plan.path, self._channel, of.peer)

    def start(self) -> None:
        """QEMU sends from now on."""
        of = self._of
        of.undo.add("the channel to QEMU", self.let_go)
        hold_signals()
        of.phases.go(Phase.SENDING)
        of.migration.start(self._theirs.fileno(), stopped=False)
        release_signals()
        self._theirs.close()
        if of.migration.wakes:
            of.report.warning(wakes_words(of.migration.wakes, of.plan.path))
        if of.migration.paused_first:
            of.report.warning(paused_first_words(of.migration.paused_first, of.plan.path, "it runs there"))

    def carry(self, mode: str) -> None:
        """Until all is sent, or is there as well, the guest having crossed over in postcopy.  mode: of the progress."""
        of = self._of
        watch = Watch(of.plan, self.way, of.migration, self._interrupt)
        if of.plan.postcopy:
            watch.switch = self._switch
        with Progress(of.report, mode, lambda: sample(of.plan.path)), watch:
            came = self.way.run()
            of.phases.go(Phase.CROSSED if came == "over" else Phase.SENT)
        if of.plan.through:
            of.peer.tell(link.END, bytes=self.way.sent)

    def let_go(self) -> None:
        for end in (self._qemu, self._theirs):
            end.close()

    def _hear(self, frame: LinkFrame | None) -> bool:
        """A refusal in the midst of the data ends the sending."""
        if frame is None or frame.kind == link.REFUSE:
            self._interrupt(None)
        return False

    def _interrupt(self, reason: VmstateError | None) -> None:
        """From another thread: `carry` ends over it, in the midst of a read of QEMU's bytes."""
        if reason:
            self._of.reasons.append(reason)
            # What we write may be stuck in it.
            self._of.peer.cut()
        if self._of.phases.now in (Phase.ASKING, Phase.SENDING):
            with contextlib.suppress(OSError):
                self._qemu.shutdown(socket.SHUT_RDWR)
            if reason and isinstance(self.way, FilteredStream):
                # One that does not end has the guest stand still.
                self.way.give_up()

    def _switch(self) -> None:
        """In another thread: have QEMU go over to postcopy, which it does unless it is done before."""
        of = self._of
        self._channel.stop_asking()
        of.peer.tell(link.SWITCH)
        with Monitor(of.plan.path) as monitor:
            # Before, since behind it nobody may take it back.
            if markers.decide(monitor, markers.GRANTED, of.move) == markers.GRANTED:
                monitor.ask("migrate-start-postcopy")
