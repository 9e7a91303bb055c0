"""What is found in the facts of two guests, where real ones would need two hosts, other versions or old tools."""

import copy

import pytest
from vmstate.migrate.preflight import compare
from vmstate.qemu import cpu_features, inventory, qtree

FILE = {"block": False, "id": [1, 2], "world": None, "head": "x"}
MEDIUM = {"format": "qcow2", "size": 8, "ro": False, "name": "/d", "file": FILE, "temporary": False}
DISK = {"device": "d", "node": "", "at": "0000:00:02.0", "type": "virtio-blk-device", "removable": False}
FACTS = {
    "host": "a",
    "qemu": [7, 2, 22],
    "machine": "pc-q35-7.2",
    "kvm": False,
    "ram": 256,
    "blocks": {"pc.ram": [256, 256], "/rom@etc/acpi/tables": [32, 64]},
    "vcpus": 1,
    "cpu": {"type": "qemu64-x86_64-cpu", "features": {"00000001 EDX": 1}},
    "devices": [
        {"type": "virtio-blk-pci", "id": "", "bus": "PCIE", "at": "0000:00:02.0", "pci": "1af4:1001", "drive": ""},
        {"type": "isa-pit", "id": "", "bus": "ISA", "at": "0000:00:1f.0", "pci": "", "drive": ""},
    ],
    "disks": [{**DISK, "medium": MEDIUM}],
    "blocked": [],
    "nics": [{"mac": "52:54:00:00:00:01", "iface": "tap0", "subnets": ["192.0.2.0/24", "2001:db8::/64"]}],
}


def found(ours=None, theirs=None):
    return [(f.level, f.text) for f in compare({**FACTS, **(ours or {})}, {**FACTS, **(theirs or {})})]


def media(**more):
    return {"disks": [{**DISK, "medium": {**MEDIUM, **more}}]}


def file(**more):
    return media(file={**FILE, **more})


def test_one_guest_fits_itself():
    assert found() == []


@pytest.mark.parametrize("name", FACTS)
def test_facts_that_are_missing_are_not_judged(name):
    less = {key: value for key, value in FACTS.items() if key != name}
    for pair in ((less, FACTS), (FACTS, less), (less, less)):
        assert all(finding.level == "warning" for finding in compare(*pair))
    assert compare({}, {}) == compare({}, FACTS) == compare(FACTS, {}) == []


@pytest.mark.parametrize("name", ["qemu", "blocks", "cpu", "devices", "disks", "nics"])
@pytest.mark.parametrize("odd", [None, 5, "x", [5], {"x": 5}, ["x"], [{"x": 5}]])
def test_facts_that_are_told_in_another_way(name, odd):
    assert isinstance(compare({**copy.deepcopy(FACTS), name: odd}, FACTS), list)
    assert isinstance(compare(FACTS, {**copy.deepcopy(FACTS), name: odd}), list)


def test_errors_come_first():
    levels = [level for level, _ in found({"qemu": [10, 0, 0]}, {"vcpus": 2})]
    assert levels == ["error", "warning"]


def test_an_older_qemu_there():
    assert found({"qemu": [10, 0, 13]}) == [("warning", "the guest's QEMU is 10.0.13, the one there is older: 7.2.22")]
    assert found(None, {"qemu": [10, 0, 13]}) == []


def test_accelerators():
    assert found({"kvm": True}) == [("error", "the guest runs on KVM, the one there without")]
    assert found(None, {"kvm": True}) == [("warning", "the guest runs without KVM, the one there on it")]


def test_chips_have_other_names_on_kvm():
    chips = [FACTS["devices"][0], {**FACTS["devices"][1], "type": "kvm-pit"}]
    clock = {**FACTS["devices"][1], "type": "kvmclock", "bus": "System", "at": ""}
    assert found({"devices": [*chips, clock]}) == []
    assert found({"devices": FACTS["devices"][:1]}) == [
        ("warning", "the guest has 0 pit at 0000:00:1f.0 (ISA), the one there has 1")
    ]


def test_tables_may_grow_and_memory_may_not():
    tables = "/rom@etc/acpi/tables"
    assert found({"blocks": {**FACTS["blocks"], tables: [64, 64]}}) == []
    assert found({"blocks": {**FACTS["blocks"], tables: [65, 65]}}) == [
        ("error", f"RAM block '{tables}' has 65 bytes in the guest and 32 in the one there")
    ]
    assert found({"blocks": {"pc.ram": [128, 128]}})[0][1].startswith("RAM block 'pc.ram' has 128 bytes in the guest")
    assert found({"blocks": {**FACTS["blocks"], "x": [1, 1]}}) == [
        ("error", "the guest has a RAM block 'x' that the one there has not")
    ]
    assert found(None, {"blocks": {**FACTS["blocks"], "x": [1, 1]}}) == [
        ("error", "the one there has a RAM block 'x' that the guest has not")
    ]


SAME, OTHER, UNKNOWN = [], ["error"], ["warning"]
FAR = {"host": "b"}
IMAGES = [
    ("one file", {}, {}, SAME),
    ("another one on this host", {}, file(id=[1, 3]), OTHER),
    ("another mount of it on this host", {}, file(id=[9, 2]), UNKNOWN),
    ("the same number, and other content", {}, file(id=[9, 2], head="y"), OTHER),
    ("shared between hosts", FAR, file(id=[9, 2]), SAME),
    ("shared, and written to between two looks", FAR, file(id=[9, 2], head="y"), UNKNOWN),
    ("a copy on another host", FAR, file(id=[9, 3]), UNKNOWN),
    ("another one on another host", FAR, file(id=[9, 3], head="y"), OTHER),
    ("one that may not be read", FAR, file(id=[9, 3], head=None), UNKNOWN),
    ("one that cannot be seen", {}, media(file=None), UNKNOWN),
    ("a network block device", {}, media(file=None, name="nbd://x/y"), UNKNOWN),
    (
        "firmware that travels",
        FAR,
        {"disks": [{**DISK, "medium": {**MEDIUM, "file": None}, "type": "cfi.pflash01"}]},
        SAME,
    ),
]


@pytest.mark.parametrize(("name", "host", "theirs", "expected"), IMAGES)
def test_whether_two_images_are_one(name, host, theirs, expected):
    ours = {"disks": [{**FACTS["disks"][0], "type": "cfi.pflash01"}]} if "firmware" in name else None
    assert [level for level, _ in found(ours, {**host, **theirs})] == expected


@pytest.mark.parametrize(
    ("world", "head", "expected"),
    [(("w", "w"), "y", SAME), (("w", "v"), "x", OTHER), ((None, "w"), "x", UNKNOWN), ((None, None), "y", UNKNOWN)],
)
def test_block_devices_of_two_hosts(world, head, expected):
    ours, theirs = (file(block=True, id=[7, 0], world=w) for w in world)
    theirs["disks"][0]["medium"]["file"]["head"] = head
    assert [level for level, _ in found(ours, {**FAR, **theirs})] == expected


def test_subnets_need_one_in_common():
    card = FACTS["nics"][0]
    assert found(None, {"nics": [{**card, "subnets": ["2001:db8::/64"]}]}) == []
    assert found(None, {"nics": [{**card, "subnets": []}]}) == []
    text = f"card {card['mac']} is in 192.0.2.0/24 and 2001:db8::/64, and there in 10.0.0.0/8: not the same subnet"
    assert found(None, {"nics": [{**card, "mac": "52:54:00:00:00:09", "subnets": ["10.0.0.0/8"]}]}) == [
        ("warning", text)
    ]


def test_features_that_have_no_name():
    assert cpu_features.lacking({"00000007.1 EAX": 1 << 31, "99 EAX": 1}, {}) == [
        "CPUID 00000007.1 EAX bit 31",
        "CPUID 99 EAX bit 0",
    ]
    assert cpu_features.lacking({"80000001 EDX": 1 << 20 | 1}, {}) == ["nx"]


def test_what_kvm_offers_counts_between_two_on_kvm():
    clock = {"cpu": {**FACTS["cpu"], "features": {"00000001 EDX": 1, "40000001 EAX": 1}}}
    assert [text for level, text in found({**clock, "kvm": True}) if "features" in text] == []
    assert found({**clock, "kvm": True}, {"kvm": True}) == [
        ("error", "the CPU there lacks features that the guest's has: kvmclock")
    ]


@pytest.mark.parametrize(
    ("name", "innermost"),
    [
        ("/d", "/d"),
        ('json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/d"}}', "/d"),
        ('json:{"driver": "raw", "file": {"server": 1, "driver": "nbd"}}', '{"driver": "nbd", "server": 1}'),
        ('json:{"driver": "qcow2", "fi', 'json:{"driver": "qcow2", "fi'),
    ],
)
def test_what_is_at_the_bottom_of_a_name(name, innermost):
    assert inventory.innermost(name) == innermost


QTREE = """bus: main-system-bus
  type System
  dev: q35-pcihost, id ""
    bus: pcie.0
      type PCIE
      dev: pcie-root-port, id "p"
        addr = 02.0
        class PCI bridge, addr 00:02.0, pci id 1b36:000c (sub 0000:0000)
        bar 0: mem at 0xffffffffffffffff [0xffe]
        bus: p
          type PCIE
          dev: virtio-scsi-pci, id "s"
            class SCSI controller, addr 05:00.0, pci id 1af4:1048 (sub 1af4:1100)
            bus: virtio-bus
              type virtio-pci-bus
              dev: virtio-scsi-device, id ""
                bus: s.0
                  type SCSI
                  dev: scsi-hd, id "a, b"
                    drive = "o"
                    scsi-id = 1 (0x1)
                    lun = 3 (0x3)
  dev: ioapic, id ""
"""


def test_places_in_the_tree():
    told = [(d["type"], d["id"], d["bus"], d["at"], d["pci"], d["drive"]) for d in qtree.devices(QTREE)]
    assert told == [
        ("q35-pcihost", "", "System", "", "", ""),
        ("pcie-root-port", "p", "PCIE", "0000:00:02.0", "1b36:000c", ""),
        ("virtio-scsi-pci", "s", "PCIE", "0000:00:02.0:00.0", "1af4:1048", ""),
        ("virtio-scsi-device", "", "virtio-pci-bus", "0000:00:02.0:00.0", "", ""),
        ("scsi-hd", "a, b", "SCSI", "0000:00:02.0:00.0 scsi-id 1 lun 3", "", "o"),
        ("ioapic", "", "System", "", "", ""),
    ]


@pytest.mark.parametrize("text", ["", "\n", "bus: x", "dev: ", 'type x\n  dev: y, id ""\nclass x', "  a = b"])
def test_other_text_is_no_tree(text):
    assert [device["type"] for device in qtree.devices(text)] in ([], ["y"])
