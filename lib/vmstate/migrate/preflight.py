"""Before a running guest moves to a QEMU that waits for it: what each is (`facts`), and what keeps it (`compare`).

Facts are gathered on each host by a process there and travel as JSON.  Those of another version of this toolkit may
lack some: what is not known is not judged.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from ..qemu import cpu_features
from ..qemu.incoming import DEVICES, differences
from ..qemu.inventory import Facts as Facts
from ..qemu.inventory import facts as facts
from .finding import THERE, Finding, new_error, new_warning
from .preflight_disks import compare_disks

# Where a device has a place of its own in the stream, and where the chips are, in which versions of QEMU may differ.
BUSES = frozenset(("IDE", "SCSI", "usb-bus", "virtio-serial-bus", "floppy-bus", "HDA", ""))
CHIPS = frozenset(("ISA", "System"))
OF_KVM = frozenset(("kvmclock", "kvmvapic"))
BLOCKED = "QEMU names the device in its way: unplug it, or start the guest without it"
OWN_WORDS = {
    "lm": "the guest's CPU is a 64-bit one (lm), the one there a 32-bit one",
    "nx": "the guest may use NX, pages that are never executed, which the CPU there does not have",
}


def compare(source: Facts, there: Facts) -> list[Finding]:
    """What is in the way of `source` on its way to the one that waits `there`; errors first."""
    found: list[Finding] = []
    for check, keys in CHECKS:
        if all(key in facts for key in keys for facts in (source, there)):
            try:
                found += check(source, there)
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
                text = f"cannot compare {' and '.join(keys) or 'all'}: the two sides tell it in different ways"
                found.append(new_warning(text, "use one version of this toolkit on both hosts"))
    return sorted(found, key=lambda finding: finding.level != "error")


def _blocked(source: Facts, _there: Facts) -> Iterator[Finding]:
    for reason in source.get("blocked", []):
        yield new_error(f"the guest cannot be moved: {reason}", BLOCKED)


def _nested(source: Facts, _there: Facts) -> Iterator[Finding]:
    features = source.get("cpu", {}).get("features", {})
    for name in ("vmx", "svm"):
        # TCG's default CPU has it, and its state of it is whole.
        if source.get("kvm") and cpu_features.has(features, name):
            text = f"the guest's CPU has {name}: it may run guests of its own, which a move can crash"
            yield new_warning(text, f"end the guests inside before, or start guests with -cpu ...,-{name}")


def _layout(source: Facts, there: Facts) -> Iterator[Finding]:
    blocks = [(name, sizes[0]) for name, sizes in source["blocks"].items()]
    have = {name: (used, most) for name, (used, most) in there["blocks"].items()}
    found = differences(("the guest", source["machine"], blocks), ("the one there", there["machine"], have))
    for name in sorted(have.keys() - source["blocks"].keys()):
        # Those of PCI devices and tables come with what they belong to, and that is compared.
        if not name.startswith(("/", "0000:")):
            found.append((f"the one there has a RAM block '{name}' that the guest has not", DEVICES))
    return (new_error(text, hint) for text, hint in found)


def _version(source: Facts, there: Facts) -> Iterator[Finding]:
    ours, theirs = (".".join(map(str, facts["qemu"])) for facts in (source, there))
    if there["qemu"] < source["qemu"]:
        text = f"the guest's QEMU is {ours}, the one there is older: {theirs}"
        yield new_warning(text, "QEMU promises only moves to the same or a newer version")


def _accelerator(source: Facts, there: Facts) -> Iterator[Finding]:
    if source["kvm"] and not there["kvm"]:
        yield new_error("the guest runs on KVM, the one there without", "start the QEMU there with -accel kvm")
    elif there["kvm"] and not source["kvm"]:
        text = "the guest runs without KVM, the one there on it"
        yield new_warning(text, f"{THERE} -accel")


def _vcpus(source: Facts, there: Facts) -> Iterator[Finding]:
    if source["vcpus"] != there["vcpus"]:
        text = f"the guest has {source['vcpus']} vCPUs, the one there has {there['vcpus']}"
        yield new_error(text, f"start the QEMU there with -smp {source['vcpus']}")


def _cpus(source: Facts, there: Facts) -> Iterator[Finding]:
    ours, theirs = source["cpu"], there["cpu"]
    if ours.get("type") != theirs.get("type") and ours.get("type") and theirs.get("type"):
        text = f"the guest's CPU is a {ours['type']}, the one there a {theirs['type']}"
        yield new_warning(text, f"{THERE} -cpu")
    if "features" in ours and "features" in theirs:
        kvm = source["kvm"] and there["kvm"]
        yield from _differing(_features(ours, kvm), _features(theirs, kvm))


def _differing(want: dict[str, int], have: dict[str, int]) -> Iterator[Finding]:
    lacking = cpu_features.lacking(want, have)
    for name in [name for name in lacking if name in OWN_WORDS]:
        yield new_error(OWN_WORDS[name], f"start the QEMU there with -cpu ...,+{name}")
        lacking.remove(name)
    if lacking:
        text = f"the CPU there lacks features that the guest's has: {', '.join(lacking)}"
        yield new_error(
            text, f"{THERE} -cpu, on a host that has them, or start guests with a -cpu that both hosts have"
        )
    if more := cpu_features.lacking(have, want):
        text = f"the CPU there has features that the guest's has not: {', '.join(more)}"
        yield new_warning(text, f"{THERE} -cpu")


def _features(cpu: Facts, kvm: bool) -> dict[str, int]:
    # Where one is without KVM, what KVM would offer tells nothing.
    return {word: bits for word, bits in cpu["features"].items() if kvm or not word.startswith("4000")}


def _devices(source: Facts, there: Facts) -> Iterator[Finding]:
    ours, theirs = ({d["at"]: d for d in facts["devices"] if d.get("pci")} for facts in (source, there))
    for at in sorted(ours.keys() | theirs.keys()):
        ours_at, theirs_at = ours.get(at), theirs.get(at)
        if _card(ours_at) != _card(theirs_at):
            text = f"at PCI address {at} the guest has {_card(ours_at)}, the one there has {_card(theirs_at)}"
            yield new_error(text, _start_with(at, ours_at, theirs_at))
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


def _cards(source: Facts, there: Facts) -> Iterator[Finding]:
    by_mac = {card["mac"]: card for card in there["nics"]}
    same_number = len(source["nics"]) == len(there["nics"])
    for number, card in enumerate(source["nics"]):
        other = by_mac.get(card["mac"]) or (there["nics"][number] if same_number else {})
        ours, theirs = card.get("subnets", []), other.get("subnets", [])
        if ours and theirs and not set(ours) & set(theirs):
            text = f"card {card['mac']} is in {' and '.join(ours)}, and there in {' and '.join(theirs)}"
            yield new_warning(f"{text}: not the same subnet", "plug its tap there into a bridge of the same subnet")


Check = Callable[[Facts, Facts], Iterable[Finding]]
# With what each has to know of both.
CHECKS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (_blocked, ()),
    (_nested, ()),
    (_layout, ("machine", "blocks")),
    (_version, ("qemu",)),
    (_accelerator, ("kvm",)),
    (_vcpus, ("vcpus",)),
    (_cpus, ("cpu", "kvm")),
    (_devices, ("devices",)),
    (compare_disks, ("disks",)),
    (_cards, ("nics",)),
)
