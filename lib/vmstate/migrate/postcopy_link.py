"""QEMU's bytes over a link, as they are: the other QEMU validates them.

The receiver keeps that one's SHUT to itself and says 'loaded'.  Where the guest crosses over in postcopy, everything
passes in both directions from then on, and QEMU ends by itself.
"""

import contextlib
import os
import socket

from ..dump import relay
from ..errors import CannotDo, GuestGone, InDoubt, VmstateError
from ..io.descriptors import BLOCK, channel, memory
from ..qemu import claim, control, markers, outgoing, state
from ..qemu.channel import QemuChannel, ended
from ..qemu.monitor import Monitor
from . import decision, link, messages
from .link import ANSWERS, LinkFrame
from .proof import Talk
from .remote import Peer
from .uri import Transport

# How long a QEMU may take to see that its link is lost, in seconds.
NOTICES = 20.0


class PostcopyBridge:
    """`sent` counts the bytes that have left."""

    def __init__(self, path: str, channel: QemuChannel, peer: Peer) -> None:
        self._path = path
        self._channel = channel
        self._qemu = channel.end
        self._peer = peer
        self._wake, self._waker = os.pipe()
        self._loaded = False
        self.sent = 0
        self._other = peer.heard
        peer.heard = self._hear

    def run(self) -> str:
        """'loaded' where the receiver has all of it and waits, 'over' where the guest has crossed over and is whole."""
        buffer = memory(BLOCK)
        while not self._loaded:
            ready = self._channel.wait(self._wake)
            if not ready:
                return self._ended()
            if self._wake in ready:
                os.read(self._wake, 1)
                if self._peer.lost:
                    raise self._peer.gone()
                continue
            try:
                count = self._qemu.recv_into(buffer)
                if count:
                    self._peer.link.send_bytes(link.DATA, buffer[:count])
                    self.sent += count
            except OSError:
                # After the switchover either side may close when it has all, with bytes on their way that nobody needs.
                if not self._in_postcopy():
                    raise
                count = 0
            if not count:
                return self._ended()
        return "loaded"

    def _in_postcopy(self) -> bool:
        try:
            guest_state = state.query_once(self._path)
        except VmstateError:
            return False
        return guest_state.given_away or guest_state.migration.startswith("postcopy-a")

    def _ended(self) -> str:
        try:
            guest_state = state.wait_for(
                self._path, lambda s: s.migration not in ("active", "device"), 10, "to end the move"
            )
        except GuestGone as gone:
            raise ended(self._path) from gone
        if guest_state.given_away or guest_state.migration.startswith("postcopy-a"):
            return "over"
        raise self._channel.gave_up(self.sent)

    def answer(self, status: int) -> None:
        """As `relay.answer`."""
        relay.answer(self._qemu, status)

    def _hear(self, frame: LinkFrame | None) -> bool:
        if frame is None or frame.kind == link.REFUSE:
            self._peer.lost = True
            os.write(self._waker, b"x")
            return bool(self._other and self._other(frame))
        if frame.kind == link.BACK:
            with contextlib.suppress(OSError):
                self._qemu.sendall(frame.data)
            return True
        if frame.kind == link.LOADED:
            self._loaded = True
            os.write(self._waker, b"x")
        return False


def finish_postcopy(path: str, peer: Peer) -> str:
    """All pages are there: wait for QEMU's own end of it; the guest's run state there."""
    guest_state = state.wait_for(path, lambda s: not s.moving or s.migration == "postcopy-paused", 60, "to complete")
    if not guest_state.given_away:
        raise CannotDo(f"QEMU ended the move as '{guest_state.migration}': {guest_state.reason}")
    return messages.Running.of(peer.expect(link.RUNNING, ANSWERS)).state


def resume(path: str, transport: Transport, talk: Talk) -> str:
    """Take up a move whose link was lost when the guest had crossed over; its run state there.

    InDoubt where the link is lost again, or the other side has no such guest.
    """
    hint = f"once the way is there again: vm-migrate --recover {path} {transport.uri}"
    state.wait_for(path, lambda s: s.migration == "postcopy-paused", NOTICES, "to notice that its link is lost")
    peer = Peer(transport)
    ours, theirs = channel()
    try:
        peer.ask_about(talk)
        # It is in postcopy from the start.
        bridge = PostcopyBridge(path, QemuChannel(path, ours, lambda: False), peer)
        with Monitor(path) as monitor:
            monitor.send_fd(outgoing.NAME, theirs.fileno())
            monitor.ask("migrate", uri=f"fd:{outgoing.NAME}", resume=True)
        theirs.close()
        bridge.run()
        return finish_postcopy(path, peer)
    except VmstateError as error:
        raise InDoubt(f"the guest of {path} runs on the other side, and lacks pages: {error}", hint) from error
    finally:
        ours.close()
        theirs.close()
        peer.leave()


def _require_taken(found: markers.Marks, path: str, move: str) -> None:
    if move not in (found.get(name, {}).get("move") for name in (markers.ARRIVED, markers.TAKEN)):
        raise CannotDo(f"the guest at {path} is not the one of this move")


def recover(path: str, move: str) -> socket.socket:
    """On the other side: QEMU takes up its half of such a move; our end of its channel."""
    with Monitor(path) as monitor:
        _require_taken(markers.read(monitor), path, move)
        claim.take(monitor, path, move=move, ours=move)
    state.wait_for(path, lambda s: s.migration == "postcopy-paused", NOTICES, "to notice that its link is lost")
    ours, theirs = channel()
    with Monitor(path) as monitor:
        found = markers.read(monitor)
        if markers.ARRIVED not in found:
            # The link was lost in the moment of its crossing.
            decision.arrive(monitor, found[markers.TAKEN], control.rhythm_of(monitor))
        monitor.send_fd(outgoing.NAME, theirs.fileno())
        monitor.ask("migrate-recover", uri=f"fd:{outgoing.NAME}")
    theirs.close()
    return ours
