"""QEMU's answers as typed values: with `state` and `blocks` the place where their fields are named.

Source: qapi/ of QEMU 7.2 to 10.0.  A field of another type, or out of its range, is CannotDo, which names it.
"""

import re
from typing import Any, NamedTuple

from ..errors import Refused
from ..fields import Fields, objects_of
from .monitor import Monitor

# Of a text for people: `info qtree` of hundreds of devices
LONGEST = 4 << 20
# Parameters that are looked at; all others are given back as they came
WHOLE = (
    "max-bandwidth",
    "downtime-limit",
    "announce-initial",
    "announce-max",
    "announce-rounds",
    "announce-step",
    "cpu-throttle-percentage",
)
_ROW = re.compile(r"^\s*(\S.*?)\s+(\d+ [KMG]iB)\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)", re.MULTILINE)

Version = tuple[int, int, int]


def what(command: str) -> str:
    """How an answer reads in a message."""
    return f"QEMU's answer to '{command}'"


def fields(monitor: Monitor, command: str, **arguments: Any) -> Fields:
    return Fields(monitor.ask(command, **arguments), what(command))


def objects(monitor: Monitor, command: str, **arguments: Any) -> list[Fields]:
    return objects_of(monitor.ask(command, **arguments), what(command))


def text(monitor: Monitor, command: str, **arguments: Any) -> str:
    """Of a command that answers with a text."""
    return Fields({"return": monitor.ask(command, **arguments)}, what(command)).text("return", most=LONGEST)


def human(monitor: Monitor, line: str) -> str:
    """The answer of the human monitor to a line."""
    return text(monitor, "human-monitor-command", command_line=line)


# the migration's settings


def capabilities(monitor: Monitor) -> dict[str, bool]:
    """Every capability that this QEMU knows, and whether it is on."""
    return capabilities_of(objects(monitor, "query-migrate-capabilities"))


def capabilities_of(found: list[Fields]) -> dict[str, bool]:
    """A list of capabilities as QEMU writes it."""
    return {entry.text("capability"): entry.flag("state") for entry in found}


def capability_list(wanted: dict[str, bool]) -> list[dict[str, Any]]:
    """And back."""
    return [{"capability": name, "state": state} for name, state in wanted.items()]


def set_capabilities(monitor: Monitor, wanted: dict[str, bool]) -> None:
    monitor.ask("migrate-set-capabilities", capabilities=capability_list(wanted))


def parameters(monitor: Monitor) -> dict[str, Any]:
    """All parameters of a migration by their names."""
    found = fields(monitor, "query-migrate-parameters")
    for name in WHOLE:
        found.whole(name, None)
    for name in ("tls-creds", "mode"):
        found.text(name, None)
    return dict(found.raw())


# the machine


def version(monitor: Monitor) -> Version:
    found = fields(monitor, "query-version").inner("qemu")
    return found.whole("major"), found.whole("minor"), found.whole("micro")


def kvm(monitor: Monitor) -> bool:
    """Whether the guest runs on KVM."""
    return fields(monitor, "query-kvm").flag("enabled")


def vcpus(monitor: Monitor) -> list[str]:
    """The QOM path of each vCPU."""
    return [entry.text("qom-path") for entry in objects(monitor, "query-cpus-fast")]


class RamBlock(NamedTuple):
    """In bytes: what is used of it, and what it can grow to; page: its pages, as '4 KiB'."""

    used: int
    most: int
    page: str


def ram_blocks(monitor: Monitor) -> dict[str, RamBlock]:
    rows = _ROW.findall(fields(monitor, "x-query-ramblock").text("human-readable-text", most=LONGEST))
    return {name: RamBlock(int(used, 16), int(most, 16), page) for name, page, used, most in rows}


def shared_backends(monitor: Monitor) -> list[str]:
    """Memory backends that other processes share."""
    return [entry.text("id", "?") for entry in objects(monitor, "query-memdev") if entry.flag("share", False)]


def chardevs(monitor: Monitor) -> dict[str, str]:
    """Label to what QEMU calls the far end of each character device."""
    return {entry.text("label"): entry.text("filename") for entry in objects(monitor, "query-chardev")}


class RxFilter(NamedTuple):
    """What a card takes frames for.  vlans: those that it listens to; None where it does not filter by them."""

    name: str
    mac: str
    unicast: tuple[str, ...]
    vlans: tuple[int, ...] | None


def rx_filters(monitor: Monitor) -> list[RxFilter]:
    """Of each card that has one."""
    try:
        found = objects(monitor, "query-rx-filter")
    except Refused:
        # No card of this guest has one.
        return []
    return [_rx_filter(entry) for entry in found]


def _rx_filter(entry: Fields) -> RxFilter:
    # 'normal' is said of a card that filters by its table.
    table = entry.wholes("vlan-table", high=4095) if entry.text("vlan", "") == "normal" else None
    unicast = tuple(mac.lower() for mac in entry.texts("unicast-table"))
    return RxFilter(
        entry.text("name"), entry.text("main-mac", "").lower(), unicast, None if table is None else tuple(table)
    )


# QOM


class Child(NamedTuple):
    name: str
    type: str


def children(monitor: Monitor, path: str) -> list[Child]:
    """Properties of an object; those that are objects have the type 'child<TYPE>'."""
    return [Child(entry.text("name"), entry.text("type")) for entry in objects(monitor, "qom-list", path=path)]


def qom_text(monitor: Monitor, path: str, name: str) -> str:
    return text(monitor, "qom-get", path=path, property=name)


def qom_flag(monitor: Monitor, path: str, name: str) -> bool:
    return Fields({name: monitor.ask("qom-get", path=path, property=name)}, what("qom-get")).flag(name)


def machine(monitor: Monitor) -> str:
    """The machine type, as `-machine` has it."""
    return qom_text(monitor, "/machine", "type").removesuffix("-machine")


def feature_words(monitor: Monitor, path: str) -> dict[str, int]:
    """Bits in effect of an x86 CPU, by CPUID leaf and register ('00000007.0 EBX')."""
    found = {}
    for word in objects(monitor, "qom-get", path=path, property="feature-words"):
        leaf = f"{word.whole('cpuid-input-eax', high=0xFFFFFFFF):08X}"
        if "cpuid-input-ecx" in word:
            leaf += f".{word.whole('cpuid-input-ecx', high=0xFFFFFFFF)}"
        found[f"{leaf} {word.text('cpuid-register', most=8)}"] = word.whole("features", high=0xFFFFFFFF)
    return {name: bits for name, bits in sorted(found.items()) if bits}


# events


class Event(NamedTuple):
    """at: in ms since 1970, by QEMU's clock."""

    name: str
    at: float


def event(monitor: Monitor, patience: float) -> Event | None:
    """The next thing that QEMU tells without being asked; None where nothing comes."""
    said = monitor.event(patience)
    if said is None:
        return None
    found = Fields(said, "an event of QEMU")
    stamp = found.inner("timestamp")
    # -1 where its clock is not known.
    at = stamp.whole("seconds", low=-1) * 1000 + stamp.whole("microseconds", low=-1) / 1000
    return Event(found.text("event"), at)
