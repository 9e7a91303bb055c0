"""A switch of Open vSwitch: which one a port belongs to, and a frame into it as if it had come from that port.

Sent on the switch's internal port instead, a frame would have the switch believe that the card is there.
"""

import errno
import os
import shutil
import subprocess

from .nic import TOOLS

PATIENCE = 5


def bridge_of(port: str) -> str | None:
    """The bridge that has this port, or is this interface itself; None where none is, or no Open vSwitch runs."""
    if not _tool("ovs-vsctl"):
        return None
    if _run("ovs-vsctl", f"--timeout={PATIENCE}", "br-exists", port).returncode == 0:
        return port
    done = _run("ovs-vsctl", f"--timeout={PATIENCE}", "iface-to-br", port)
    return done.stdout.strip() or None if done.returncode == 0 else None


def send(bridge: str, port: str, frame: bytes) -> None:
    """Give the switch a frame from a port, for its own table to decide about; OSError with the reason."""
    what = f"in_port={port},packet={frame.hex()},actions=TABLE"
    done = _run("ovs-ofctl", f"--timeout={PATIENCE}", "packet-out", bridge, what)
    if done.returncode:
        raise OSError(errno.EIO, done.stderr.strip() or f"ovs-ofctl ended with status {done.returncode}")


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{TOOLS}")


def _run(name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [_tool(name) or name, *words]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
