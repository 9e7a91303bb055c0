"""The other side of a migration: the process that carries the link to it, and what it has answered."""

import contextlib
import queue
import signal
import subprocess
import threading
from typing import Any

from ..errors import CannotDo, Damaged, VmstateError
from ..io.pipeline import end_group, words_of_status
from . import messages
from .link import ACCEPT, ANSWERS, CHALLENGE, ENDS, HELLO, MANY, PROOF, REFUSE, VERSION, Link, LinkFrame
from .proof import Talk
from .uri import Transport


class Silent(CannotDo):
    """The other side has not answered in time."""


class Peer:
    """The other side, as the process that carries the link to it, and what it has said so far."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        pipe = subprocess.PIPE
        if transport.command is not None:
            words = ["bash", "-o", "pipefail", "-c", transport.command]
            self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, start_new_session=True)
        else:
            self._process = _start(transport.argv())
        assert self._process.stdin and self._process.stdout
        self.link = Link(self._process.stdout.fileno(), self._process.stdin.fileno(), sums=transport.sums)
        self._said: queue.SimpleQueue[LinkFrame | None | VmstateError] = queue.SimpleQueue()
        # Called with what has come, in the thread that hears it; true: that was all it is for.
        self.heard: Any = None
        self.lost = False
        self._spoke = False
        self._refusal: VmstateError | None = None
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def ask(self, purpose: str, **values: Any) -> LinkFrame:
        """Say hello; what the other side answers when it accepts, else its refusal as an error."""
        self.tell(HELLO, version=VERSION, purpose=purpose, **values)
        return self.expect(ACCEPT, ANSWERS)

    def ask_about(self, talk: Talk) -> messages.Stand:
        """Ask for a guest whose migration was begun before; each side shows the other that it has its secret."""
        self.tell(HELLO, version=VERSION, purpose=talk.purpose, move=talk.move, nonce=talk.asker)
        talk.asked = messages.Challenge.of(self.expect(CHALLENGE, ANSWERS)).nonce
        self.tell(PROOF, proof=talk.prove("ask"))
        there = messages.Stand.of(self.expect(ACCEPT, ANSWERS))
        if not talk.proves(there.proof, "accept", there.state, there.run):
            raise CannotDo("the peer that answered does not have the secret of this migration: is it the right URI?")
        return there

    def tell(self, kind: int, **values: Any) -> None:
        """CannotDo where the link is gone."""
        try:
            self.link.send(kind, **values)
        except OSError as error:
            raise self.gone() from error

    def expect(self, kind: int, seconds: float) -> LinkFrame:
        """The next frame, which is of this kind; CannotDo where there is none, or another, in time."""
        try:
            said = self._said.get(timeout=seconds)
        except queue.Empty:
            raise Silent(f"the other side did not answer in {seconds:.0f} s") from None
        if said is None:
            raise self.gone()
        if isinstance(said, VmstateError):
            self._refusal = said
        elif said.kind == REFUSE:
            self._refusal = messages.refused(said)
        if self._refusal:
            raise self._refusal
        assert isinstance(said, LinkFrame)
        if said.kind != kind:
            text = f"the other side said '{chr(said.kind)}' where '{chr(kind)}' was expected"
            raise Damaged(text, "is it a vm-restore --receive of the same version?")
        return said

    def gone(self) -> VmstateError:
        """Why there is no link any more: what the other side has said last, or the end of its process."""
        self._listener.join(ENDS)
        if said := self.refusal():
            return said
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1)
            if status:
                return CannotDo(f"the link is lost: its command ended with {words_of_status(status)}", *_hints(status))
        return CannotDo("the link is lost: the other side has ended, or the way to it")

    def refusal(self) -> VmstateError | None:
        """What the other side has refused by now, if it has."""
        with contextlib.suppress(queue.Empty):
            while self._refusal is None:
                said = self._said.get_nowait()
                if isinstance(said, VmstateError):
                    self._refusal = said
                elif said and said.kind == REFUSE:
                    self._refusal = messages.refused(said)
        return self._refusal

    def leave(self) -> None:
        """No more will be said from here; the other side is given time for its last words, if it ever spoke."""
        if not self._spoke:
            return self.cut()
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(ENDS)
        except subprocess.TimeoutExpired:
            self.cut()
        # Its last words may still be on their way from the pipe.
        self._listener.join(1)
        return None

    def cut(self) -> None:
        if self.transport.command is not None:
            end_group(self._process.pid, self._process)
        else:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS)

    def _listen(self) -> None:
        try:
            while frame := self.link.receive():
                self._spoke = True
                if self._said.qsize() > MANY:
                    raise Damaged("the other side says more than was asked")
                if not (self.heard and self.heard(frame)):
                    self._said.put(frame)
        except VmstateError as error:
            self._said.put(error)
        except (OSError, ValueError):
            pass
        finally:
            self.lost = True
            if self.heard:
                self.heard(None)
            self._said.put(None)


def _hints(status: int) -> tuple[str, ...]:
    if status == 255:
        return ("255 is ssh's own: it did not reach the other host, or was not let in",)
    if status == 127:
        return ("127 is a shell's: vm-restore is not found there",)
    return ()


def _start(words: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    # In our session, so that it can ask for a password; a Ctrl-C is for us, who put the guest back.
    try:
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=_be_deaf)
    except OSError as error:
        raise CannotDo(f"cannot start {words[0]}: {error.strerror}") from error


def _be_deaf() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
