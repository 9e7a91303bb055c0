"""Keys by the names that people give them: which one is meant, and what speaks against it.

gpg takes the first key that a name fits; here a name that fits several is refused.  Whether a key can be trusted is
gpg's to say, when it is asked to use it; a full fingerprint says itself which key is meant.
"""

import re
from collections.abc import Iterable
from typing import Any

from ..errors import CannotDo, WrongUsage
from .gpg import Keyring

TRUST_MODELS = ("pgp", "classic", "tofu", "tofu+pgp", "direct", "always", "auto")

FULL = re.compile(r"(?:0x)?([0-9A-F]{40}|[0-9A-F]{64})(!?)", re.IGNORECASE)

# The letters of gpg's listing (doc/DETAILS), for a key and for the uses of a key.
STATES = {
    "r": "the key is revoked",
    "e": "the key has expired",
    "d": "the key is disabled",
    "i": "the key is not valid",
}
USES = {"e": "encryption", "s": "signing"}

Key = dict[str, Any]


def fingerprint(name: str) -> str | None:
    """The full fingerprint that `name` is, None for any other name; a '!' behind it is kept."""
    found = FULL.fullmatch("".join(name.split()))
    return found[1].upper() + found[2] if found else None


def fingerprints(names: Iterable[str]) -> list[str]:
    """WrongUsage unless all are full ones."""
    found = [fingerprint(name) for name in names]
    for name, full in zip(names, found, strict=True):
        if full is None:
            raise WrongUsage(f"'{name}' is no full fingerprint", "gpg --list-keys shows those of the keys")
    return [full.rstrip("!") for full in found if full]


def recipient(ring: Keyring, name: str) -> str:
    """The fingerprint of the one key for encryption that `name` means; CannotDo where there is none, or several."""
    what = f"cannot encrypt for '{name}'"
    found = _named(ring, name)
    if not found:
        raise CannotDo(f"{what}: there is no such key", "gpg --list-keys shows the keys, gpg --import brings one in")
    only = _only(found, name, "e", what)
    return fingerprint(name) or only


def signing_key(ring: Keyring, name: str) -> str:
    """The fingerprint of the one secret key for signing that `name` means."""
    what = f"cannot sign as '{name}'"
    found = _named(ring, name, secret=True)
    if not found:
        raise CannotDo(f"{what}: there is no such secret key", "gpg --list-secret-keys shows the keys at hand")
    only = _only(found, name, "s", what)
    return fingerprint(name) or only


def check_signers(ring: Keyring, names: Iterable[str]) -> None:
    """CannotDo unless there is one whose signature could be checked and would count."""
    flaws = []
    for name in names:
        found = _named(ring, name)
        flaw = _state(found[0]) if found else "there is no such key"
        if flaw is None:
            return
        flaws.append(CannotDo(f"no signature of {name} can be accepted: {flaw}", "gpg --import brings a key in"))
    if flaws:
        raise flaws[0]


def _named(ring: Keyring, name: str, secret: bool = False) -> list[Key]:
    # An empty name would be all of them.
    return list(ring.list_keys(secret, keys=["--", name])) if name.strip() else []


def _only(found: list[Key], name: str, use: str, what: str) -> str:
    found = _with_address(found, name)
    good = [key for key in found if _flaw(key, use) is None]
    if not good:
        raise CannotDo(f"{what}: {_flaw(found[0], use)}", "gpg --list-keys shows the keys")
    if len(good) > 1:
        all_of_them = ", ".join(f"{key['fingerprint']} ({', '.join(key['uids'])})" for key in good)
        raise CannotDo(f"{what}: the name fits {len(good)} keys", f"give the fingerprint of one: {all_of_them}")
    return str(good[0]["fingerprint"])


def _with_address(found: list[Key], name: str) -> list[Key]:
    """me@example.org also fits some@example.org; who has just this address comes first, as with gpg."""
    address = name.strip("<>").lower()
    exact = [key for key in found if any(address in (uid.lower(), _address(uid)) for uid in key["uids"])]
    return exact if "@" in name and exact else found


def _address(uid: str) -> str:
    return uid.rpartition("<")[2].rstrip(">").lower()


def _state(key: Key) -> str | None:
    return STATES["d"] if "D" in key["cap"] else STATES.get(key["trust"])


def _flaw(key: Key, use: str) -> str | None:
    """Why the key is not good for this use.  A capital letter: as a whole it is, by a key or subkey that is valid."""
    state = _state(key)
    if state or use.upper() in key["cap"]:
        return state
    # gnupg lists the uses and states of subkeys of public keys only.
    parts = [part for part in key.get("subkey_info", {}).values() if use in (part.get("cap") or "")]
    spent = [STATES[part["trust"]] for part in parts if part["trust"] in STATES]
    return f"for {USES[use]}, {spent[0]}" if spent else f"the key is not for {USES[use]}"
