"""The images among the arguments of a QEMU, and others in their places (-drive, -blockdev, -hda; qemu(1))."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import WrongUsage

# Options whose value is the path of an image, and nothing else
PLAIN = re.compile(r"--?(hd[a-d]|sd|pflash|mtdblock)")
KEYED = re.compile(r"--?(drive|blockdev)")
PATHS = ("file", "file.filename", "filename")


def put_in_place(command: Sequence[str], meant: Callable[[str], bool], overlay: str) -> list[str]:
    """The command with the qcow2 `overlay` where it has the path of an image that is `meant`.

    WrongUsage where it has none, or says itself what lies below.
    """
    made = list(command)
    found = 0
    nodes: set[str] = set()
    for number, value in enumerate(command):
        option = command[number - 1] if number else ""
        if PLAIN.fullmatch(option) and meant(value):
            made[number] = overlay
            found += 1
        elif KEYED.fullmatch(option) and (keys := Keys(value, option)).put(meant, overlay):
            made[number] = keys.text()
            found += 1
            if keys.node is not None:
                nodes.add(keys.node)
    if found != 1:
        times = "is not" if not found else f"is {found} times"
        raise WrongUsage(f"an image of the checkpoint {times} among the arguments of QEMU")
    _set_formats(made, nodes)
    return made


def _set_formats(made: list[str], nodes: set[str]) -> None:
    """Of images whose file has an option of its own, a node."""
    used = set()
    for number, value in enumerate(made):
        option = made[number - 1] if number else ""
        if KEYED.fullmatch(option) and (node := (keys := Keys(value, option)).get("file")) in nodes:
            keys.be_qcow2()
            made[number] = keys.text()
            used.add(node)
    if nodes - used:
        raise WrongUsage("an image of the checkpoint is used as it is, without a format above its file")


class Keys:
    """The keys of an option, written as QEMU's lists or as JSON; those of a nested one have a dot."""

    def __init__(self, text: str, option: str = "") -> None:
        self._json: dict[str, Any] | None = None
        if text.startswith("{"):
            try:
                self._json = json.loads(text)
            except ValueError:
                self._json = {}
        words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
        self._words = [word.partition("=") for word in words]
        if option.endswith("blockdev") and not self._words[0][1]:
            # Its first key need not be named.
            self._words[0] = ("driver", "=", self._words[0][0])
        self.node: str | None = None

    def get(self, name: str) -> str | None:
        if self._json is None:
            return next((value for key, _, value in self._words if key == name), None)
        found: Any = self._json
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found if isinstance(found, str) else None

    def set(self, name: str, value: str) -> None:
        """Of a key that is there."""
        if self._json is None:
            self._words = [(key, "=", value) if key == name else (key, sign, had) for key, sign, had in self._words]
            return
        *above, last = name.split(".")
        found: Any = self._json
        for part in above:
            found = found[part]
        found[last] = value

    def put(self, meant: Callable[[str], bool], overlay: str) -> bool:
        """Put the overlay in the place of an image that is meant, if there is one."""
        for name in PATHS:
            value = self.get(name)
            if value is None or not meant(value.removeprefix("file:")):
                continue
            self.set(name, overlay)
            if name == "filename":
                self.node = self.get("node-name") or ""
            else:
                self.be_qcow2()
            return True
        return False

    def be_qcow2(self) -> None:
        words = self._json if self._json is not None else [name for name, _, _ in self._words]
        if any(name == "backing" or name.startswith("backing.") for name in words):
            raise WrongUsage("the arguments of QEMU say what lies below an image of the checkpoint", "leave that to it")
        for name in ("format", "driver"):
            if self.get(name) is not None:
                self.set(name, "qcow2")

    def text(self) -> str:
        if self._json is not None:
            return json.dumps(self._json)
        return ",".join(f"{key}{sign}{value}".replace(",", ",,") for key, sign, value in self._words)
