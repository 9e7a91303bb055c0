"""What is found before a move: pairs of a running and a waiting QEMU that fit, and that differ in one thing each."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Guests
from vm import MAC, Guest, until
from vmstate.migrate.finding import Finding
from vmstate.migrate.preflight import compare, facts
from vmstate.qemu import answers, cpu_features
from vmstate.qemu.monitor import Monitor

from guest.test_restore import SMALL


def known(guest: Guest) -> dict[str, Any]:
    """Its facts, as they travel."""
    with Monitor(guest.qmp) as monitor:
        found: dict[str, Any] = json.loads(json.dumps(facts(monitor)))
    return found


def found(guests: Guests, ours: dict[str, Any], theirs: dict[str, Any]) -> list[Finding]:
    """What is found of a running guest and a waiting one with these arguments."""
    source = guests.start("a", kind="metal", **ours)
    there = guests.waiting("b", kind="metal", **theirs)
    findings = compare(known(source), known(there))
    assert [f.level for f in findings] == sorted(f.level for f in findings)
    assert all(f.hint and not f.text.endswith(".") for f in findings)
    assert source.status() == "running"
    assert there.status() == "inmigrate"
    return findings


def image(path: Path, size: str = "8M", kind: str = "qcow2") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, size], check=True, timeout=20)
    return path


def drive(path: Path | str, more: str = "") -> list[str]:
    return ["-drive", f"if=none,id=d,file={path}{more}", "-device", "virtio-blk-pci,drive=d"]


def errors(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if finding.level == "error"]


def test_a_pair_that_fits(guests: Guests, work: Path) -> None:
    raw, iso = image(work / "r.raw", kind="raw"), image(work / "c.iso", kind="raw")
    root = ["-device", "pcie-root-port,id=p,chassis=1", "-device", "virtio-rng-pci,bus=p", "-device", "qemu-xhci"]
    disks = ["-blockdev", f"driver=raw,node-name=r,file.driver=file,file.filename={raw}", "-device", "ide-hd,drive=r"]
    cd = ["-drive", f"if=ide,media=cdrom,format=raw,file={iso}", "-device", "usb-tablet", "-smp", "2"]
    same = {"extra": [*root, *drive(image(work / "d.qcow2")), *disks, *cd]}
    assert found(guests, same, same) == []


def test_a_guest_whose_firmware_has_numbered_its_bridges(guests: Guests) -> None:
    """There `query-pci` of the waiting one is silent about what is behind them."""
    ports = ["-device", "pcie-root-port,id=p,chassis=1", "-device", "virtio-rng-pci,bus=p"]
    small: dict[str, Any] = {**SMALL, "extra": ports}
    source, there = guests.start("a", **small), guests.waiting("b", **small)
    source.wait_ready()
    assert compare(known(source), known(there)) == []
    assert {"0000:00:02.0", "0000:00:02.0:00.0"} <= {device["at"] for device in known(source)["devices"]}


def test_the_facts(guests: Guests) -> None:
    told = known(guests.start("a", kind="metal", accel="tcg", extra=["-cpu", "qemu64,+svm", "-smp", "2"]))
    assert told["ram"] == sum(used for used, _ in told["blocks"].values()) > 256 << 20
    assert told["cpu"]["type"] == "qemu64-x86_64-cpu"
    assert {name: cpu_features.has(told["cpu"]["features"], name) for name in ("svm", "vmx", "lm", "nx")} == {
        "svm": True,
        "vmx": False,
        "lm": True,
        "nx": True,
    }
    assert (told["vcpus"], told["kvm"], told["blocked"]) == (2, False, [])
    assert told["nics"] == [{"mac": MAC, "iface": None, "subnets": []}]


def test_names_of_features_are_those_of_qemu(guests: Guests) -> None:
    guest = guests.start("a", kind="metal", accel="tcg", extra=["-cpu", "max"])
    with guest.connect() as qmp:
        path = qmp.cmd("query-cpus-fast")[0]["qom-path"]
        with Monitor(guest.qmp) as monitor:
            words = answers.feature_words(monitor, path)
        properties = {entry["name"] for entry in qmp.cmd("qom-list", path=path)}
        for word, names in cpu_features.NAMES.items():
            for bit, name in enumerate(names):
                if name in properties:
                    has = qmp.cmd("qom-get", path=path, property=name)
                    assert has == bool(words.get(word, 0) >> bit & 1), f"{word} {bit} {name}"


TCG = {"accel": "tcg"}
CARD = ["-device", "e1000,romfile="]
DIMM = ["-m", "256,slots=1,maxmem=1G", "-object", "memory-backend-ram,id=dm,size=16M", "-device", "pc-dimm,memdev=dm"]


def cpu(words: str) -> dict[str, Any]:
    return {"accel": "tcg", "extra": ["-cpu", words]}


DIFFERENCES = {
    "machine": ({"machine": "pc"}, {}, ["the guest is of machine type 'pc-i440fx-", "the one there is a 'pc-q35-"]),
    "memory": (
        {"mem": 256},
        {"mem": 128},
        ["'pc.ram' has 268435456 bytes in the guest and 134217728 in the one there"],
    ),
    "vcpus": ({}, {"extra": ["-smp", "2"]}, ["the guest has 1 vCPUs, the one there has 2"]),
    "card there": (
        {},
        {"extra": CARD},
        ["at PCI address 0000:00:02.0 the guest has nothing, the one there has e1000 ("],
    ),
    "card here": ({"extra": CARD}, {}, ["the guest has e1000 (8086:100e), the one there has nothing"]),
    "other card": (
        {"extra": CARD},
        {"extra": ["-device", "virtio-rng-pci"]},
        ["the guest has e1000 (8086:100e), the one there has virtio-rng-pci (1af4:"],
    ),
    "usb": (
        {"extra": ["-device", "qemu-xhci", "-device", "usb-tablet"]},
        {"extra": ["-device", "qemu-xhci", "-device", "usb-kbd"]},
        ["the guest has 1 usb-tablet at 0000:00:02.0 port 1 (usb-bus), the one there has 0"],
    ),
    "dimm": ({"extra": DIMM}, {"extra": DIMM[:2]}, ["the guest has 1 pc-dimm, the one there has 0"]),
    "nx": (cpu("qemu64,-svm"), cpu("qemu64,-svm,-nx"), ["the guest may use NX"]),
    "lm": (
        cpu("qemu64,-svm"),
        cpu("qemu64,-svm,-lm"),
        ["the guest's CPU is a 64-bit one (lm), the one there a 32-bit"],
    ),
    "features": (
        cpu("qemu64,-svm,+sse4.1,+sse4.2"),
        cpu("qemu64,-svm"),
        ["the CPU there lacks features that the guest's has: sse4.1, sse4.2"],
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs(guests: Guests, name: str) -> None:
    ours, theirs, words = DIFFERENCES[name]
    texts = "; ".join(errors(found(guests, ours, theirs)))
    assert all(word in texts for word in words), texts


def test_hints_name_the_device(guests: Guests) -> None:
    missing = found(guests, {"extra": CARD}, {})
    assert "start the QEMU there with -device e1000,...,addr=02.0" in [finding.hint for finding in missing]


def test_another_type_of_cpu(guests: Guests) -> None:
    findings = found(guests, cpu("qemu64,-svm,-cx16"), cpu("Opteron_G1,-svm"))
    assert "the guest's CPU is a qemu64-x86_64-cpu, the one there a Opteron_G1-x86_64-cpu" in [
        finding.text for finding in findings if finding.level == "warning"
    ]


def test_more_features_are_a_warning(guests: Guests) -> None:
    findings = found(guests, cpu("qemu64,-svm"), cpu("qemu64,-svm,+sse4.1"))
    assert [(f.level, f.text) for f in findings] == [
        ("warning", "the CPU there has features that the guest's has not: sse4.1")
    ]


def test_a_guest_that_may_have_guests(guests: Guests) -> None:
    """Only KVM lets a guest's guests run as its own do; TCG has svm in its default CPU."""
    assert found(guests, cpu("qemu64,+svm"), cpu("qemu64,+svm")) == []
    told = {**known(guests.start("c", kind="metal", **cpu("qemu64,+svm"))), "kvm": True}
    findings = compare(told, told)
    assert [finding.level for finding in findings] == ["warning"]
    assert findings[0].text.startswith("the guest's CPU has svm: it may run guests of its own")


def test_what_blocks_a_move(guests: Guests, work: Path) -> None:
    (work / "folder").mkdir()
    source = guests.start("a", kind="metal", extra=["-drive", f"if=virtio,format=raw,file=fat:rw:{work}/folder"])
    told = known(source)
    assert told["blocked"] == source.cmd("query-migrate")["blocked-reasons"]
    first = compare(told, told)[0]
    assert (first.level, first.text) == ("error", f"the guest cannot be moved: {told['blocked'][0]}")


# Disks


def test_a_disk_that_is_not_there(guests: Guests, work: Path) -> None:
    path = image(work / "d.qcow2")
    findings = found(guests, {"extra": drive(path)}, {})
    assert f"disk 'd' ({path}) is not there" in errors(findings)


def test_a_disk_that_is_only_there(guests: Guests, work: Path) -> None:
    path = image(work / "d.qcow2")
    findings = found(guests, {}, {"extra": drive(path)})
    assert f"disk 'd' ({path}) is there, and the guest has no such disk" in errors(findings)


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_another_image_of_the_same_size(guests: Guests, work: Path, kind: str) -> None:
    one, two = (image(work / name, kind=kind) for name in ("one", "two"))
    more = f",format={kind}"
    findings = found(guests, {"extra": drive(one, more)}, {"extra": drive(two, more)})
    assert [(f.level, f.text) for f in findings] == [
        ("error", f"disk 'd' ({one}): expected the same image there, found another one, {two}")
    ]


def test_an_image_of_another_size(guests: Guests, work: Path) -> None:
    one, two = image(work / "one"), image(work / "two", "16M")
    findings = found(guests, {"extra": drive(one)}, {"extra": drive(two)})
    assert errors(findings) == [f"disk 'd' ({one}) differs there: expected 8388608 bytes, found 16777216 bytes"]


def test_an_image_of_another_format(guests: Guests, work: Path) -> None:
    path = image(work / "d.qcow2")
    findings = found(guests, {"extra": drive(path, ",format=qcow2")}, {"extra": drive(path, ",format=raw")})
    assert f"disk 'd' ({path}) differs there: expected format qcow2, found format raw" in errors(findings)


def test_an_image_that_is_read_only_there(guests: Guests, work: Path) -> None:
    path = image(work / "d.qcow2")
    findings = found(guests, {"extra": drive(path)}, {"extra": drive(path, ",readonly=on")})
    assert errors(findings) == [f"disk 'd' ({path}) differs there: expected writable, found read-only"]


def test_one_image_by_another_name(guests: Guests, work: Path) -> None:
    """A link to it, and a path from where QEMU stands."""
    path = image(work / "d.qcow2")
    (work / "link").symlink_to(path)
    assert found(guests, {"extra": drive(path)}, {"extra": drive(work / "link")}) == []


def test_a_path_from_where_qemu_stands(guests: Guests, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(work / "d.qcow2")
    monkeypatch.chdir(work)
    source = guests.start("a", kind="metal", extra=drive(Path(path.name)))
    monkeypatch.chdir("/")
    there = guests.waiting("b", kind="metal", extra=drive(path))
    assert compare(known(source), known(there)) == []


def test_read_only_copies_serve(guests: Guests, work: Path) -> None:
    one, two = (image(work / name, kind="raw") for name in ("one", "two"))
    more = ",format=raw,readonly=on"
    assert found(guests, {"extra": drive(one, more)}, {"extra": drive(two, more)}) == []


def test_a_snapshot_of_the_source(guests: Guests, work: Path) -> None:
    path = image(work / "d.qcow2")
    findings = found(guests, {"extra": drive(path, ",snapshot=on")}, {"extra": drive(path)})
    assert len(findings) == 1
    assert findings[0].level == "error"
    assert "what the guest writes is in a temporary file, which nobody else can open" in findings[0].text


def test_a_snapshot_there(guests: Guests, work: Path) -> None:
    path = image(work / "d.raw", kind="raw")
    findings = found(
        guests, {"extra": drive(path, ",format=raw")}, {"extra": [*drive(path, ",format=raw"), "-snapshot"]}
    )
    assert "what the guest would write there is in a temporary file" in errors(findings)[0]


def test_an_image_that_was_removed(guests: Guests, work: Path) -> None:
    path = image(work / "d.qcow2")
    source = guests.start("a", kind="metal", extra=drive(path))
    path.unlink()
    image(path)
    there = guests.waiting("b", kind="metal", extra=drive(path))
    assert "is in a temporary file" in errors(compare(known(source), known(there)))[0]


def test_another_name_of_the_disk(guests: Guests, work: Path) -> None:
    path = image(work / "d.qcow2")
    there = ["-drive", f"if=none,id=e,file={path}", "-device", "virtio-blk-pci,drive=e"]
    findings = found(guests, {"extra": drive(path)}, {"extra": there})
    assert [(f.level, f.text) for f in findings] == [
        ("warning", f"disk 'd' ({path}) has another name there: expected 'd', found 'e'")
    ]


def test_disks_that_are_swapped(guests: Guests, work: Path) -> None:
    one, two = image(work / "one"), image(work / "two")
    drives = ["-drive", f"if=none,id=d,file={one}", "-drive", f"if=none,id=e,file={two}"]
    first, second = ["-device", "virtio-blk-pci,drive=d"], ["-device", "virtio-blk-pci,drive=e"]
    findings = found(guests, {"extra": [*drives, *first, *second]}, {"extra": [*drives, *second, *first]})
    assert len(errors(findings)) == 2
    assert all("found another one" in text for text in errors(findings))


def test_a_disk_on_another_bus(guests: Guests, work: Path) -> None:
    path = image(work / "d.qcow2")
    drives = ["-drive", f"if=none,id=d,file={path}", "-device"]
    findings = found(
        guests,
        {"extra": [*drives, "ide-hd,drive=d,bus=ide.1"]},
        {"extra": [*drives, "ide-hd,drive=d,bus=ide.3"]},
    )
    places = [f"0000:00:1f.2 bus {bus} unit 0" for bus in (1, 3)]
    text = f"disk 'd' ({path}) is elsewhere there: expected at {places[0]}, found at {places[1]}"
    assert text in errors(findings)


def test_a_cd_that_is_not_inserted(guests: Guests, work: Path) -> None:
    path = image(work / "c.iso", kind="raw")
    findings = found(
        guests,
        {"extra": ["-drive", f"if=ide,media=cdrom,format=raw,file={path}"]},
        {"extra": ["-drive", "if=ide,media=cdrom"]},
    )
    assert errors(findings) == [f"disk 'ide0-cd0' ({path}) has no medium there"]


def test_what_is_no_file(guests: Guests) -> None:
    one = drive("null-co://", ",format=raw")
    assert found(guests, {"extra": one}, {"extra": one}) == []


def test_an_image_behind_nbd(guests: Guests, work: Path) -> None:
    """The same name is the same; whether another one is, nobody can tell."""
    path = image(work / "d.raw", kind="raw")
    command = ["qemu-nbd", "-f", "raw", "-e", "4", "-t", "-k", str(work / "nbd"), str(path)]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        until(lambda: (work / "nbd").exists(), 20, "qemu-nbd listens")
        served = drive(f"nbd+unix:///?socket={work}/nbd", ",format=raw")
        source = guests.start("a", kind="metal", extra=served)
        there = guests.waiting("b", kind="metal", extra=served)
        assert compare(known(source), known(there)) == []
        other = guests.waiting("c", kind="metal", extra=drive(image(work / "e.raw", kind="raw"), ",format=raw"))
        findings = compare(known(source), known(other))
        assert [finding.level for finding in findings] == ["warning"]
        assert f"cannot tell whether {work}/e.raw there is the same image" in findings[0].text
    finally:
        guests.end()
        server.kill()
        server.wait(10)


@pytest.mark.root
def test_block_devices(guests: Guests, work: Path) -> None:
    paths = [image(work / name, kind="raw") for name in ("one", "two")]
    devices = []
    try:
        for path in paths:
            made = subprocess.run(
                ["losetup", "-f", "--show", path], capture_output=True, text=True, timeout=20, check=True
            )
            devices.append(made.stdout.strip())
        one, two = ({"extra": drive(Path(device), ",format=raw")} for device in devices)
        source = guests.start("a", kind="metal", **one)
        there, other = (guests.waiting(name, kind="metal", **args) for name, args in (("b", one), ("c", two)))
        assert compare(known(source), known(there)) == []
        assert "found another one" in errors(compare(known(source), known(other)))[0]
    finally:
        guests.end()
        for device in devices:
            subprocess.run(["losetup", "-d", device], timeout=20, check=True)
