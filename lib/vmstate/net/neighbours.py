"""What the host knows of its network: neighbour table, forwarding tables of bridges, interfaces."""

import contextlib
import ipaddress
import os
from collections.abc import Iterable
from typing import Any

from .nic import MAC, TOOLS, is_announceable, is_unicast


def neighbours() -> dict[str, tuple[str, ...]]:
    """MAC -> addresses by the host's neighbour table; empty where it cannot be read."""
    return from_neighbours(_told("ip", "-j", "neigh", "show"))


def learned() -> dict[str, tuple[str, ...]]:
    """Port of a bridge -> the MACs that it has learned there; empty where that cannot be read."""
    return from_forwarding(_told("bridge", "-j", "fdb", "show"))


def links() -> list[dict[str, Any]]:
    """What `ip -d -j link show` tells of every interface; empty where it cannot be asked."""
    return _told("ip", "-d", "-j", "link", "show")


def _told(name: str, *words: str) -> list[dict[str, Any]]:
    # Whoever only reads or writes lines needs none of these, and is under way the sooner.
    import json
    import shutil
    import subprocess

    tool = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{TOOLS}")
    if not tool:
        return []
    try:
        answer = subprocess.run([tool, *words], capture_output=True, timeout=5, check=True)
        return list(json.loads(answer.stdout or b"[]"))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return []


def from_forwarding(entries: Iterable[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The same from the answer of `bridge -j fdb show`."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries:
        mac = str(entry.get("mac", "")).lower()
        # What a person or the kernel has set: a port's own address, groups.
        by_hand = entry.get("state") in ("permanent", "static") or "self" in entry.get("flags", ())
        if not by_hand and MAC.fullmatch(mac) and is_unicast(mac):
            found.setdefault(str(entry.get("ifname")), {})[mac] = None
    return {port: tuple(macs) for port, macs in found.items()}


def from_neighbours(entries: Iterable[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The same from the answer of `ip -j neigh show`; IPv4 comes first."""
    known: dict[str, set[ipaddress.IPv4Address | ipaddress.IPv6Address]] = {}
    for entry in entries:
        # An advertisement that does not say "router" would take a router out of every neighbour's routes.
        if {"FAILED", "INCOMPLETE"} & set(entry.get("state", ())) or "router" in entry or "lladdr" not in entry:
            continue
        with contextlib.suppress(ValueError, KeyError):
            address = ipaddress.ip_address(entry["dst"])
            if is_announceable(address):
                known.setdefault(str(entry["lladdr"]).lower(), set()).add(address)
    return {mac: tuple(map(str, sorted(found, key=lambda a: (a.version, a.packed)))) for mac, found in known.items()}
