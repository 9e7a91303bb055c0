"""Bytes into an OpenPGP message and back, through gpg.

gpg gives plaintext away before it knows that it is authentic, so the newest 16 MiB (`descriptors.HOLD`) wait for its
verdict.  What a changed message can look like counts as one: a wrong passphrase, or a key that nobody has.
"""

import os
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import Damaged, Stopped
from ..io.descriptors import HOLD, kind
from ..io.holdback import Place, hold
from ..io.readers import FdReader, read_up_to
from . import keys
from .gpg import Gpg, Keyring, Means, Task, reader_gone
from .openpgp import look_ahead
from .verdict import Signature, check_encryption, decryption_error, is_cut, signatures_of

# gpg would else look for unknown keys in the network, and obey a gpg.conf that asks for armour.
OURS = ["-z", "0", "--no-armor", "--no-auto-key-locate", "--cipher-algo", "AES256"]


class Receivers(NamedTuple):
    """Whom a message is for: keys by name, and whoever knows the passphrase.  signer: the name of the key that signs.

    trust: gpg's trust model, None for its own.
    """

    names: Sequence[str] = ()
    passphrase: bool = False
    signer: str | None = None
    trust: str | None = None


class Cipher:
    """One message between two descriptors.  `came` and `went` count the bytes; `went` is None where gpg alone knows."""

    def __init__(self, source: int, fd: int, means: Means | None = None) -> None:
        self._source = source
        self._fd = fd
        self._means = means or Means()
        self._gpg: Gpg | None = None
        self._ring: Place | None = None
        self.signatures: list[Signature] = []

    @property
    def came(self) -> int:
        return self._gpg.came if self._gpg else 0

    @property
    def went(self) -> int | None:
        if self._ring:
            return self._ring.left
        return os.fstat(self._fd).st_size if kind(self._fd) == "file" else None

    def encrypt(self, receivers: Receivers) -> None:
        """CannotDo for a key that cannot be used, before anything is read; Damaged where the input is empty."""
        _show_the_terminal()
        ring = Keyring(self._means.home)
        found = [keys.recipient(ring, name) for name in receivers.names]
        signer = keys.signing_key(ring, receivers.signer) if receivers.signer is not None else None
        self._try(receivers, found, signer)
        first = read_up_to(FdReader(self._source), 1)
        if not first:
            raise Damaged("the input is empty")
        # gpg takes a descriptor that another program made non-blocking for a full disk.
        os.set_blocking(self._fd, True)
        self._gpg = Gpg(self._means, self._source, first, self._fd)
        options = _best_protection(self._gpg, found)
        # Each key has been judged, and is named by its fingerprint.
        verdict = self._gpg.work(_encryption(found, receivers.passphrase, signer, "always", options))
        if verdict.returncode and reader_gone(self._fd):
            raise Stopped(signal.SIGPIPE)
        check_encryption(verdict)

    def _try(self, receivers: Receivers, found: list[str], signer: str | None) -> None:
        """An empty message to nowhere: whether gpg trusts the keys that are given by name, and can sign."""
        named = [name for name in receivers.names if not keys.fingerprint(name)]
        if named:
            task = _encryption(named, False, signer, receivers.trust)
        elif found:
            task = _encryption(found, False, signer, "always")
        elif signer:
            task = _signing(signer)
        else:
            return
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            check_encryption(Gpg(self._means, null, b"", null).work(task))
        finally:
            os.close(null)

    def decrypt(self, signers: list[str] | None = None) -> None:
        """Damaged unless gpg finds one authentic message and nothing else; the newest `HOLD` bytes then do not come.

        signers: full fingerprints, of one of which there has to be a good signature.
        """
        _show_the_terminal()
        if signers:
            keys.check_signers(Keyring(self._means.home), signers)
        message, first, size = look_ahead(FdReader(self._source))
        if message.integrity == "none":
            raise Damaged("the message has no integrity protection: anyone could have changed it")
        self._ring = hold(HOLD)
        try:
            self._decrypt(self._ring, first, size, signers or [])
        finally:
            self._ring.close()

    def _decrypt(self, ring: Place, first: bytes, size: int | None, signers: list[str]) -> None:
        self._gpg = Gpg(self._means, self._source, first, self._fd, ring)
        verdict = self._gpg.work(lambda gpg, message: gpg.decrypt_file(message))
        self.signatures = signatures_of(verdict)
        reason = decryption_error(verdict, self.signatures, signers)
        if isinstance(reason, Damaged) and verdict.all_sent and is_cut(verdict, self.came, size):
            raise Damaged("the message is cut: it ends before its integrity could be checked") from reason
        if reason is not None:
            raise reason
        ring.drain(self._fd)


def _show_the_terminal() -> None:
    """Where gpg's agent finds the terminal to ask on."""
    if os.isatty(2):
        os.environ.setdefault("GPG_TTY", os.ttyname(2))


def _encryption(
    names: list[str], passphrase: bool, signer: str | None, trust: str | None, options: list[str] | None = None
) -> Task:
    words = [*OURS, *(options or [])]
    words += ["--sign", "--local-user", signer] if signer else []
    words += ["--trust-model", trust] if trust else []
    # gnupg knows one or the other.
    words += ["--symmetric"] if passphrase and names else []

    def task(gpg: Gpg, message: Any) -> None:
        gpg.encrypt_file(message, names, armor=False, symmetric=not names, extra_args=words)

    return task


def _signing(signer: str) -> Task:
    def task(gpg: Gpg, message: Any) -> None:
        gpg.sign_file(message, signer, clearsign=False, binary=True, extra_args=OURS)

    return task


def _best_protection(gpg: Gpg, found: list[str]) -> list[str]:
    """gpg takes OCB where all keys ask for it; a passphrase allows what gpg knows."""
    option = "--force-ocb"
    return [option] if not found and option in gpg.options_known() else []
