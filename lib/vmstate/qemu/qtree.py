"""The devices of a guest as HMP `info qtree` tells them, with the place of each.

It is the one answer that has all of them: `query-pci` is silent about what is behind a bridge that no firmware has
numbered, as in a QEMU that waits for a guest.
"""

import re

_DEV = re.compile(r'dev: (.*?), id "(.*)"')
_PCI = re.compile(r"class .*, addr ([0-9a-f]+):([0-9a-f]{2}\.[0-9a-f]), pci id ([0-9a-f]{4}:[0-9a-f]{4})\b.*")
_USB = re.compile(r"addr [\d.]+, port ([\d.]+),.*")
_VALUE = re.compile(r'(\S+) = "?(.*?)"?(?: \(0x[0-9a-f]+\))?')
# What tells apart the devices of one bus.
PLACES = ("unit", "channel", "scsi-id", "lun", "nr")


class _Node:
    """A device or, with a `name`, a bus."""

    def __init__(self, depth: int, above: "_Node | None", *, type: str = "", id: str = "", name: str = "") -> None:  # noqa: A002 - QEMU's names
        self.depth, self.above = depth, above
        self.type, self.id, self.name = type, id, name
        self.pci = self.address = self.drive = ""
        self.place: dict[str, str] = {}


def devices(text: str) -> list[dict[str, str]]:
    """`type`, `id`, `bus` (its type), `at`, `pci` (vendor and device id) and `drive` of each device.

    A PCI device is at an address as QEMU has it in names of sections, `0000:00:02.0:00.0`; another one at that of the
    PCI device above it, and its place on its bus.
    """
    found: list[_Node] = []
    inner: _Node | None = None
    for line in text.splitlines():
        body = line.strip()
        depth = len(line) - len(line.lstrip())
        while inner and inner.depth >= depth:
            inner = inner.above
        if device := _DEV.fullmatch(body):
            inner = _Node(depth, inner, type=device[1], id=device[2])
            found.append(inner)
        elif body.startswith("bus: "):
            inner = _Node(depth, inner, name=body[5:])
        elif inner:
            _learn(inner, body)
    return [_as_dict(node) for node in found]


def _learn(node: _Node, body: str) -> None:
    if node.name:
        if body.startswith("type "):
            node.type = body[5:]
    elif pci := _PCI.fullmatch(body):
        bridge = _pci_above(node.above)
        node.address = f"{bridge.address}:{pci[2]}" if bridge else f"0000:{pci[1]}:{pci[2]}"
        node.pci = pci[3]
    elif usb := _USB.fullmatch(body):
        node.place["port"] = usb[1]
    elif (value := _VALUE.fullmatch(body)) and value[1] in PLACES:
        node.place[value[1]] = value[2]
    elif value and value[1] == "drive":
        node.drive = value[2]


def _pci_above(node: _Node | None) -> _Node | None:
    while node and not node.pci:
        node = node.above
    return node


def _as_dict(node: _Node) -> dict[str, str]:
    bus = node.above.type if node.above else ""
    at = node.address
    if not at:
        near = _pci_above(node)
        number = re.search(r"\.(\d+)$", node.above.name) if node.above and bus == "IDE" else None
        place = [f"bus {number[1]}"] if number else []
        place += [f"{key} {node.place[key]}" for key in (*PLACES, "port") if key in node.place]
        at = " ".join(filter(None, (near.address if near else "", *place)))
    return {"type": node.type, "id": node.id, "bus": bus, "at": at, "pci": node.pci, "drive": node.drive}
