"""What of a QEMU its migration settings and markers need, as answers for `QmpServer`; each command is noted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from qmp_server import CLOSE, Said

CAPABILITIES = ("xbzrle", "auto-converge", "return-path", "late-block-activate", "postcopy-ram", "background-snapshot")


class FakeQemu:
    """run and migration are what it says of its guest; refuses: names of commands, with what is said."""

    def __init__(self) -> None:
        self.capabilities = dict.fromkeys(CAPABILITIES, False)
        self.parameters: dict[str, Any] = {
            "max-bandwidth": 128 << 20,
            "downtime-limit": 300,
            "announce-rounds": 5,
            "tls-creds": "",
        }
        self.objects: dict[str, str] = {}
        # Of these, those that say who works on it
        self.claims: dict[str, str] = {}
        self.run, self.migration = "running", "none"
        self.version, self.kvm = (10, 0), False
        self.refuses: dict[str, str] = {}
        # The conversation ends at the nth command from now on.
        self.dies_in = 0
        self.heard: list[str] = []

    def __call__(self, command: dict[str, Any]) -> Iterable[Said]:
        name = str(command.get("execute"))
        self.heard.append(name)
        self.dies_in -= 1
        if self.dies_in == 0:
            return (CLOSE,)
        if name in self.refuses:
            return ({"error": {"class": "GenericError", "desc": self.refuses[name]}, "id": command["id"]},)
        try:
            answer = getattr(self, name.replace("-", "_"), lambda **_: {})(
                **{key.replace("-", "_"): value for key, value in command.get("arguments", {}).items()}
            )
        except KeyError as error:
            return ({"error": {"class": "GenericError", "desc": f"no {error}"}, "id": command["id"]},)
        return ({"return": answer, "id": command["id"]},)

    def settings(self) -> tuple[dict[str, bool], dict[str, Any]]:
        return dict(self.capabilities), dict(self.parameters)

    # commands

    def query_migrate(self) -> dict[str, Any]:
        return {} if self.migration == "none" else {"status": self.migration}

    def query_status(self) -> dict[str, Any]:
        return {"status": self.run, "running": self.run == "running"}

    def query_version(self) -> dict[str, Any]:
        return {"qemu": {"major": self.version[0], "minor": self.version[1], "micro": 0}, "package": ""}

    def query_kvm(self) -> dict[str, Any]:
        return {"enabled": self.kvm, "present": True}

    def query_migrate_capabilities(self) -> list[dict[str, Any]]:
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    def migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> dict[str, Any]:
        for entry in capabilities:
            if entry["capability"] not in self.capabilities:
                raise KeyError(entry["capability"])
            self.capabilities[entry["capability"]] = entry["state"]
        return {}

    def query_migrate_parameters(self) -> dict[str, Any]:
        return dict(self.parameters)

    def migrate_set_parameters(self, **values: Any) -> dict[str, Any]:
        self.parameters |= {name.replace("_", "-"): value for name, value in values.items()}
        return {}

    def qom_list(self, path: str) -> list[dict[str, str]]:
        return [{"name": name, "type": "child<secret>"} for name in ("compat", *self.objects, *self.claims)]

    def qom_get(self, path: str, property: str) -> str:  # noqa: A002 - QEMU's name
        return (self.objects | self.claims)[path.rpartition("/")[2]]

    def object_add(self, qom_type: str, id: str, data: str) -> dict[str, Any]:  # noqa: A002 - QEMU's name
        there = self._store(id)
        if id in there:
            raise KeyError(f"second {id}")
        json.loads(data)
        there[id] = data
        return {}

    def object_del(self, id: str) -> dict[str, Any]:  # noqa: A002 - QEMU's name
        del self._store(id)[id]
        return {}

    def _store(self, name: str) -> dict[str, str]:
        return self.claims if name.startswith("vmstate-claim-") else self.objects

    def stop(self) -> dict[str, Any]:
        self.run = "paused"
        return {}

    def cont(self) -> dict[str, Any]:
        self.run = "running"
        return {}
