"""A QMP server that says what a script has it say, for what a real QEMU does only at a bad moment, or never.

    with QmpServer(folder / "qmp", answer) as server:
        with Monitor(server.path) as monitor: ...

`answer` is called with each command and gives what is sent for it: objects, or bytes that are sent as they are.  A
Deed in their place ends the conversation (`CLOSE`), or keeps silent about it (`SILENCE`).
"""

from __future__ import annotations

import array
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any


class Deed(Enum):
    CLOSE = 1
    SILENCE = 2


CLOSE, SILENCE = Deed.CLOSE, Deed.SILENCE
Said = dict[str, Any] | bytes | Deed
Answer = Callable[[dict[str, Any]], Iterable[Said]]
GREETING: dict[str, Any] = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0}}, "capabilities": ["oob"]}}


def empty(command: dict[str, Any]) -> Iterable[Said]:
    """As QEMU answers a command that gives nothing."""
    return ({"return": {}, "id": command["id"]},)


class QmpServer:
    """heard: the commands of all conversations.  taken: descriptors that came with them."""

    def __init__(
        self, path: Path, answer: Answer = empty, *, greeting: Iterable[Said] = (GREETING,), pieces: int = 1 << 20
    ) -> None:
        """pieces: everything is sent in pieces of so many bytes."""
        self.path = str(path)
        self.heard: list[dict[str, Any]] = []
        self.taken: list[int] = []
        self._answer, self._greeting, self._pieces = answer, greeting, pieces
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> QmpServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._server.close()
        for fd in self.taken:
            os.close(fd)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with client:
                try:
                    self._converse(client)
                except OSError:
                    # The client has left first.
                    continue

    def _converse(self, client: socket.socket) -> None:
        if not self._say(client, self._greeting):
            return
        text = ""
        while True:
            data, ancillary, _, _ = client.recvmsg(1 << 16, socket.CMSG_SPACE(16))
            for _, _, held in ancillary:
                self.taken += array.array("i", held[: len(held) - len(held) % 4])
            if not data:
                return
            text = (text + data.decode()).lstrip()
            while text:
                try:
                    command, end = json.JSONDecoder().raw_decode(text)
                except ValueError:
                    break
                text = text[end:].lstrip()
                self.heard.append(command)
                if not self._say(client, self._answer(command)):
                    return

    def _say(self, client: socket.socket, what: Iterable[Said]) -> bool:
        """False where that was the end of it."""
        for said in what:
            if said is CLOSE:
                return False
            if said is SILENCE:
                continue
            data = said if isinstance(said, bytes) else json.dumps(said).encode() + b"\r\n"
            for at in range(0, len(data), self._pieces):
                client.sendall(data[at : at + self._pieces])
        return True
