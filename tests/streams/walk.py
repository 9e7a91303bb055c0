"""A walk through a state up to its devices, apart from the toolkit's own, which can be held against it."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter

LENGTHS = {"configuration/uuid": 16, "configuration/target-page-bits": 4}
FLAGS = {0x002: "zero", 0x008: "page", 0x040: "xbzrle", 0x100: "compress", 0x200: "flush"}
MIB = 1 << 20


def whole(state: bytes) -> bool:
    """Whether the description is there to its last byte."""
    return describing(state) is not None


def describing(state: bytes) -> int | None:
    """Where the end mark before the description is."""
    for found in re.finditer(rb'(?s)\0\x06(....)\{ ?"', state):
        if found.start() + 6 + int.from_bytes(found[1], "big") == len(state):
            return found.start()
    return None


class Walk:
    """What is in a state: `names` of sections, `blocks`, `flags` of records, how often each of `pages` was sent, ..."""

    def __init__(self, state: bytes) -> None:
        self.bytes = bytes(state)
        self.at = 8
        self.names: list[str] = []
        self.blocks: dict[str, int] = {}
        self.flags: Counter[str] = Counter()
        self.pages: Counter[tuple[str, int]] = Counter()
        self.commands: list[tuple[int, bytes]] = []
        self.parts = 0
        self.ended = self.early = False
        self.devices = 0
        self.described = whole(state)
        self._block = ""
        self._ids: dict[int, str] = {}
        if self.bytes[:8] != b"QEVM\0\0\0\3":
            raise ValueError("no state")
        self._configuration()
        while self._item():
            pass
        if self.described:
            json.loads(self.bytes[(describing(state) or 0) + 6 :])

    def has(self, *words: bytes) -> bool:
        return all(word in self.bytes for word in words)

    def __str__(self) -> str:
        again = max(self.pages.values(), default=0)
        said = f"{self.machine}, {dict(self.flags)}, up to {again} times, {self.parts} parts, sections {self.names}"
        return f"{said}, commands {[command for command, _ in self.commands]}, blocks {list(self.blocks)}"

    # reading

    def _take(self, count: int) -> bytes:
        taken = self.bytes[self.at : self.at + count]
        if len(taken) != count:
            raise ValueError(f"cut at {self.at}")
        self.at += count
        return taken

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "big")

    def _text(self) -> str:
        return self._take(self._number(1)).decode()

    def _configuration(self) -> None:
        if self._number(1) != 7:
            raise ValueError("no configuration")
        self.machine = self._take(self._number(4)).decode()
        self.configuration: dict[str, bytes] = {}
        while self.bytes[self.at] == 5:
            self.at += 1
            name, _ = self._text(), self._number(4)
            begin = self.at
            if name in LENGTHS:
                self._take(LENGTHS[name])
            else:
                for _ in range(self._number(4)):
                    self._text()
            self.configuration[name] = self.bytes[begin : self.at]
        self.capabilities = self.configuration.get("configuration/capabilities", b"")

    def _item(self) -> bool:
        """Go past one thing; whether there is more before the devices."""
        tag = self._number(1)
        if tag == 8:
            self._command()
            return True
        if tag == 4 and (self.parts or self.ended):
            self.devices = self.at - 1
            return False
        if tag == 0 or not 1 <= tag <= 4:
            if tag:
                raise ValueError(f"tag {tag} at {self.at - 1}")
            return False
        section = self._number(4)
        if tag in (1, 4):
            self._ids[section] = self._text()
            self._take(8)
            self.names.append(self._ids[section])
        footer = b"\x7e" + struct.pack(">I", section)
        if self._ids[section] == "ram":
            self.parts += tag == 2
            self.ended |= tag == 3
            while self._record():
                pass
        else:
            self.early |= tag == 4
            self.at = self.bytes.index(footer, self.at)
        if self._take(5) != footer:
            raise ValueError(f"no footer at {self.at - 5}")
        return True

    def _command(self) -> None:
        command, length = self._number(2), self._number(2)
        self.commands.append((command, self._take(length)))
        if command == 7:
            # LISTEN is first, RUN is last; the devices are between.
            package = self._take(int.from_bytes(self.commands[-1][1], "big"))
            first, last = package[:5], package[-5:]
            for item in (first, last):
                if item[0] == 8:
                    self.commands.append((int.from_bytes(item[1:3], "big"), b""))

    def _record(self) -> bool:
        word = self._number(8)
        offset, flags = word & ~0xFFF, word & 0xFFF
        if flags & 0x010:
            return False
        if flags & 0x004:
            self._list(offset)
            return True
        if flags == 0x200:
            self.flags["flush"] += 1
            return True
        if not flags & 0x020:
            self._block = self._text()
        self.flags[FLAGS[flags & ~0x020]] += 1
        self.pages[self._block, offset] += 1
        match flags & ~0x020:
            case 0x002:
                self._take(1)
            case 0x008:
                self._take(4096)
            case 0x040:
                self._take(1)
                self._take(self._number(2))
            case 0x100:
                self._take(self._number(4))
        return True

    def _list(self, total: int) -> None:
        while sum(self.blocks.values()) < total:
            name, size = self._text(), self._number(8)
            self.blocks[name] = size
            if b"x-ignore-shared" in self.capabilities:
                self._take(8)
            if b"mapped-ram" in self.capabilities:
                self._take(20)
                self.at = self._number(8) + size
