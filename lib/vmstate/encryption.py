"""Bytes into an OpenPGP message and back, through gpg.  The home of gnupg.

gpg is trusted with the keys and with nothing else.  It takes any end of its input for the right one, a read error too,
and makes a valid message of what came before; so it reads from us, and only the end of our input ends its own.  And it
gives plaintext away before it knows that it is authentic, so the newest 16 MiB (`octets.HOLD`) wait for its verdict.
"""

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from subprocess import PIPE, Popen
from typing import Any

import gnupg

from .errors import CannotDo, Damaged, Stopped, VmstateError
from .octets import BLOCK, HOLD, FdReader, Ring, channel, enlarge, kind, read_up_to, write_all

# gpg would else look for unknown keys in the network, and obey a gpg.conf that asks for armour.
OURS = ["-z", "0", "--no-armor", "--no-auto-key-locate"]

# gpg writes 8 KiB at a time; who waits for each of them wakes up a hundred times as often as needed.
NAP = 0.0005

# os has it from Python 3.12 on.
SPLICE_F_NONBLOCK = 2

# gpg's doc/DETAILS, INV_RECP
NOT_FOUND, UNTRUSTED = "1", "10"
REASONS = {
    NOT_FOUND: "there is no such key",
    "2": "the name fits several keys",
    "3": "the key is not for encryption",
    "4": "the key is revoked",
    "5": "the key has expired",
    UNTRUSTED: "the key is not trusted",
    "13": "the key is disabled",
}

# libgpg-error's numbers for a session key that a secret key could not make sense of; with any other the secret key was
# not to be had (no agent, no passphrase, no card).
BAD_SESSION_KEY = {4, 10, 14, 18, 19, 22, 30, 55, 65, 66, 67, 79, 82, 83, 89}


class Cipher:
    """One message between two descriptors.  `came` and `went` count the bytes; `went` is None where gpg alone knows."""

    def __init__(self, source: int, fd: int) -> None:
        self._source = source
        self._fd = fd
        self._gpg: Gpg | None = None
        self._ring: Ring | None = None

    @property
    def came(self) -> int:
        return self._gpg.came if self._gpg else 0

    @property
    def went(self) -> int | None:
        if self._ring:
            return self._ring.left
        return os.fstat(self._fd).st_size if kind(self._fd) == "file" else None

    def encrypt(self, keys: list[str], always_trust: bool = False) -> None:
        """CannotDo for a key that gpg does not take, before anything is read; Damaged where the input is empty."""

        def task(gpg: Gpg, message: Any) -> None:
            gpg.encrypt_file(message, keys, armor=False, always_trust=always_trust, extra_args=OURS)

        self._try(task)
        first = read_up_to(FdReader(self._source), 1)
        if not first:
            raise Damaged("the input is empty")
        # gpg takes a descriptor that another program made non-blocking for a full disk.
        os.set_blocking(self._fd, True)
        self._gpg = Gpg(self._source, first, self._fd)
        verdict = self._gpg.work(task)
        if verdict.returncode and _reader_gone(self._fd):
            raise Stopped(signal.SIGPIPE)
        _judge_encryption(verdict)

    @staticmethod
    def _try(task: "Task") -> None:
        """An empty message for the same keys, to nowhere."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            _judge_encryption(Gpg(null, b"", null).work(task))
        finally:
            os.close(null)

    def decrypt(self) -> None:
        """Damaged unless gpg finds one authentic message and nothing else; the newest `HOLD` bytes then do not come."""
        first = read_up_to(FdReader(self._source), 4)
        _check_binary(first)
        if os.isatty(2):
            # Where gpg's agent finds the terminal to ask on.
            os.environ.setdefault("GPG_TTY", os.ttyname(2))
        self._ring = Ring(HOLD + BLOCK)
        self._gpg = Gpg(self._source, first, self._fd, self._ring)
        reason = _judge_decryption(self._gpg.work(lambda gpg, message: gpg.decrypt_file(message)))
        if reason is not None:
            raise reason
        self._ring.drain(self._fd)


def _reader_gone(fd: int) -> bool:
    """The other end of a pipe or socket was closed."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _check_binary(first: bytes) -> None:
    """Armour has text around it that gpg ignores, so it could not be proven whole."""
    if not first:
        raise Damaged("the input is empty")
    if first == b"----":
        raise Damaged("the message is armoured text: expected a binary one", "pipe it through: gpg --dearmor")
    if not first[0] & 0x80:
        raise Damaged(f"no OpenPGP message: found {first!r} at offset 0")


class Verdict:
    """What gpg said: `said` on its status descriptor, `stderr` in words, `returncode` at its end."""

    data = b""
    stderr = ""
    returncode: int | None = None
    all_sent = True

    def __init__(self, gpg: "Gpg") -> None:
        self.said: list[tuple[str, str]] = []
        gpg.verdict = self

    def handle_status(self, key: str, value: str) -> None:
        self.said.append((key, value))

    def values(self, key: str) -> list[str]:
        return [value for name, value in self.said if name == key]

    def has(self, *keys: str) -> bool:
        return any(name in keys for name, _value in self.said)

    def words(self) -> str:
        """gpg's own words: the first line that tells of a failure, else its last."""
        lines = [line.strip().removeprefix("gpg: ") for line in self.stderr.splitlines() if line.startswith("gpg: ")]
        failed = [line for line in lines if "failed" in line]
        return (failed + lines[-1:] + ["nothing"])[0]


def _judge_encryption(verdict: Verdict) -> None:
    refused = verdict.values("INV_RECP")
    if refused:
        reason, _, key = refused[0].partition(" ")
        if verdict.has("KEYEXPIRED"):
            reason = "5"
        hints = {
            NOT_FOUND: "gpg --list-keys shows the keys, gpg --import brings one in",
            UNTRUSTED: f"check its fingerprint and sign it: gpg --lsign-key '{key}'; or use --always-trust",
        }
        raise CannotDo(
            f"cannot encrypt for '{key}': {REASONS.get(reason, verdict.words())}",
            hints.get(reason, "gpg --list-keys shows the keys"),
        )
    if verdict.returncode or not verdict.has("END_ENCRYPTION"):
        raise CannotDo(f"gpg failed: {verdict.words()}")


def _judge_decryption(verdict: Verdict) -> VmstateError | None:
    """Why the message must not be believed, None for one that may."""
    if not verdict.has("DECRYPTION_INFO"):
        return _not_opened(verdict)
    if verdict.values("DECRYPTION_INFO")[0].split()[0] == "0" and not _aead(verdict):
        return Damaged("the message has no integrity protection: anyone could have changed it")
    if verdict.has("BADMDC", "DECRYPTION_FAILED"):
        return Damaged("the message is truncated, was changed, or has something behind it: its integrity check failed")
    unexpected = any(value.startswith("proc_pkt") for value in verdict.values("ERROR"))
    unexpected |= len(verdict.values("PLAINTEXT")) != 1 or not verdict.all_sent
    if unexpected or verdict.has("NODATA", "UNEXPECTED", "BADSIG"):
        return Damaged(f"the message is not one whole, or something is behind it: gpg says '{verdict.words()}'")
    if verdict.returncode or not verdict.has("DECRYPTION_OKAY"):
        return CannotDo(f"gpg failed: {verdict.words()}")
    return None


def _aead(verdict: Verdict) -> bool:
    fields = verdict.values("DECRYPTION_INFO")[0].split()
    return len(fields) > 2 and fields[2] != "0"


def _not_opened(verdict: Verdict) -> VmstateError:
    """Why gpg did not come to decrypting anything."""
    if not verdict.has("BEGIN_DECRYPTION"):
        if verdict.has("PLAINTEXT"):
            return Damaged("the message is not encrypted")
        return Damaged(f"no OpenPGP message, or a truncated one: gpg says '{verdict.words()}'")
    errors = [value.split() for value in verdict.values("ERROR")]
    # The low 16 bits of the number say what, the others who said it.
    codes = {int(value[1]) & 0xFFFF for value in errors if value[0] == "pkdecrypt_failed" and value[1].isdecimal()}
    if codes & BAD_SESSION_KEY:
        return Damaged(f"the message was changed: gpg says '{verdict.words()}'")
    missing = verdict.values("NO_SECKEY")
    if missing and not codes:
        return CannotDo(
            f"no secret key for this message, which is encrypted for {', '.join(missing)}",
            "gpg --list-secret-keys shows the keys at hand",
        )
    return CannotDo(
        f"the secret key could not be used: gpg says '{verdict.words()}'",
        "gpg's agent must be able to ask for its passphrase: export GPG_TTY=$(tty)",
    )


class Gpg(gnupg.GPG):  # type: ignore[misc]
    """One gpg between two descriptors: `first` is what was read ahead, in `ring` its newest bytes have to wait.

    Its input comes by a socket that tells an end from a death: gpg holds our side of it as well, so that nothing but
    `shutdown` ends it, and is killed when we die.
    """

    def __init__(self, source: int, first: bytes, fd: int, ring: Ring | None = None) -> None:
        self.came = 0
        self.all_sent = False
        self.verdict: Any = None
        self._source, self._first, self._fd, self._ring = source, first, fd, ring
        self._failure: BaseException | None = None
        self._child: Popen[bytes] | None = None
        self._ends: tuple[socket.socket, socket.socket] | None = None
        try:
            super().__init__()
        except (OSError, ValueError) as error:
            raise CannotDo(f"gpg cannot be run: {error}", "it is in the package gnupg") from error
        self._ends = channel()
        # While the kernel waits for room in a socket it keeps the pipe locked that it takes from: one who both writes
        # to us and reads from us would stand still.
        self._ends[0].setblocking(False)
        self.result_map = {**gnupg.GPG.result_map, "crypt": Verdict}

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
        verdict.all_sent = self.all_sent
        return verdict

    def _open_subprocess(self, args: list[str], passphrase: bool = False) -> Any:
        if self._ends is None:
            return super()._open_subprocess(args, passphrase)
        ours, theirs = self._ends
        command = ["setpriv", "--pdeathsig", "KILL", *self.make_args(args, passphrase)]
        out = PIPE if self._ring else self._fd
        child: Any = Popen(command, stdin=theirs.fileno(), stdout=out, stderr=PIPE, pass_fds=(ours.fileno(),))
        theirs.close()
        self._child = child
        child.stdin, child.stdout = _Stream(), _Stream(self._collect, child.stdout)
        return child

    def _collect_output(self, process: Any, result: Any, writer: Any = None, stdin: Any = None) -> Any:
        # gnupg 0.4 would wait for the copying thread, which may wait for our input long after gpg has refused it.
        return super()._collect_output(process, result, None, stdin)

    def _feed(self, _pipe: Any) -> None:
        """All of our input to gpg, then its end; in gnupg's copying thread."""
        assert self._ends
        ours = self._ends[0]
        try:
            write_all(ours.fileno(), self._first)
            self.came = len(self._first)
            buffer = memoryview(bytearray(BLOCK))
            while count := _carry(self._source, ours.fileno(), buffer):
                self.came += count
            self.all_sent = True
            ours.shutdown(socket.SHUT_WR)
        except BaseException as error:  # noqa: BLE001 - raised again by `work`
            # That gpg takes no more is no failure of ours: its verdict says why.
            if not _reader_gone(ours.fileno()):
                self._fail(error)

    def _collect(self, pipe: Any) -> None:
        """gpg's output through the ring, all but its newest bytes; in gnupg's reading thread."""
        if self._ring is None:
            return
        enlarge(pipe.fileno())
        reader = FdReader(pipe.fileno())
        try:
            while count := reader.readinto(self._ring.space()):
                self._ring.filled(count)
                self._ring.drain(self._fd, HOLD)
                if count < BLOCK // 2:
                    time.sleep(NAP)
        except BaseException as error:  # noqa: BLE001 - raised again by `work`
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
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
