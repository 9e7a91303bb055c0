"""Where a move over a link goes: what a URI names, and the command that leads there."""

import functools
import os
import re
import shlex
from typing import NamedTuple

from ..errors import WrongUsage

# A dead network is to be noticed; what VM_SSH or a configuration says comes first, being said before.
ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
# As secure as ssh's own first choice and, where the processor has AES, nearly twice as fast (measured).
QUICK = ("-o", "Ciphers=^aes128-gcm@openssh.com,aes256-gcm@openssh.com")


class Transport(NamedTuple):
    """To the other side: a shell's `command`, or ssh (`words`: it and its options) to run `remote` on `host`.

    sums: whether the data are to carry checksums.
    """

    uri: str
    command: str | None = None
    words: tuple[str, ...] = ()
    host: str = ""
    remote: str = ""
    sums: bool = True

    def argv(self) -> tuple[str, ...]:
        """The ssh to start, whole."""
        quick = QUICK if has_aes() and _leaves_ciphers_open(self.words, (self.host, self.remote)) else ()
        return (*self.words, *quick, "--", self.host, self.remote)


def transport_of(uri: str) -> Transport | None:
    """The way that `link:COMMAND` or `ssh://[USER@]HOST[:PORT]/GUEST` names; None for another URI."""
    name, _, rest = uri.partition(":")
    if name == "link" and rest:
        return Transport(uri, command=rest)
    if name == "ssh" and rest.startswith("//"):
        return _over_ssh(uri)
    return None


def _over_ssh(uri: str) -> Transport:
    from urllib.parse import unquote, urlsplit

    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise WrongUsage(f"'{uri}' is no place to move a guest to: {error}") from error
    path = unquote(parts.path)
    # As git has it: a path is absolute, unless it begins in the home.
    path = path.removeprefix("/~/")
    if not parts.hostname or path in ("", "/") or parts.hostname.startswith("-") or parts.query or parts.fragment:
        hint = (
            "expected ssh://[USER@]HOST[:PORT]/PATH, the path of the waiting guest's QMP socket; /~/ is the home there"
        )
        raise WrongUsage(f"'{uri}' is no place to move a guest to", hint)
    # As it was written: urlsplit's own is in small letters.
    host = parts.netloc.rpartition("@")[2].removesuffix(f":{port}").strip("[]")
    user = parts.netloc.rpartition("@")[0]
    ssh = (*shlex.split(os.environ.get("VM_SSH") or "ssh"), "-T", *ALIVE)
    ssh += (*(("-p", str(port)) if port else ()), *(("-l", user) if user else ()))
    return Transport(uri, words=ssh, host=host, remote=f"vm-restore --receive {shlex.quote(path)}", sums=False)


def has_aes() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return re.search(r"^(flags|Features)\b.*\baes\b", file.read(), re.MULTILINE) is not None
    except OSError:
        return False


@functools.cache
def _leaves_ciphers_open(ssh: tuple[str, ...], where: tuple[str, str]) -> bool:
    """Whether no configuration of this ssh says anything about ciphers, and it knows the quick ones.

    False where that cannot be asked.  where: the host and the command there, for what a configuration makes of them.
    """
    if os.path.basename(ssh[0]) != "ssh":
        # Who knows what it does when it is run for an answer.
        return False
    asked = ("-G", "--", *where)
    chosen = _ciphers(*ssh, *asked)
    open_to_us = chosen is not None and chosen == _ciphers(*ssh, "-F", "none", *asked)
    return open_to_us and _ciphers(*ssh, *QUICK, *asked) is not None


def _ciphers(*command: str) -> str | None:
    import subprocess

    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=2, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(rb"^ciphers (.*)$", done.stdout, re.MULTILINE)
    return found[1].decode() if found and not done.returncode else None
