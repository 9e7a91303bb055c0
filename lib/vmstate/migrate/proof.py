"""The secret of a migration: who speaks of one that was begun before shows it, and so does who answers.

Source: docs/link.md, "The secret".
"""

import json
import os
import re

from ..errors import CannotDo
from ..qemu import markers
from ..qemu.markers import Marks

SECRET = "[0-9a-f]{64}"
NONCE = PROOF = SECRET
SIZE = 32
# Which markers a question is about: those of a guest that has come, or of one that has left.
MARKERS = {
    "settle": (markers.ARRIVED, markers.TAKEN),
    "resume": (markers.ARRIVED, markers.TAKEN),
    "grant": (markers.MOVED, markers.DECIDED),
}
OLD = "its migration was begun by an older vmstate, which drew no secret for it; recover it with that version"


class Unknown(CannotDo):
    """Here is no guest of this migration, or whoever asked has not shown its secret: which of them is not told."""

    def __init__(self, message: str = "no guest of this migration is here, or its secret was not proven") -> None:
        super().__init__(message)


def draw() -> str:
    """A new secret, or a nonce."""
    return os.urandom(SIZE).hex()


class Talk:
    """A conversation about a migration that was begun before.

    Its secret is not in it: each side proves what it says with a code that holds for this conversation alone, by the
    nonces of both.  asker, asked: these nonces.
    """

    def __init__(self, purpose: str, move: str, secret: str, asker: str, asked: str = "") -> None:
        self.purpose, self.move, self.asker, self.asked = purpose, move, asker, asked
        self._secret = secret

    @classmethod
    def about(cls, purpose: str, move: str, secret: object) -> "Talk":
        """To ask the other side; `secret` is what our marker has."""
        if not _is_secret(secret):
            raise CannotDo(f"cannot ask the other side for the guest: {OLD}")
        return cls(purpose, move, str(secret), draw())

    @classmethod
    def of(cls, purpose: str, move: str, found: Marks, asker: str, asked: str) -> "Talk":
        """To answer: with the secret in the markers.  Unknown where none of them is of this migration."""
        for name in MARKERS[purpose]:
            if name in found and move and found[name].get("move") == move:
                secret = found[name].get("secret")
                if not _is_secret(secret):
                    raise CannotDo(f"cannot answer for the guest: {OLD}")
                return cls(purpose, move, str(secret), asker, asked)
        raise Unknown

    def prove(self, *said: str) -> str:
        """What shows that one who has the secret says this, in this conversation."""
        import hashlib
        import hmac

        words = json.dumps([self.purpose, self.move, self.asker, self.asked, *said])
        return hmac.new(self._secret.encode(), words.encode(), hashlib.sha256).hexdigest()

    def proves(self, proof: str, *said: str) -> bool:
        import hmac

        return hmac.compare_digest(proof.encode(), self.prove(*said).encode())

    def answer(self, state: str, run: str = "") -> dict[str, str]:
        """The fields of an accept."""
        return {"state": state, "run": run, "proof": self.prove("accept", state, run)}


def _is_secret(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(SECRET, value) is not None
