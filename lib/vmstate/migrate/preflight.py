"""Before a running guest moves to a QEMU that waits for it: what each is (`facts`), and what keeps it (`compare`).

Facts are gathered on each host by a process there and travel as JSON.  Those of another version of this toolkit may
lack some: what is not known is not judged.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..qemu import cpu_features
from ..qemu.incoming import DEVICES, differences
from ..qemu.inventory import Facts as Facts
from ..qemu.inventory import facts as facts

# Where a device has a place of its own in the stream, and where the chips are, in which versions of QEMU may differ.
BUSES = frozenset(("IDE", "SCSI", "usb-bus", "virtio-serial-bus", "floppy-bus", "HDA", ""))
CHIPS = frozenset(("ISA", "System"))
OF_KVM = frozenset(("kvmclock", "kvmvapic"))
BLOCKED = "QEMU names the device in its way: unplug it, or start the guest without it"
THERE = "start the QEMU there with the same"
OWN_WORDS = {
    "lm": "the guest's CPU is a 64-bit one (lm), the one there a 32-bit one",
    "nx": "the guest may use NX, pages that are never executed, which the CPU there does not have",
}
KINDS: dict[str, Callable[[Any], str]] = {
    "format": lambda name: f"format {name}",
    "size": lambda size: f"{size} bytes",
    "ro": lambda ro: "read-only" if ro else "writable",
}
ONE_IMAGE = "both must have one image open: on shared storage, or the same device"


@dataclass(frozen=True)
class Finding:
    """What keeps a guest from its move ('error'), or may ('warning'); `hint` says what to do next."""

    level: str
    text: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Finding":
        """The inverse of `as_dict`; what has no known level is an error."""
        level = "warning" if found.get("level") == "warning" else "error"
        return cls(level, str(found.get("text", "")), str(found.get("hint", "")))


def compare(source: Facts, there: Facts) -> list[Finding]:
    """What is in the way of `source` on its way to the one that waits `there`; errors first."""
    found: list[Finding] = []
    for judge, keys in JUDGES:
        if all(key in facts for key in keys for facts in (source, there)):
            try:
                found += judge(source, there)
            except (AttributeError, LookupError, TypeError, ValueError):
                text = f"cannot compare {' and '.join(keys) or 'all'}: the two sides tell it in different ways"
                found.append(_warning(text, "use one version of this toolkit on both hosts"))
    return sorted(found, key=lambda finding: finding.level != "error")


def _error(text: str, hint: str) -> Finding:
    return Finding("error", text, hint)


def _warning(text: str, hint: str) -> Finding:
    return Finding("warning", text, hint)


def _blocked(source: Facts, _there: Facts) -> Iterator[Finding]:
    for reason in source.get("blocked", []):
        yield _error(f"the guest cannot be moved: {reason}", BLOCKED)


def _nested(source: Facts, _there: Facts) -> Iterator[Finding]:
    features = source.get("cpu", {}).get("features", {})
    for name in ("vmx", "svm"):
        # TCG's default CPU has it, and its state of it is whole.
        if source.get("kvm") and cpu_features.has(features, name):
            text = f"the guest's CPU has {name}: it may run guests of its own, which a move can crash"
            yield _warning(text, f"end the guests inside before, or start guests with -cpu ...,-{name}")


def _layout(source: Facts, there: Facts) -> Iterator[Finding]:
    blocks = [(name, sizes[0]) for name, sizes in source["blocks"].items()]
    have = {name: (used, most) for name, (used, most) in there["blocks"].items()}
    found = differences(("the guest", source["machine"], blocks), ("the one there", there["machine"], have))
    for name in sorted(have.keys() - source["blocks"].keys()):
        # Those of PCI devices and tables come with what they belong to, and that is compared.
        if not name.startswith(("/", "0000:")):
            found.append((f"the one there has a RAM block '{name}' that the guest has not", DEVICES))
    return (_error(text, hint) for text, hint in found)


def _version(source: Facts, there: Facts) -> Iterator[Finding]:
    ours, theirs = (".".join(map(str, facts["qemu"])) for facts in (source, there))
    if there["qemu"] < source["qemu"]:
        text = f"the guest's QEMU is {ours}, the one there is older: {theirs}"
        yield _warning(text, "QEMU promises only moves to the same or a newer version")


def _accelerator(source: Facts, there: Facts) -> Iterator[Finding]:
    if source["kvm"] and not there["kvm"]:
        yield _error("the guest runs on KVM, the one there without", "start the QEMU there with -accel kvm")
    elif there["kvm"] and not source["kvm"]:
        text = "the guest runs without KVM, the one there on it"
        yield _warning(text, f"{THERE} -accel")


def _vcpus(source: Facts, there: Facts) -> Iterator[Finding]:
    if source["vcpus"] != there["vcpus"]:
        text = f"the guest has {source['vcpus']} vCPUs, the one there has {there['vcpus']}"
        yield _error(text, f"start the QEMU there with -smp {source['vcpus']}")


def _cpus(source: Facts, there: Facts) -> Iterator[Finding]:
    ours, theirs = source["cpu"], there["cpu"]
    if ours.get("type") != theirs.get("type") and ours.get("type") and theirs.get("type"):
        text = f"the guest's CPU is a {ours['type']}, the one there a {theirs['type']}"
        yield _warning(text, f"{THERE} -cpu")
    if "features" in ours and "features" in theirs:
        kvm = source["kvm"] and there["kvm"]
        yield from _differing(_features(ours, kvm), _features(theirs, kvm))


def _differing(want: dict[str, int], have: dict[str, int]) -> Iterator[Finding]:
    lacking = cpu_features.lacking(want, have)
    for name in [name for name in lacking if name in OWN_WORDS]:
        yield _error(OWN_WORDS[name], f"start the QEMU there with -cpu ...,+{name}")
        lacking.remove(name)
    if lacking:
        text = f"the CPU there lacks features that the guest's has: {', '.join(lacking)}"
        yield _error(text, f"{THERE} -cpu, on a host that has them, or start guests with a -cpu that both hosts have")
    if more := cpu_features.lacking(have, want):
        text = f"the CPU there has features that the guest's has not: {', '.join(more)}"
        yield _warning(text, f"{THERE} -cpu")


def _features(cpu: Facts, kvm: bool) -> dict[str, int]:
    # Where one is without KVM, what KVM would offer tells nothing.
    return {word: bits for word, bits in cpu["features"].items() if kvm or not word.startswith("4000")}


def _devices(source: Facts, there: Facts) -> Iterator[Finding]:
    ours, theirs = ({d["at"]: d for d in facts["devices"] if d.get("pci")} for facts in (source, there))
    for at in sorted(ours.keys() | theirs.keys()):
        ours_at, theirs_at = ours.get(at), theirs.get(at)
        if _card(ours_at) != _card(theirs_at):
            text = f"at PCI address {at} the guest has {_card(ours_at)}, the one there has {_card(theirs_at)}"
            yield _error(text, _start_with(at, ours_at, theirs_at))
    counted, counted_there = Counter(_others(source)), Counter(_others(there))
    for device in sorted(counted.keys() | counted_there.keys()):
        has, has_there = counted[device], counted_there[device]
        if has != has_there:
            bus, at, name = device
            place = " ".join(filter(None, ("at" if at else "", at, f"({bus})" if bus else "")))
            text = f"the guest has {has} {name} {place}".rstrip() + f", the one there has {has_there}"
            yield Finding("warning" if bus in CHIPS else "error", text, DEVICES)


def _card(device: dict[str, str] | None) -> str:
    return f"{device['type']} ({device['pci']})" if device else "nothing"


def _start_with(at: str, ours: dict[str, str] | None, theirs: dict[str, str] | None) -> str:
    words = f"-device {ours['type']},...,addr={at.split(':')[-1]}" if ours else ""
    instead = f"-device {theirs['type']}" if theirs else ""
    if ours and theirs:
        return f"start the QEMU there with {words} instead of {instead}"
    return f"start the QEMU there with {words}" if ours else f"start the QEMU there without {instead}"


def _others(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """Bus, place and type of each device that is no PCI device; chips have one name with and without KVM."""
    for device in facts["devices"]:
        bus, name = device.get("bus", ""), device["type"]
        if device.get("pci") or name in OF_KVM or bus not in BUSES | CHIPS:
            continue
        yield bus, device["at"], name.removeprefix("kvm-").removeprefix("isa-") if bus in CHIPS else name


def _disks(source: Facts, there: Facts) -> Iterator[Finding]:
    one_host = bool(source.get("host")) and source.get("host") == there.get("host")
    left = list(there["disks"])
    for disk, other in _pairs(source["disks"], left):
        if other is not None:
            left.remove(other)
            yield from _disk(disk, other, one_host)
        elif disk["medium"]:
            yield _error(f"{_name(disk)} is not there", f"{THERE} -drive or -blockdev, and the same -device")
    for disk in left:
        if disk["medium"] or not disk.get("removable"):
            yield _error(f"{_name(disk)} is there, and the guest has no such disk", "start the QEMU there without it")


def _pairs(disks: list[Facts], there: list[Facts]) -> list[tuple[Facts, Facts | None]]:
    """Each disk of the guest with the one there at the same place or, failing that, of the same name."""
    left = list(there)
    found: dict[int, Facts] = {}
    for key in ("at", "device", "node"):
        for number, disk in enumerate(disks):
            same = next((other for other in left if disk.get(key) and other.get(key) == disk[key]), None)
            if number not in found and same is not None:
                found[number] = same
                left.remove(same)
    return [(disk, found.get(number)) for number, disk in enumerate(disks)]


def _name(disk: Facts) -> str:
    name = f"disk '{disk.get('device') or disk.get('node') or disk.get('at') or 'without a name'}'"
    return f"{name} ({disk['medium']['name']})" if disk.get("medium") else name


def _disk(disk: Facts, other: Facts, one_host: bool) -> Iterator[Finding]:
    for key in ("device", "node"):
        if disk.get(key) != other.get(key):
            text = f"{_name(disk)} has another name there: expected '{disk.get(key)}', found '{other.get(key)}'"
            yield _warning(text, f"{THERE} id and node-name in -drive and -blockdev")
    # Where a PCI device is, has been compared.
    if disk.get("at") and other.get("at") and disk["at"] != other["at"] and " " in disk["at"] + other["at"]:
        text = f"{_name(disk)} is elsewhere there: expected at {disk['at']}, found at {other['at']}"
        yield _error(text, DEVICES)
    medium, found = disk["medium"], other["medium"]
    if medium and found:
        yield from _media(disk, medium, found, one_host)
    elif medium:
        yield _error(f"{_name(disk)} has no medium there", "insert it there: blockdev-change-medium")
    elif found:
        yield _warning(f"{_name(other)} has a medium there only", "eject it there, or the guest finds it inserted")


def _media(disk: Facts, ours: Facts, theirs: Facts, one_host: bool) -> Iterator[Finding]:
    name = _name(disk)
    if ours.get("temporary"):
        text = f"{name}: what the guest writes is in a temporary file, which nobody else can open"
        yield _error(text, "start the guest without -snapshot, or copy the disk to where both see it (drive-mirror)")
    if theirs.get("temporary"):
        text = f"{name}: what the guest would write there is in a temporary file, and lost with its end"
        yield _error(text, "start the QEMU there without -snapshot")
    if ours.get("temporary") or theirs.get("temporary"):
        return
    for key, words in KINDS.items():
        if key in ours and key in theirs and ours[key] != theirs[key]:
            text = f"{name} differs there: expected {words(ours[key])}, found {words(theirs[key])}"
            yield _error(text, ONE_IMAGE if key == "size" else f"{THERE} -drive or -blockdev")
    # What is in a flash of firmware travels with the guest.
    if ours.get("size") == theirs.get("size") and not str(disk.get("type")).startswith("cfi.pflash"):
        yield from _images(name, ours, theirs, one_host)


def _images(name: str, ours: Facts, theirs: Facts, one_host: bool) -> Iterator[Finding]:
    same = _same(ours, theirs, one_host)
    if same is False:
        yield _error(f"{name}: expected the same image there, found another one, {theirs['name']}", ONE_IMAGE)
    elif same is None:
        text = f"{name}: cannot tell whether {theirs['name']} there is the same image"
        yield _warning(text, f"{ONE_IMAGE}; a copy is out of date as soon as the guest writes")


def _same(ours: Facts, theirs: Facts, one_host: bool) -> bool | None:
    """Whether two media are one; None where it cannot be told."""
    file, other = ours.get("file"), theirs.get("file")
    if not file or not other:
        both_remote = not file and not other and ours.get("name") == theirs.get("name") and ":" in str(ours.get("name"))
        return True if both_remote else None
    heads = (file.get("head"), other.get("head"))
    alike = heads[0] == heads[1] if all(heads) else None
    if file.get("world") and other.get("world"):
        return bool(file["world"] == other["world"])
    if one_host and file["id"] == other["id"]:
        return True
    if alike and ours.get("ro") and theirs.get("ro"):
        return True
    # On another host, and in another mount of a network file system, a file has the same number, if on another device.
    number = not file["block"] and file["id"][1] == other["id"][1]
    if one_host:
        return None if number and alike is not False else False
    if number and alike:
        return True
    return False if alike is False and not number and not file["block"] else None


def _cards(source: Facts, there: Facts) -> Iterator[Finding]:
    by_mac = {card["mac"]: card for card in there["nics"]}
    same_number = len(source["nics"]) == len(there["nics"])
    for number, card in enumerate(source["nics"]):
        other = by_mac.get(card["mac"]) or (there["nics"][number] if same_number else {})
        ours, theirs = card.get("subnets", []), other.get("subnets", [])
        if ours and theirs and not set(ours) & set(theirs):
            text = f"card {card['mac']} is in {' and '.join(ours)}, and there in {' and '.join(theirs)}"
            yield _warning(f"{text}: not the same subnet", "plug its tap there into a bridge of the same subnet")


Judge = Callable[[Facts, Facts], Iterable[Finding]]
# With what each has to know of both.
JUDGES: tuple[tuple[Judge, tuple[str, ...]], ...] = (
    (_blocked, ()),
    (_nested, ()),
    (_layout, ("machine", "blocks")),
    (_version, ("qemu",)),
    (_accelerator, ("kvm",)),
    (_vcpus, ("vcpus",)),
    (_cpus, ("cpu", "kvm")),
    (_devices, ("devices",)),
    (_disks, ("disks",)),
    (_cards, ("nics",)),
)
