"""One run of gpg between two descriptors, and what it said.  The home of gnupg, with `keys`.

gpg is trusted with the keys and with nothing else.  It takes any end of its input for the right one, a read error too,
and makes a valid message of what came before; so it reads from us, and only the end of our input ends its own.  A file
that it decrypts it reads by itself: there an end that comes too early shows.
"""

import os
import select
import socket
import time
from collections.abc import Callable
from subprocess import DEVNULL, PIPE, Popen, run
from typing import Any, NamedTuple

import gnupg

from ..errors import CannotDo, Damaged
from ..io.descriptors import BLOCK, EVEN, HOLD, SPLICE_F_NONBLOCK, channel, enlarge, kind, memory, write_all
from ..io.holdback import Place
from ..io.readers import FdReader
from .passphrase import Passphrase

# gpg writes 8 KiB at a time; who waits for each of them wakes up a hundred times as often as needed.
NAP = 0.0005
# How many fields a status line has at least, of those that are looked at (GnuPG's doc/DETAILS)
LEAST = {
    **dict.fromkeys(("GOODSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG", "BADSIG", "INV_RECP", "NO_SECKEY"), 1),
    **dict.fromkeys(("ERROR", "FAILURE", "BEGIN_ENCRYPTION", "DECRYPTION_INFO"), 2),
    "ERRSIG": 6,
    "VALIDSIG": 9,
}


def _english() -> dict[str, str]:
    """gpg's words are looked at, and quoted in messages that are in English.

    Measured: with LANGUAGE=C instead gpg 2.2 takes a quarter longer for a message.
    """
    env = {name: value for name, value in os.environ.items() if name not in ("LANGUAGE", "LC_ALL")}
    ctype = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or "C.UTF-8"
    return {**env, "LC_CTYPE": ctype, "LC_MESSAGES": "C"}


class Means(NamedTuple):
    """What gpg works with: its home, and the passphrase for whatever asks for one; None: gpg's own, and its agent."""

    home: str | None = None
    passphrase: Passphrase | None = None


class Verdict:
    """What gpg said: `said` on its status descriptor, `stderr` in words, `returncode` at its end."""

    data = b""
    stderr = ""
    returncode: int | None = None
    all_sent = True

    def __init__(self, gpg: "Gpg") -> None:
        self.said: list[tuple[str, str]] = []
        self._gpg = gpg
        gpg.verdict = self

    def handle_status(self, key: str, value: str) -> None:
        if len(value.split()) < LEAST.get(key, 0):
            text = f"gpg's status line '{key} {value}': expected at least {LEAST[key]} fields"
            return self._gpg.fail(Damaged(text))
        self.said.append((key, value))
        if key == "BEGIN_ENCRYPTION" and not any(field != "0" for field in value.split()[0:3:2]):
            self._gpg.fail(
                CannotDo(
                    "gpg would not protect the message against changes",
                    "is there a line 'rfc2440' in gpg.conf or among the settings of the key",
                )
            )
        return None

    def values(self, key: str) -> list[str]:
        return [value for name, value in self.said if name == key]

    def has(self, *keys: str) -> bool:
        return any(name in keys for name, _value in self.said)

    def words(self) -> str:
        """gpg's own words: the first line that tells of a failure, else its last."""
        lines = [line.strip().removeprefix("gpg: ") for line in self.stderr.splitlines() if line.startswith("gpg: ")]
        failed = [line for line in lines if "failed" in line]
        return (failed + lines[-1:] + ["nothing"])[0]


class Keyring(gnupg.GPG):  # type: ignore[misc]
    """gpg with a home, as python-gnupg runs it."""

    def __init__(self, home: str | None = None) -> None:
        if home is not None and not os.path.isdir(home):
            raise CannotDo(f"no GnuPG home at {home}: it is no folder")
        try:
            super().__init__(gnupghome=home)
        except (OSError, ValueError) as error:
            raise CannotDo(f"gpg cannot be run: {error}", "it is in the package gnupg") from error

    def options_known(self) -> list[str]:
        return run(
            [self.gpgbinary, "--dump-options"], stdin=DEVNULL, stdout=PIPE, check=False, text=True
        ).stdout.split()


class Gpg(Keyring):
    """One gpg between two descriptors: `first` is what was read ahead, in `ring` its newest bytes have to wait.

    Its input comes by a socket that tells an end from a death: gpg holds our side of it as well, so that nothing but
    `shutdown` ends it, and is killed when we die.
    """

    def __init__(self, means: Means, source: int, first: bytes, fd: int, ring: Place | None = None) -> None:
        self._came = 0
        self.all_sent = False
        self.verdict: Any = None
        self._means = means
        self._source, self._first, self._fd, self._ring = source, first, fd, ring
        self._failure: BaseException | None = None
        self._child: Popen[bytes] | None = None
        self._ends: tuple[socket.socket, socket.socket] | None = None
        # Where gpg's input begins, if it reads the file itself
        self._begin: int | None = None
        super().__init__(means.home)
        if ring and kind(source) == "file":
            self._begin = os.lseek(source, -len(first), os.SEEK_CUR)
        self._ends = channel()
        # While the kernel waits for room in a socket it keeps the pipe locked that it takes from: one who both writes
        # to us and reads from us would stand still.
        self._ends[0].setblocking(False)
        self.result_map = {**gnupg.GPG.result_map, "crypt": Verdict, "sign": Verdict}

    @property
    def came(self) -> int:
        """Bytes of the input that gpg was given."""
        return self._came if self._begin is None else os.lseek(self._source, 0, os.SEEK_CUR) - self._begin

    def work(self, task: "Task") -> Verdict:
        """Run `task`, a call of gnupg's; raise what failed on our side once gpg has ended."""
        try:
            task(self, _Stream(self._feed))
        finally:
            if self._child is not None:
                self._child.kill()
                self._child.wait()
        if self._failure is not None:
            raise self._failure
        verdict: Verdict = self.verdict
        verdict.all_sent = self.all_sent or self._read_all()
        return verdict

    def _read_all(self) -> bool:
        """gpg has come to the end of the file."""
        return self._begin is not None and os.lseek(self._source, 0, os.SEEK_CUR) >= os.fstat(self._source).st_size

    def _open_subprocess(self, args: list[str], passphrase: bool = False) -> Any:
        if self._ends is None:
            return super()._open_subprocess(args, passphrase)
        secret = self._means.passphrase.pipe() if self._means.passphrase else None
        try:
            child = self._spawn(args, *([] if secret is None else [secret]))
        finally:
            if secret is not None:
                os.close(secret)
        self._child = child
        child.stdin, child.stdout = _Stream(), _Stream(self._collect, child.stdout)
        return child

    def _spawn(self, args: list[str], *secret: int) -> Any:
        assert self._ends
        ours, theirs = self._ends
        given = [word for fd in secret for word in ("--pinentry-mode", "loopback", "--passphrase-fd", str(fd))]
        command = ["setpriv", "--pdeathsig", "KILL", *self.make_args([*given, *args], False)]
        out = PIPE if self._ring else self._fd
        keep = (ours.fileno(), *secret)
        stdin = theirs.fileno() if self._begin is None else self._source
        child = Popen(command, stdin=stdin, stdout=out, stderr=PIPE, pass_fds=keep, env=_english())
        theirs.close()
        return child

    def _collect_output(self, process: Any, result: Any, writer: Any = None, stdin: Any = None) -> Any:
        # gnupg 0.4 would wait for the copying thread, which may wait for our input long after gpg has refused it.
        return super()._collect_output(process, result, None, stdin)

    def _feed(self, _pipe: Any) -> None:
        """All of our input to gpg, then its end; in gnupg's copying thread."""
        assert self._ends
        if self._begin is not None:
            return
        ours = self._ends[0]
        try:
            write_all(ours.fileno(), self._first)
            self._came = len(self._first)
            buffer = memory(BLOCK)
            while count := _carry(self._source, ours.fileno(), buffer):
                self._came += count
            self.all_sent = True
            ours.shutdown(socket.SHUT_WR)
        except BaseException as error:  # noqa: BLE001 - raised again by `work`
            # That gpg takes no more is no failure of ours: its verdict says why.
            if not reader_gone(ours.fileno()):
                self.fail(error)

    def _collect(self, pipe: Any) -> None:
        """gpg's output through the ring, all but its newest bytes; in gnupg's reading thread."""
        if self._ring is None:
            return
        enlarge(pipe.fileno())
        try:
            while count := self._ring.take(pipe.fileno()):
                self._ring.drain(self._fd, HOLD)
                if EVEN <= count < BLOCK // 2:
                    time.sleep(NAP)
        except BaseException as error:  # noqa: BLE001 - raised again by `work`
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Nothing made of a failed input, or for a failed output, may look whole: gpg dies, and never sees an end."""
        if self._child is not None:
            self._child.kill()
        self._failure = self._failure or error


Task = Callable[[Gpg, Any], Any]


class _Stream:
    """What gnupg takes for a file that is empty; to read it does the work."""

    def __init__(self, work: Callable[[Any], None] | None = None, pipe: Any = None) -> None:
        self._work = work
        self._pipe = pipe

    def read(self, _size: int = -1) -> bytes:
        if self._work:
            self._work(self._pipe)
        return b""

    def close(self) -> None:
        if self._pipe:
            self._pipe.close()


def reader_gone(fd: int) -> bool:
    """The other end of a pipe or socket was closed."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _carry(source: int, sink: int, buffer: memoryview) -> int:
    """Some bytes to a socket, past our own memory where the kernel can; 0 at the end of `source`."""
    try:
        if kind(source) == "file":
            return os.sendfile(sink, source, None, BLOCK)
        if kind(source) == "pipe":
            return os.splice(source, sink, BLOCK, flags=SPLICE_F_NONBLOCK)
    except BlockingIOError:
        select.select([source], [], [])
        select.select([], [sink], [])
        return _carry(source, sink, buffer)
    count = FdReader(source).readinto(buffer)
    write_all(sink, buffer[:count])
    return count
