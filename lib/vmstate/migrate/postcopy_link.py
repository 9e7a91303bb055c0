"""QEMU's bytes over a link, as they are: the other QEMU is their judge.

The receiver keeps that one's SHUT to itself and says 'loaded'.  Where the guest crosses over in postcopy, everything
passes in both directions from then on, and QEMU ends by itself.
"""

import contextlib
import os
import select
import socket

from ..dump import relay
from ..errors import CannotDo, Unsettled, VmstateError
from ..io.descriptors import BLOCK, channel, memory
from ..qemu import control, markers, outgoing, state
from ..qemu.monitor import Monitor
from . import decision, link
from .link import ANSWERS, Frame
from .remote import Far
from .uri import Way

# How long a QEMU may take to see that its link is lost, in seconds.
NOTICES = 20.0


class Crossing:
    """`sent` counts the bytes that have left."""

    def __init__(self, path: str, qemu: socket.socket, far: Far) -> None:
        self._path = path
        self._qemu = qemu
        self._far = far
        self._wake, self._waker = os.pipe()
        self._loaded = False
        self.sent = 0
        self._other = far.heard
        far.heard = self._hear

    def run(self) -> str:
        """'loaded' where the receiver has all of it and waits, 'over' where the guest has crossed over and is whole."""
        buffer = memory(BLOCK)
        poll = select.poll()
        poll.register(self._qemu, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._loaded:
            if self._wake in {fd for fd, _ in poll.poll()}:
                os.read(self._wake, 1)
                if self._far.lost:
                    raise self._far.gone()
                continue
            count = self._qemu.recv_into(buffer)
            if not count:
                return self._ended()
            self._far.link.send_bytes(link.DATA, buffer[:count])
            self.sent += count
        return "loaded"

    def _ended(self) -> str:
        standing = state.wait_for(self._path, lambda s: s.migration not in ("active", "device"), 10, "to end the move")
        if standing.given_away or standing.migration.startswith("postcopy-a"):
            return "over"
        raise CannotDo(f"QEMU gave up: {standing.reason}" if standing.reason else "QEMU gave up")

    def answer(self, status: int) -> None:
        """As `relay.answer`."""
        relay.answer(self._qemu, status)

    def _hear(self, frame: Frame | None) -> bool:
        if frame is None or frame.kind == link.REFUSE:
            self._far.lost = True
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


def finish_postcopy(path: str, far: Far) -> str:
    """All pages are there: wait for QEMU's own end of it; the guest's run state there."""
    standing = state.wait_for(path, lambda s: not s.moving or s.migration == "postcopy-paused", 60, "to complete")
    if not standing.given_away:
        raise CannotDo(f"QEMU ended the move as '{standing.migration}': {standing.reason}")
    return str(far.expect(link.RUNNING, ANSWERS).values.get("state"))


def resume(path: str, way: Way, move: str) -> str:
    """Take up a move whose link was lost when the guest had crossed over; its run state there.

    Unsettled where the link is lost again, or the other side has no such guest.
    """
    hint = f"once the way is there again: vm-migrate --settle {path} {way.uri}"
    state.wait_for(path, lambda s: s.migration == "postcopy-paused", NOTICES, "to notice that its link is lost")
    far = Far(way)
    ours, theirs = channel()
    try:
        far.ask("resume", move=move)
        crossing = Crossing(path, ours, far)
        with Monitor(path) as monitor:
            monitor.give(outgoing.NAME, theirs.fileno())
            monitor.ask("migrate", uri=f"fd:{outgoing.NAME}", resume=True)
        theirs.close()
        crossing.run()
        return finish_postcopy(path, far)
    except VmstateError as error:
        raise Unsettled(f"the guest of {path} runs on the other side, and lacks pages: {error}", hint) from error
    finally:
        ours.close()
        theirs.close()
        far.leave()


def _require_taken(found: markers.Marks, path: str, move: str) -> None:
    if move not in (found.get(name, {}).get("move") for name in (markers.ARRIVED, markers.TAKEN)):
        raise CannotDo(f"the guest at {path} is not the one of this move")


def recover(path: str, move: str) -> socket.socket:
    """On the other side: QEMU takes up its half of such a move; our end of its channel."""
    with Monitor(path) as monitor:
        _require_taken(markers.read(monitor), path, move)
    state.wait_for(path, lambda s: s.migration == "postcopy-paused", NOTICES, "to notice that its link is lost")
    ours, theirs = channel()
    with Monitor(path) as monitor:
        found = markers.read(monitor)
        if markers.ARRIVED not in found:
            # The link was lost in the moment of its crossing.
            decision.arrive(monitor, found[markers.TAKEN], control.rhythm_of(monitor))
        monitor.give(outgoing.NAME, theirs.fileno())
        monitor.ask("migrate-recover", uri=f"fd:{outgoing.NAME}")
    theirs.close()
    return ours
