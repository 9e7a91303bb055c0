"""What gpg's status lines mean: the error that a message deserves, and who has signed it."""

from typing import NamedTuple

from ..errors import CannotDo, Damaged, VmstateError
from . import keys
from .gpg import Verdict

# libgpg-error's numbers for a session key that a secret key could not make sense of; with any other the secret key was
# not to be had (no agent, no passphrase, no card).
BAD_SESSION_KEY = {4, 5, 10, 12, 14, 18, 19, 22, 30, 55, 65, 66, 67, 79, 82, 83, 89}

# gpg's words (never translated) for an input that ends within a piece of a packet.
CUT = ("read error", "pending bytes")

UNTRUSTED = "10"  # doc/DETAILS, INV_RECP
NO_PUBKEY = "9"  # doc/DETAILS, ERRSIG
NO_SECRET_KEY = 17  # libgpg-error: what gpg 2.4 says of a key that is not there, in addition to NO_SECKEY

AGENT = "gpg's agent must be able to ask for its passphrase: export GPG_TTY=$(tty)"


class Signature(NamedTuple):
    """state: good, expired or revoked (the key is), unknown (there is no key to check it with) or bad."""

    state: str
    key: str
    primary: str

    def by(self, fingerprints: list[str]) -> bool:
        return self.key in fingerprints or self.primary in fingerprints


def check_encryption(verdict: Verdict) -> None:
    for refused in verdict.values("INV_RECP"):
        reason, _, key = refused.partition(" ")
        what = f"cannot encrypt for '{key}'"
        if reason == UNTRUSTED:
            hints = f"check its fingerprint and sign it: gpg --lsign-key '{key}'", "or give the fingerprint as its name"
            raise CannotDo(f"{what}: the key is not trusted", *hints)
        raise CannotDo(f"{what}: {verdict.words()}", "gpg --list-keys shows the keys")
    failed = [value for value in verdict.values("FAILURE") if value.startswith("sign")]
    if verdict.has("INV_SGNR") or (failed and not verdict.has("SIG_CREATED")):
        raise CannotDo(f"cannot sign: gpg says '{verdict.words()}'", AGENT)
    if verdict.returncode or not verdict.has("END_ENCRYPTION", "SIG_CREATED"):
        raise CannotDo(f"gpg failed: {verdict.words()}")


def decryption_error(verdict: Verdict, signatures: list[Signature], signers: list[str]) -> VmstateError | None:
    """Why the message must not be believed, None for one that may."""
    forged_aead = "checktag" in verdict.stderr
    locked = forged_aead and verdict.has("NEED_PASSPHRASE_SYM")
    # gpg 2.4 tries a passphrase before the keys, one of which may have opened the message then.
    wrong = (locked or _failed(verdict, "symkey_decrypt")) and not verdict.has("PLAINTEXT", "DECRYPTION_KEY")
    if not verdict.has("DECRYPTION_INFO"):
        # It also calls a passphrase wrong that it could not get.
        return _wrong_passphrase(verdict) if wrong and not _failed(verdict, "get_passphrase") else _not_opened(verdict)
    if wrong:
        return _wrong_passphrase(verdict)
    if verdict.has("BADMDC", "DECRYPTION_FAILED", "BADSIG") or forged_aead:
        return Damaged("the message is forged: it was changed, or has something behind it")
    unexpected = _failed(verdict, "proc_pkt")
    unexpected |= len(verdict.values("PLAINTEXT")) != 1 or not verdict.all_sent
    if unexpected or verdict.has("NODATA", "UNEXPECTED"):
        return Damaged(f"the message is forged: something is behind or beside it, gpg says '{verdict.words()}'")
    if not verdict.has("DECRYPTION_OKAY"):
        return CannotDo(f"gpg failed: {verdict.words()}")
    return _signature_error(verdict, signatures, signers)


def is_cut(verdict: Verdict, came: int, size: int | None) -> bool:
    """Where a message does not say its size, a forged one can look cut."""
    return any(word in verdict.stderr for word in CUT) if size is None else came < size


def _failed(verdict: Verdict, what: str) -> bool:
    return any(value.startswith(what) for value in verdict.values("ERROR"))


def _key_errors(verdict: Verdict) -> set[int]:
    """Why secret keys that are there were of no use: the low 16 bits of gpg's numbers, the others say who said it."""
    errors = [value.split() for value in verdict.values("ERROR")]
    codes = {int(value[1]) & 0xFFFF for value in errors if value[0] == "pkdecrypt_failed" and value[1].isdecimal()}
    return codes - {NO_SECRET_KEY}


def _wrong_passphrase(verdict: Verdict) -> Damaged:
    # gpg 2.4 says NO_SECKEY of a key that is locked, too.
    missing = verdict.values("NO_SECKEY") if not _key_errors(verdict) else []
    nor = f", and there is no secret key of {', '.join(missing)}" if missing else ""
    return Damaged(f"wrong passphrase for this message{nor}", "a message whose head was changed looks the same")


def _not_opened(verdict: Verdict) -> VmstateError:
    """Why gpg did not come to decrypting anything."""
    if not verdict.has("BEGIN_DECRYPTION"):
        if verdict.has("PLAINTEXT"):
            return Damaged("the message is not encrypted")
        return Damaged(f"no OpenPGP message, or one with a damaged head: gpg says '{verdict.words()}'")
    if _failed(verdict, "get_passphrase"):
        return CannotDo("gpg's agent gave no passphrase", AGENT, "or use --passphrase-fd or --passphrase-file")
    codes = _key_errors(verdict)
    if codes and not codes & BAD_SESSION_KEY:
        return CannotDo(f"the secret key could not be used: gpg says '{verdict.words()}'", AGENT)
    missing = verdict.values("NO_SECKEY")
    # For a hidden key gpg tries all that there are: that none fits is no sign of a change.
    hidden = any(not value.strip("0") for value in missing)
    if missing and (hidden or not codes):
        return Damaged(
            f"wrong key: no secret key for this message, which is encrypted for {', '.join(missing)}",
            "gpg --list-secret-keys shows the keys at hand",
        )
    return Damaged(f"the message is forged: gpg says '{verdict.words()}'")


STATES = {"GOODSIG": "good", "EXPSIG": "expired", "EXPKEYSIG": "expired", "REVKEYSIG": "revoked", "BADSIG": "bad"}


def signatures_of(verdict: Verdict) -> list[Signature]:
    """What gpg says of each: first of its state, then of its key."""
    found = []
    state = key = ""
    for name, value in verdict.said:
        words = value.split()
        if name in STATES:
            state, key = STATES[name], words[0]
            if state == "bad":
                found.append(Signature(state, key, key))
        elif name == "ERRSIG":
            found.append(Signature("unknown", words[-1] if keys.fingerprint(words[-1]) else words[0], ""))
        elif name == "VALIDSIG" and state:
            found.append(Signature(state, words[0], words[-1]))
            state = ""
    return found


def _signature_error(verdict: Verdict, signatures: list[Signature], signers: list[str]) -> VmstateError | None:
    """A signature that gpg cannot check is no failure of the message where another one is the one that counts."""
    unknown = [value.split() for value in verdict.values("ERRSIG")]
    proven = any(signature.state == "good" and signature.by(signers) for signature in signatures)
    if signers and not proven:
        return _wrong_signer(signatures, signers)
    if unknown and not (proven and all(value[5] == NO_PUBKEY for value in unknown)):
        first = next(signature for signature in signatures if signature.state == "unknown")
        return _unknown_signer(first)
    if verdict.returncode and not unknown and not _asked_in_vain(verdict):
        # For AEAD this is all that some a gpg has to say: with DECRYPTION_OKAY and GOODMDC.
        kind = Damaged if verdict.returncode > 0 else CannotDo
        return kind(f"gpg failed: {verdict.words()}")
    return None


def _asked_in_vain(verdict: Verdict) -> bool:
    """gpg 2.4 asks for the passphrase of a message first, and where it got none it fails, though a key has opened it.

    Only for a message whose MDC is proven: for others the exit status has to speak.
    """
    errors = verdict.values("ERROR")
    vain = bool(errors) and all(value.startswith("get_passphrase") for value in errors)
    proven = all(value.split()[0] == "2" for value in verdict.values("DECRYPTION_INFO")) and verdict.has("GOODMDC")
    return vain and proven and verdict.has("DECRYPTION_KEY")


def _wrong_signer(signatures: list[Signature], signers: list[str]) -> Damaged:
    wanted = " or ".join(signers)
    for signature in signatures:
        if signature.by(signers) and signature.state != "unknown":
            return Damaged(f"signer not accepted: the key {signature.key} is {signature.state}")
    if not signatures:
        return Damaged(f"unknown signer: the message is not signed, expected a signature of {wanted}")
    if signatures[0].state == "unknown":
        return _unknown_signer(signatures[0])
    return Damaged(f"unknown signer: the message is signed by {signatures[0].key}, expected {wanted}")


def _unknown_signer(signature: Signature) -> Damaged:
    return Damaged(
        f"unknown signer: the message is signed by {signature.key}, whose key is not there to check it",
        f"if it is to be trusted, bring the key in: gpg --import, or gpg --recv-keys {signature.key}",
    )
