"""What decoded devices tell about a guest: where its vCPUs are, its PCI devices, its network cards, its run state.

Nothing here judges: what is absent or odd is left out.

Source of the names: target/i386/machine.c, target/arm/machine.c, migration/global_state.c, hw/pci/pci.c, hw/pci/msix.c,
hw/virtio/virtio.c (virtio_save), hw/virtio/virtio-pci.c, hw/virtio/virtio-mmio.c, hw/net.
"""

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from .device_values import Device, Field, Struct, find_field

# A function behind bridges has a place for each: 0000:00:1c.0:00.0
ADDRESS = re.compile(r"([0-9a-f]{4}:[0-9a-f]{2}(?::[0-9a-f]{2}\.[0-7])+)/")
CARDS = re.compile(
    "virtio-net|e1000e?|igb|rtl8139|vmxnet3|pcnet|ne2000|tulip|i82(?:55[0-9][a-z]*|562|801|596)|sungem|sunhme|smc91c111|lan9118|xgmac|"
    "cadence_gem|imx.fec|spapr_llan"
)
RECEIVE_ADDRESS = 0x5400 // 4  # register RA of Intel's cards, a word of `core.mac`
CODE = 1  # of the segments ES, CS, SS, DS, FS, GS
STACK = 4  # of the registers RAX, RCX, RDX, RBX, RSP...
PROTECTED = 1 << 0  # CR0.PE
LONG_ACTIVE = 1 << 10  # EFER.LMA
CAPABILITIES = 0x34
EXPRESS, MSIX = 0x10, 0x11


class Virtio(NamedTuple):
    """What virtio_save wrote.

    pci: the configuration space of the function; None on virtio-mmio.  features: the low 32 of those in use.
    config: the device's configuration as far as the guest has read it.  own: what is special to the kind of device, and
    all that follows it.
    """

    pci: bytes | None
    status: int
    features: int
    config: bytes
    queues: int
    own: bytes


def runstate(devices: list[Device]) -> str:
    """The run state at the time of the save, such as "paused"; "" where it is not told."""
    for device in devices:
        if device.name == "globalstate":
            return _bytes(device, "runstate").split(b"\0")[0].decode("ascii", "replace")
    return ""


def vcpus(devices: list[Device]) -> list[dict[str, Any]]:
    """For each vCPU its index and the registers that are there, all numbers; `mode` is a word.

    x86: rip, rsp, cr0, cr3, cr4, efer, flags; mode real, protected, long, long (user).
    AArch64: pc, sp, pstate; mode EL0 to EL3, or AArch32.
    """
    return [{"index": cpu.instance, **_registers(cpu)} for cpu in devices if cpu.name.split("/")[-1] == "cpu"]


def _registers(cpu: Device) -> dict[str, Any]:
    x86 = {"rip": "env.eip", "rsp": f"env.regs[{STACK}]", "efer": "env.efer", "flags": "env.eflags"}
    x86 |= {f"cr{i}": f"env.cr[{i}]" for i in (0, 3, 4)}
    arm = {"pc": "env.pc", "sp": "env.xregs[31]", "pstate": "cpsr"}
    found: dict[str, Any] = {}
    for key, path in (x86 if _value(cpu, "env.cr[0]") is not None else arm).items():
        value = _value(cpu, path)
        if value is not None:
            found[key] = int.from_bytes(value, "big") if isinstance(value, bytes) else value
    return {**found, **_mode(cpu, found)}


def _mode(cpu: Device, found: dict[str, Any]) -> dict[str, str]:
    if "cr0" in found:
        if found.get("efer", 0) & LONG_ACTIVE:
            selector = _value(cpu, f"env.segs[{CODE}].selector")
            return {"mode": "long (user)" if isinstance(selector, int) and selector & 3 == 3 else "long"}
        return {"mode": "protected" if found["cr0"] & PROTECTED else "real"}
    if "pstate" in found and "pc" in found:
        return {"mode": "AArch32" if found["pstate"] & 0x10 else f"EL{found['pstate'] >> 2 & 3}"}
    return {}


def pci(devices: list[Device]) -> dict[str, tuple[int, int]]:
    """Vendor and device id of each PCI function, by its address, such as "0000:00:04.0"."""
    found: dict[str, tuple[int, int]] = {}
    for device in devices:
        space = _space(device)
        if address(device) and space and len(space) >= 4:
            found.setdefault(address(device), struct.unpack_from("<HH", space))
    return found


def address(device: Device) -> str:
    """The PCI address in the name of a section; "" where it has none."""
    match = ADDRESS.match(device.name)
    return match[1] if match else ""


def nics(devices: list[Device]) -> list[dict[str, Any]]:
    """For each network card: name of the section, PCI address ("" without), model, MAC as text ("" where unknown)."""
    return [
        {"name": device.name, "pci": address(device), "model": device.root.name, "mac": _mac(device)}
        for device in devices
        if device.root and CARDS.fullmatch(device.root.name)
    ]


def virtio(device: Device) -> Virtio | None:
    """The parts of a virtio device that all kinds have."""
    blob = next((field.value for field in _fields(device.root) if field.type == "virtio"), None)
    try:
        return _virtio(blob, bool(address(device))) if isinstance(blob, bytes) else None
    except (struct.error, IndexError):
        return None


def _virtio(blob: bytes, is_pci: bool) -> Virtio:
    space, msix, at = None, False, 12  # virtio-mmio: features selected by host and guest, page shift
    if is_pci:
        space = _without_version(blob)
        table = _capability(space, MSIX)
        at, msix = 4 + len(space) + 16, table is not None
        if table is not None:
            vectors = (int.from_bytes(space[table + 2 : table + 4], "little") & 0x7FF) + 1
            at += 16 * vectors + (vectors + 7) // 8 + 2
    status, features, size = struct.unpack_from(">B3xII", blob, at)
    config, at = blob[at + 12 : at + 12 + size], at + 12 + size
    (queues,) = struct.unpack_from(">I", blob, at)
    # size, descriptors, index; alignment on virtio-mmio, vector on PCI
    at += 4 + queues * (4 + 8 + 2 + (2 * msix if is_pci else 4))
    if at > len(blob):
        raise IndexError(at)
    return Virtio(space, status, features, config, queues, blob[at:])


def _without_version(blob: bytes) -> bytes:
    """The configuration space behind the version; it is the large one where the function is on PCI Express."""
    space = blob[4 : 4 + 256]
    return blob[4 : 4 + 4096] if _capability(space, EXPRESS) is not None else space


def _capability(space: bytes, wanted: int) -> int | None:
    """Where in `space` a capability is."""
    at, seen = space[CAPABILITIES], 0
    while at and seen < 48:
        if space[at] == wanted:
            return at
        at, seen = space[at + 1] & 0xFC, seen + 1
    return None


def _space(device: Device) -> bytes | None:
    state = virtio(device)
    if state:
        return state.pci
    spaces = (field.value for field in _fields(device.root) if field.type == "pci config")
    return next((space for space in spaces if isinstance(space, bytes)), None)


def _mac(device: Device) -> str:
    state = virtio(device)
    found = [state.own[:6]] if state else []
    found += [_receive_address(device, path) for path in ("mac_reg[0]", "core.mac")]
    found += [_bytes(device, path)[:6] for path in ("phys", "conf.macaddr", "core.permanent_mac", "state.prom")]
    known = next((mac for mac in found if len(mac) == 6 and any(mac)), b"")
    return known.hex(":")


def _receive_address(device: Device, path: str) -> bytes:
    """The first of the addresses that a card of Intel receives: two words of little-endian bytes."""
    words = _value(device, path)
    first = RECEIVE_ADDRESS if path == "core.mac" else 0
    if not isinstance(words, list) or not all(isinstance(word, int) for word in words[first : first + 2]):
        return b""
    return b"".join(word.to_bytes(4, "little") for word in words[first : first + 2] if word >= 0)[:6]


def _value(device: Device, path: str) -> Any:
    try:
        return find_field(device, path).value
    except LookupError:
        return None


def _bytes(device: Device, path: str) -> bytes:
    value = _value(device, path)
    if isinstance(value, list) and all(isinstance(byte, int) and 0 <= byte < 256 for byte in value):
        return bytes(value)
    return value if isinstance(value, bytes) else b""


def _fields(where: Struct | None) -> Iterator[Field]:
    """All fields, those of structs in structs as well."""
    for field in where.fields if where else ():
        yield field
        for value in field.value if isinstance(field.value, list) else [field.value]:
            if isinstance(value, Struct):
                yield from _fields(value)
