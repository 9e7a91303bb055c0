"""The facts about a guest that `migrate.preflight` compares: machine, CPU, memory, devices, disks, networks.

The files and bridges behind a guest are looked up by this process, which is on the guest's host.
"""

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import Refused
from ..net import nic
from . import answers, nics, qtree
from .blocks import Medium, block_devices
from .monitor import Monitor
from .state import query, ram_blocks

Facts = dict[str, Any]
T = TypeVar("T")
# The header of a qcow2 image, a table of partitions.
HEAD = 64 << 10
# Three names of one format.
RAW = frozenset(("file", "host_device", "raw"))
_TEMPORARY = re.compile(r"vl\.\w{6}")


def facts(monitor: Monitor) -> Facts:
    """What there is to compare of one guest, running or waiting, as JSON knows it; nothing is changed."""
    vcpus = answers.vcpus(monitor)
    blocks = ram_blocks(monitor)
    devices = qtree.devices(answers.human(monitor, "info qtree"))
    return {
        "host": _host(),
        "qemu": list(answers.version(monitor)),
        "machine": answers.machine(monitor),
        "kvm": _or(False, answers.kvm, monitor),
        "ram": sum(used for used, _ in blocks.values()),
        "blocks": {name: list(sizes) for name, sizes in blocks.items()},
        "vcpus": len(vcpus),
        "cpu": _cpu(monitor, vcpus[0]) if vcpus else {},
        "devices": devices + _without_bus(monitor, {device["type"] for device in devices}),
        "disks": _disks(monitor, {device["drive"]: device for device in devices if device["drive"]}),
        "blocked": list(query(monitor).blocked),
        "nics": _nics(monitor),
    }


def _or(otherwise: T, ask: Callable[..., T], *arguments: Any) -> T:
    """What one asks for; something else where QEMU refuses that."""
    try:
        return ask(*arguments)
    except Refused:
        return otherwise


def _host() -> str:
    """What two processes on one host, and only they, have in common; empty where it is not known."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    return ""


def _cpu(monitor: Monitor, path: str) -> Facts:
    words = _or(None, answers.feature_words, monitor, path)
    found = {"type": _or("", answers.qom_text, monitor, path, "type")}
    return found if words is None else {**found, "features": words}


def _without_bus(monitor: Monitor, known: set[str]) -> list[dict[str, str]]:
    """Devices that are on no bus, such as memory that can be unplugged; vCPUs are counted elsewhere."""
    found = []
    for path in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child in _or(list[answers.Child](), answers.children, monitor, path):
            name = re.fullmatch(r"child<(.+)>", child.type)
            if name and name[1] not in known and not name[1].endswith("-cpu"):
                found.append({"type": name[1], "id": "", "bus": "", "at": "", "pci": "", "drive": ""})
    return found


def _disks(monitor: Monitor, users: dict[str, dict[str, str]]) -> list[Facts]:
    found = []
    for disk in block_devices(monitor):
        node = disk.medium.node if disk.medium else ""
        user = users.get(disk.device) or users.get(node) or {}
        found.append(
            {
                "device": disk.device,
                # Names that QEMU has made up begin with '#'.
                "node": "" if node.startswith("#") else node,
                "at": user.get("at", ""),
                "type": user.get("type", ""),
                "removable": disk.removable,
                "medium": _medium(disk.medium, monitor.pid()) if disk.medium else None,
            }
        )
    return found


def _medium(medium: Medium, pid: int) -> Facts:
    name = innermost(medium.image.name)
    path = _path(name, pid)
    file = _file(path) if path else None
    unseen = path is not None and file is None
    return {
        "format": "raw" if medium.driver in RAW else medium.driver,
        "size": medium.image.size,
        "ro": medium.ro,
        "name": name,
        "file": file,
        "temporary": bool(file and file.pop("removed")) or (unseen and bool(_TEMPORARY.fullmatch(name.split("/")[-1]))),
    }


def innermost(name: str) -> str:
    """The file, or whatever it is, at the bottom of the layers that a name of QEMU tells."""
    try:
        node = json.loads(name.removeprefix("json:")) if name.startswith("json:") else None
    except ValueError:
        # QEMU cuts long ones off.
        node = None
    if not isinstance(node, dict):
        return name
    while isinstance(node.get("file"), dict):
        node = node["file"]
    return str(node["filename"]) if "filename" in node else json.dumps(node, sort_keys=True)


def _path(name: str, pid: int) -> str | None:
    """Where this process can open what QEMU has open under a name; None where that is no file."""
    name = name.removeprefix("file:")
    if name.startswith("{") or ":" in name.split("/")[0]:
        return None
    with contextlib.suppress(OSError):
        name = os.path.join(f"/proc/{pid}/cwd", name)
        real = os.path.realpath(name)
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{descriptor}"
            with contextlib.suppress(OSError):
                if os.readlink(link) in (real, f"{real} (deleted)"):
                    return link
    return name


def _file(path: str) -> Facts | None:
    """What tells a file from another one; `head` is None where it may not be read."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    block = stat.S_ISBLK(found.st_mode)
    if not block and not stat.S_ISREG(found.st_mode):
        return None
    head = None
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            head = hashlib.sha256(file.read(HEAD)).hexdigest()
    return {
        "block": block,
        "id": [found.st_rdev, 0] if block else [found.st_dev, found.st_ino],
        "world": _worldwide(found.st_rdev) if block else None,
        "head": head,
        "removed": found.st_nlink == 0,
    }


def _worldwide(device: int) -> str | None:
    """The name of a block device that all hosts know it by."""
    for name in ("wwid", "device/wwid", "dm/uuid"):
        with contextlib.suppress(OSError):
            path = f"{nic.SYS}/dev/block/{os.major(device)}:{os.minor(device)}/{name}"
            with open(path, encoding="ascii", errors="replace") as file:
                return file.read().strip() or None
    return None


def _nics(monitor: Monitor) -> list[Facts]:
    text = answers.human(monitor, "info network")
    cards = nics.from_info_network(text, monitor.pid(), answers.rx_filters(monitor))
    known = _addresses() if any(card.iface for card in cards) else {}
    return [{"mac": card.mac, "iface": card.iface, "subnets": _subnets(card.iface, known)} for card in cards]


def _addresses() -> dict[str, list[str]]:
    """The subnets of each interface of this host; empty where they cannot be told."""
    tool = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:{nic.TOOLS}")
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, KeyError):
        command = [tool or "ip", "-j", "addr", "show"]
        answer = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=5, check=True)
        for link in json.loads(answer.stdout or b"[]"):
            for at in link.get("addr_info", ()):
                if at.get("scope") == "global":
                    subnet = ipaddress.ip_interface(f"{at['local']}/{at['prefixlen']}").network
                    found.setdefault(link["ifname"], []).append(str(subnet))
    return found


def _subnets(iface: str | None, known: dict[str, list[str]]) -> list[str]:
    """Those of the bridge or the device that a tap or macvtap leads to, or its own."""
    if not iface or "/" in iface:
        return []
    names = [iface]
    with contextlib.suppress(OSError):
        place = f"{nic.SYS}/class/net/{iface}"
        above = [name for name in os.listdir(place) if name == "master" or name.startswith("lower_")]
        names += [os.path.basename(os.readlink(f"{place}/{name}")) for name in above]
    return sorted({subnet for name in names for subnet in known.get(name, ())})
