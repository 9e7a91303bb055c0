"""What a command imports until it has met its guest or its input: nothing that costs more than that itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

HEAVY = {
    "asyncio",
    "concurrent",
    "ctypes",
    "dataclasses",
    "gnupg",
    "hashlib",
    "inspect",
    "ipaddress",
    "logging",
    "numpy",
    "random",
    "shutil",
    "subprocess",
    "tempfile",
    "tqdm",
    "zstandard",
}
# Each as far as its first error: the guest is not there, the input is none.
COMMANDS: dict[str, tuple[str, ...]] = {
    "vm-announce": ("none",),
    "vm-cancel": ("none",),
    "vm-compress": ("none",),
    "vm-cont": ("none",),
    "vm-dump": ("none",),
    "vm-encrypt": ("-d", "none"),
    "vm-inspect": ("none",),
    "vm-migrate": ("none", "tcp:localhost:1"),
    "vm-restore": ("none",),
    "vm-speed": ("none", "1m"),
    "vm-status": ("none",),
    "vm-stop": ("none",),
    "vm-verify": ("none",),
}
# What one of them is about.
NEEDED = {"vm-announce": {"ipaddress"}, "vm-encrypt": {"gnupg", "ipaddress", "logging", "random", "subprocess"}}


def test_every_command_is_here() -> None:
    assert sorted(COMMANDS) == sorted(path.name for path in (ROOT / "bin").glob("vm-*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_heavy_comes_first(name: str, work: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "bin" / name), *COMMANDS[name]]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, cwd=work)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert f"{name}: error: " in done.stderr
    assert "docopt" in imported
    assert imported & HEAVY <= NEEDED.get(name, set())
