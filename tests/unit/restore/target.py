"""A scripted QEMU that waits for a state, or runs on pages of it that are still to come."""

from __future__ import annotations

import json
from typing import Any

from vmstate.qemu import markers
from vmstate.stream.validate import State

from unit.qemu.fake_qemu import FakeQemu


class Target(FakeQemu):
    """One that waits for the state, and has what is in it."""

    def __init__(self, expected: State) -> None:
        super().__init__()
        self.run = "inmigrate"
        self.objects["machine"] = f"{expected.machine}-machine"
        self._blocks = {page_map.block.text: page_map.block.size for page_map in expected.maps.values()}
        self._vcpus = sum(part.name == "cpu_common" for part in expected.parts)
        # Whether it has what a lazy restore needs
        self.userfaultfd = True

    def lost(self, identity: str, *, halted: bool = False) -> None:
        """It was restored lazily from the state `identity`, and has no server any more."""
        self.run, self.migration = "paused" if halted else "running", "postcopy-paused"
        self.objects[markers.LAZY] = json.dumps({"state": identity})
        if halted:
            self.objects[markers.HALTED] = "{}"

    def x_query_ramblock(self) -> dict[str, str]:
        rows = [f"{name}    4 KiB  0x0 0x{size:x} 0x{size:x} 0x0" for name, size in self._blocks.items()]
        return {"human-readable-text": "\n".join(rows)}

    def query_cpus_fast(self) -> list[dict[str, Any]]:
        return [{"qom-path": f"/machine/unattached/device[{number}]"} for number in range(self._vcpus)]

    def query_memdev(self) -> list[dict[str, Any]]:
        return []

    def human_monitor_command(self, command_line: str) -> str:
        return ""

    def migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.userfaultfd and {"capability": "postcopy-ram", "state": True} in capabilities:
            raise KeyError("userfaultfd, not today")
        return super().migrate_set_capabilities(capabilities)

    def stop(self) -> dict[str, Any]:
        return {} if self.run == "inmigrate" else super().stop()

    def cont(self) -> dict[str, Any]:
        return {} if self.run == "inmigrate" else super().cont()
