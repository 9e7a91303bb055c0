"""vm-verify and vm-inspect with states of real guests, beside guests that wait for them, and beside their RAM."""

import gzip
import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
from conftest import Done, Guests, shell
from vm import Guest
from vmstate.io.descriptors import HOLD
from vmstate.io.readers import FdReader
from vmstate.stream import constants
from vmstate.stream.description import description_at_end
from vmstate.stream.reader import StateReader
from vmstate.stream.records import Packed, Pages

from guest.judge import still_waits, went_on
from guest.test_restore import SMALL

MIB = 1 << 20
# Where a PC has RAM of the block pc.ram at its own address (there is less than 2 GiB of it), and no window into ROM.
LOW, HIGH = (0, 640 << 10), (MIB, 256 * MIB)
CARD = ["-netdev", "user,id=net1,restrict=on", "-device", "e1000,netdev=net1,romfile="]


def dumped(guests: Guests, work: Path, **kwargs: object) -> Path:
    """A whole state `s` in the work folder; its source has ended."""
    guests.dumped(work / "s", **kwargs)
    return work / "s"


def silent(done: Done) -> None:
    assert (done.status, done.out, done.err) == (0, b"", ""), done


def refused(done: Done, status: int, words: str) -> None:
    assert done.status == status, done.err
    assert re.search(words, done.err), done.err
    assert done.out == b""


def test_whole_in_every_form(guests: Guests, work: Path) -> None:
    state = dumped(guests, work).read_bytes()
    silent(shell("vm-verify s", work))
    silent(shell("cat s | vm-verify", work))
    silent(shell("vm-compress < s | vm-verify", work))
    (work / "s.gz").write_bytes(gzip.compress(state, 1))
    silent(shell("vm-verify s.gz", work))
    domain = b"<domain type='qemu'><name>x</name></domain>\0"
    header = b"LibvirtQemudSave" + b"".join(n.to_bytes(4, "little") for n in (2, len(domain), 1, 0, 0)) + bytes(56)
    (work / "libvirt").write_bytes(header + domain + state)
    silent(shell("vm-verify libvirt", work))
    words = rf"a whole state of a pc-q35-\S+ that was running: .* of RAM, \d+ devices, {len(state)} bytes\n"
    assert re.search(words, shell("vm-verify -v s", work).err)
    facts = json.loads(shell("vm-verify --json s", work).out)
    assert (facts["status"], facts["runstate"], facts["bytes"]) == (0, "running", len(state))


def test_damaged(guests: Guests, work: Path) -> None:
    state = bytearray(dumped(guests, work).read_bytes())
    refused(shell("head -c -1 s | vm-verify", work), 3, rf"truncated at offset {len(state) - 1}, ")
    refused(shell("(cat s; echo) | vm-verify", work), 3, f"behind the end of the state, at offset {len(state)}")
    refused(shell("vm-compress < s | head -c -100 | vm-verify", work), 3, "truncated|not whole")
    half = len(state) // 2
    state[half : half + 5000] = bytes(5000)
    (work / "s").write_bytes(state)
    refused(shell("vm-verify s", work), 3, r"no record of RAM .*at (offset|0x)")


def test_passed_on_in_a_pipeline(guests: Guests, work: Path) -> None:
    source = guests.running()
    guest = guests.waiting()
    done = shell("vm-dump -q a.qmp | tee s | vm-verify --pass | tee t | vm-restore b.qmp", work)
    assert done.status == 0, done.err
    went_on(source.count() or 0, guest)
    assert shell("cmp s t", work).status == 0


def test_what_is_damaged_is_not_passed_on_whole(guests: Guests, work: Path) -> None:
    guest = guests.waiting()
    dumped(guests, work)
    assert shell("head -c -1 s | vm-verify --pass > t", work).status == 3
    assert (work / "t").stat().st_size < (work / "s").stat().st_size - 1000
    assert shell("head -c -1 s | vm-verify --pass -o u", work).status == 3
    assert not (work / "u").exists()
    assert shell("head -c -1 s | vm-verify --pass | vm-restore b.qmp", work).status == 3
    assert guest.count() is None


def test_against_one_that_fits(guests: Guests, work: Path) -> None:
    dumped(guests, work)
    guest = guests.waiting()
    silent(shell("vm-verify --against b.qmp s", work))
    silent(shell("cat s | vm-verify --against b.qmp", work))
    assert "it fits the guest; not compared: " in shell("vm-verify -v --against b.qmp s", work).err
    still_waits(guest)
    assert shell("vm-verify --pass --against b.qmp < s | vm-restore b.qmp", work).status == 0
    assert guest.running()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"machine": "pc"}, r"of machine type 'pc-q35-\S+', the guest at b.qmp is a 'pc-i440fx-"),
        ({"mem": 384}, "'pc.ram' has 268435456 bytes in the state and 402653184 in the guest"),
        ({"extra": ["-smp", "2"]}, "the state has 1 vCPUs, the guest at b.qmp has 2"),
        ({"extra": CARD}, r"at PCI address 0000:00:\d\d.0 the state has nothing, the guest at b.qmp has 8086:100e"),
        ({"net": []}, r"at PCI address 0000:00:\d\d.0 the state has 1af4:1000, the guest at b.qmp has nothing"),
        ({"net": CARD}, r"at PCI address 0000:00:\d\d.0 the state has 1af4:1000, the guest at b.qmp has 8086:100e"),
    ],
    ids=["machine", "memory", "vcpus", "card-more", "card-less", "card-other"],
)
def test_against_another(guests: Guests, work: Path, other: dict[str, object], words: str) -> None:
    """From a file, whose end is looked at first, and from a pipe."""
    dumped(guests, work)
    guest = guests.waiting(**other)
    for source in ("vm-verify --against b.qmp s", "cat s | vm-verify --against b.qmp"):
        refused(shell(source, work), 4, words)
    still_waits(guest)


def test_two_vcpus_against_one(guests: Guests, work: Path) -> None:
    two = {**SMALL, "extra": ["-smp", "2"]}
    dumped(guests, work, **two)
    assert len(json.loads(shell("vm-inspect --json s", work).out)["vcpus"]) == 2
    guest = guests.waiting(**SMALL)
    refused(shell("vm-verify --against b.qmp s", work), 4, "the state has 2 vCPUs, the guest at b.qmp has 1")
    guest.end()
    guests.waiting(**two)
    silent(shell("vm-verify --against b.qmp s", work))


def behind_bridges(card: str) -> dict[str, object]:
    """A guest with a card behind a root port, and one behind a bridge that is itself behind a root port."""
    ports = ["-device", "pcie-root-port,id=p,chassis=1", "-device", "pcie-root-port,id=o,chassis=2"]
    cards = ["-device", f"{card},bus=p", "-device", f"{card},bus=q,addr=1"]
    return {**SMALL, "extra": [*ports, "-device", "pcie-pci-bridge,id=q,bus=o", *(cards if card else [])]}


def test_against_one_with_bridges(guests: Guests, work: Path) -> None:
    """No firmware has numbered them in a QEMU that waits, and `query-pci` is silent there about what is behind."""
    dumped(guests, work, **behind_bridges("virtio-rng-pci"))
    guest = guests.waiting(**behind_bridges("virtio-rng-pci"))
    for source in ("vm-verify --against b.qmp s", "cat s | vm-verify --against b.qmp"):
        silent(shell(source, work))
    still_waits(guest)
    assert shell("vm-restore b.qmp < s", work).status == 0
    assert guest.running()


@pytest.mark.parametrize(
    ("card", "ours"),
    [("", ("nothing", "nothing")), ("virtio-serial-pci", ("1af4:1043", "1af4:1003"))],
    ids=["less", "other"],
)
def test_against_another_behind_bridges(guests: Guests, work: Path, card: str, ours: tuple[str, str]) -> None:
    dumped(guests, work, **behind_bridges("virtio-rng-pci"))
    guest = guests.waiting(**behind_bridges(card))
    words = (
        f"at PCI address 0000:00:02.0:00.0 the state has 1af4:1044, the guest at b.qmp has {ours[0]}; "
        f"at PCI address 0000:00:03.0:00.0:01.0 the state has 1af4:1005, the guest at b.qmp has {ours[1]}\n"
    )
    for source in ("vm-verify --against b.qmp s", "cat s | vm-verify --against b.qmp"):
        refused(shell(source, work), 4, words)
    still_waits(guest)


def test_against_one_with_more_behind_bridges(guests: Guests, work: Path) -> None:
    dumped(guests, work, **behind_bridges(""))
    guest = guests.waiting(**behind_bridges("virtio-rng-pci"))
    words = "at PCI address 0000:00:02.0:00.0 the state has nothing, the guest at b.qmp has 1af4:1044; "
    refused(shell("vm-verify --against b.qmp s", work), 4, words)
    still_waits(guest)


def with_a_large_device(state: bytes, size: int) -> bytes:
    """A device more, before globalstate."""
    mark, start = description_at_end(state) or (0, 0)
    at, text = state.rindex(b"\x0bglobalstate", 0, mark) - 5, state[start:]
    entry = {"name": "gpu", "instance_id": 0, "fields": [{"name": "picture", "type": "buffer", "size": size}]}
    text = text.replace(b'{"name": "globalstate"', json.dumps(entry).encode() + b', {"name": "globalstate"')
    section = b"\4\0\0\0\x99\3gpu" + bytes(8 + size) + b"\x7e\0\0\0\x99"
    return b"".join((state[:at], section, state[at:mark], constants.END.pack(0, 6, len(text)), text))


def test_against_with_more_devices_than_are_looked_at_ahead(guests: Guests, work: Path) -> None:
    """The vCPUs are then not among those at the end of the file."""
    (work / "s").write_bytes(with_a_large_device(dumped(guests, work).read_bytes(), HOLD))
    guests.waiting()
    silent(shell("vm-verify --against b.qmp s", work))


def test_against_one_that_does_not_wait(guests: Guests, work: Path) -> None:
    guest = guests.running()
    assert shell("vm-dump -q a.qmp > s", work).status == 0
    refused(shell("vm-verify --against a.qmp s", work), 1, "does not wait for a state")
    assert guest.standing() or guest.running()
    refused(shell("vm-verify --against no.qmp s", work), 1, "no guest at no.qmp")


def test_a_page_about_a_state(guests: Guests, work: Path) -> None:
    dumped(guests, work)
    text = shell("vm-inspect s", work)
    assert (text.status, text.err) == (0, "")
    for words in ("pc-q35-", "pc.ram", "52:54:00:00:00:01"):
        assert words in text.text
    everything = json.loads(shell("vm-inspect --json < s", work).out)
    assert everything["bytes"] == (work / "s").stat().st_size
    assert len(everything["vcpus"]) == 1
    assert [nic["mac"] for nic in everything["nics"]] == ["52:54:00:00:00:01"]
    ram = next(block for block in everything["blocks"] if block["name"] == "pc.ram")
    assert ram["bytes"] == 256 * MIB
    assert ram["zero"] + ram["normal"] == 256 * MIB // 4096
    assert ram["normal"] > 1000


def test_a_device(guests: Guests, work: Path) -> None:
    dumped(guests, work)
    done = shell("vm-inspect --device globalstate s", work)
    assert done.status == 0
    assert "runstate" in done.text
    (device,) = json.loads(shell("vm-inspect --json --device virtio-net s", work).out)["devices"]
    assert device["name"].endswith("virtio-net")
    refused(shell("vm-inspect --device nothing s", work), 1, "no device 'nothing' in the state")


def test_a_picture_and_a_difference(guests: Guests, work: Path) -> None:
    """Two states of one guest: the pages that differ are those that do, and few."""
    guest = guests.running()
    assert shell("vm-dump -q --after running a.qmp > s", work).status == 0
    guest.wait_advance()
    assert shell("vm-dump -q a.qmp > t", work).status == 0
    assert shell("vm-inspect --map m.svg s", work).status == 0
    root = xml.etree.ElementTree.parse(work / "m.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root) > 20
    assert "pc.ram" in (work / "m.svg").read_text()
    found = json.loads(shell("vm-inspect --json --diff t s", work).out)
    pages = sum(count for _, count in found["pages"]["pc.ram"])
    assert 1 <= pages < 10_000
    differ = differing(image(work / "s"), image(work / "t"))
    assert {page for begin, count in found["pages"]["pc.ram"] for page in range(begin, begin + count)} == differ
    assert any(field["device"] == "timer" for field in found["fields"])
    assert f"{pages:,} pages and" in shell("vm-inspect -v --diff t s", work).err
    same = shell("vm-inspect --json --diff s s", work)
    assert not any(json.loads(same.out)["pages"].values())
    assert json.loads(same.out)["fields"] == []


def image(path: Path) -> bytes:
    """The RAM that the records of a state yield, of the block pc.ram."""
    found = bytearray(256 * MIB)
    with path.open("rb") as file:
        for record in StateReader(FdReader(file.fileno())):
            assert not isinstance(record, Packed)
            if isinstance(record, Pages) and record.block.name == b"pc.ram":
                put(found, record)
    return bytes(found)


def put(ram: bytearray, record: Pages) -> None:
    at = record.first
    for address, count in record.runs:
        for place in range(address, address + count * record.page, record.page):
            ram[place : place + record.page] = bytes(record.page) if record.zero else record.raw[at : at + record.page]
            at += record.stride


def differing(one: bytes, other: bytes) -> set[int]:
    return {at // 4096 for at in range(0, len(one), 4096) if one[at : at + 4096] != other[at : at + 4096]}


def own_ram(guest: Guest, begin: int, end: int) -> bytes:
    """What QEMU itself says is in the RAM of a guest."""
    path = guest.path("pmem")
    with guest.connect(timeout=60) as qmp:
        qmp.cmd("pmemsave", val=begin, size=end - begin, filename=str(path))
    return path.read_bytes()


def test_the_records_are_the_ram_of_the_guest(guests: Guests, work: Path) -> None:
    """To the byte, of one that stands; below 640 KiB and above 1 MiB nothing hides it."""
    guest = guests.running()
    guest.cmd("stop")
    assert shell("vm-dump -q a.qmp > s", work).status == 0
    records = image(work / "s")
    for begin, end in (LOW, HIGH):
        wrong = differing(records[begin:end], own_ram(guest, begin, end))
        assert not wrong, f"{len(wrong)} pages differ, the first at {begin + 4096 * min(wrong):#x}"
    assert len(set(records)) == 256
