"""Every frame of vm-announce as others read it: scapy, tshark and tcpdump, and beside QEMU's own on the same bridge."""

import contextlib
import json
import signal
import subprocess
import warnings

import pytest
from scapy.all import ARP, Dot1AD, Dot1Q, Ether, ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6, rdpcap
from vmstate.net import frames
from vmstate.net.nic import Nic

from net import wires
from net.wires import ONE, TWO, WAIT, of, until

pytestmark = pytest.mark.root
namespaces, place, qemu = wires.namespaces, wires.place, wires.qemu
IPV4, IPV6 = "192.0.2.7", "2001:db8::7"
EVERYBODY, NOBODY = "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"
ONCE = ("--as-is", "--rounds", "1")
TAGS = [(), (10,), (100, 10)]


@contextlib.contextmanager
def captured(lan, path):
    """What comes in at lan0 meanwhile, as tcpdump has it: with the tags that the kernel takes off."""
    command = lan.command(
        "tcpdump", "-i", "lan0", "-Q", "in", "-U", "-w", str(path), "--immediate-mode", "ether", "src", ONE
    )
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert any("listening on lan0" in line for line in iter(process.stderr.readline, ""))
            yield
            until(lambda: path.exists() and path.stat().st_size > 24, "frames have come")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(WAIT)


def announced(place, path, tags):
    """A capture of one round of both families."""
    host, lan = place
    vlan = ("--vlan", ".".join(map(str, tags))) if tags else ()
    with captured(lan, path):
        done = host.announce(*ONCE, *vlan, ONE, "br0", IPV4, IPV6)
        assert (done.returncode, done.stderr) == (0, "")
        until(lambda: len(rdpcap(str(path))) == 4, "all frames have come", 3)
    return rdpcap(str(path))


@pytest.mark.parametrize("tags", TAGS, ids=str)
def test_scapy_reads_every_field(place, tmp_path, tags):
    rarp, request, reply, advertisement = announced(place, tmp_path / "pcap", tags)
    for packet, to in (
        (rarp, EVERYBODY),
        (request, EVERYBODY),
        (reply, EVERYBODY),
        (advertisement, "33:33:00:00:00:01"),
    ):
        assert (packet[Ether].src, packet[Ether].dst) == (ONE, to)
        kinds = [Dot1AD] * (len(tags) - 1) + [Dot1Q] * bool(tags)
        for kind, tag in zip(kinds, tags, strict=True):
            assert (packet[kind].vlan, packet[kind].prio, packet[kind].dei) == (tag, 0, 0)
    inner = rarp[Dot1Q].type if tags else rarp[Ether].type
    assert inner == 0x8035
    # scapy has no layer for RARP, which is ARP by another number.
    told = ARP(bytes(rarp)[14 + 4 * len(tags) :])
    assert (told.hwtype, told.ptype, told.hwlen, told.plen, told.op) == (1, 0x0800, 6, 4, 3)
    assert (told.hwsrc, told.hwdst, told.psrc, told.pdst) == (ONE, ONE, "0.0.0.0", "0.0.0.0")
    for packet, operation, target in ((request, 1, NOBODY), (reply, 2, ONE)):
        told = packet[ARP]
        assert (told.hwtype, told.ptype, told.hwlen, told.plen, told.op) == (1, 0x0800, 6, 4, operation)
        assert (told.hwsrc, told.hwdst, told.psrc, told.pdst) == (ONE, target, IPV4, IPV4)
    ip, told, option = advertisement[IPv6], advertisement[ICMPv6ND_NA], advertisement[ICMPv6NDOptDstLLAddr]
    assert (ip.src, ip.dst, ip.hlim, ip.nh, ip.plen, ip.tc, ip.fl) == (IPV6, "ff02::1", 255, 58, 32, 0, 0)
    assert (told.type, told.code, told.R, told.S, told.O, told.res, told.tgt) == (136, 0, 0, 0, 1, 0, IPV6)
    assert (option.type, option.len, option.lladdr) == (2, 1, ONE)


@pytest.mark.parametrize("tags", TAGS, ids=str)
def test_scapy_makes_the_same_checksum(place, tmp_path, tags):
    advertisement = announced(place, tmp_path / "pcap", tags)[3]
    checksum = advertisement[ICMPv6ND_NA].cksum
    del advertisement[ICMPv6ND_NA].cksum
    assert Ether(bytes(advertisement))[ICMPv6ND_NA].cksum == checksum


@pytest.mark.parametrize("tags", TAGS, ids=str)
def test_tshark_reads_every_field(place, tmp_path, tags):
    announced(place, tmp_path / "pcap", tags)
    fields = {
        "rarp": {"eth.dst": EVERYBODY, "arp.opcode": "3", "arp.src.hw_mac": ONE, "arp.dst.hw_mac": ONE},
        "arp-request": {"arp.opcode": "1", "arp.src.proto_ipv4": IPV4, "arp.dst.proto_ipv4": IPV4},
        "arp-reply": {"arp.opcode": "2", "arp.src.proto_ipv4": IPV4, "arp.dst.hw_mac": ONE},
        "advertisement": {"icmpv6.type": "136", "icmpv6.nd.na.target_address": IPV6, "icmpv6.checksum.status": "1"},
    }
    fields["advertisement"] |= {"icmpv6.nd.na.flag.o": "1", "icmpv6.nd.na.flag.r": "0", "icmpv6.nd.na.flag.s": "0"}
    fields["advertisement"] |= {"ipv6.hlim": "255", "ipv6.dst": "ff02::1", "icmpv6.opt.linkaddr": ONE}
    fields["arp-request"] |= {"arp.isgratuitous": "1", "arp.dst.hw_mac": NOBODY}
    fields["arp-reply"] |= {"arp.isgratuitous": "1", "arp.dst.proto_ipv4": IPV4}
    names = sorted({name for one in fields.values() for name in one})
    words = ["tshark", "-r", str(tmp_path / "pcap"), "-T", "json", "-o", "eth.check_fcs:FALSE"]
    words += [part for name in [*names, "vlan.id", "ieee8021ad.id", "_ws.malformed"] for part in ("-e", name)]
    told = json.loads(wires.sh(*words))
    for packet, expected in zip(told, fields.values(), strict=True):
        layers = packet["_source"]["layers"]
        found = {name: true_as_one(layers[name][0]) for name in expected}
        assert found == expected
        ids = [int(word) for name in ("ieee8021ad.id", "vlan.id") for word in layers.get(name, ())]
        assert ids == list(tags)
        assert "_ws.malformed" not in layers


def true_as_one(word):
    return {"True": "1", "False": "0", "true": "1", "false": "0"}.get(word, word)


@pytest.mark.parametrize("tags", TAGS, ids=str)
def test_tcpdump_finds_nothing_wrong(place, tmp_path, tags):
    announced(place, tmp_path / "pcap", tags)
    text = wires.sh("tcpdump", "-r", str(tmp_path / "pcap"), "-n", "-e", "-vv")
    assert f"Reverse Request who-is {ONE} tell {ONE}" in text
    assert f"Request who-has {IPV4} tell {IPV4}" in text or f"Announcement {IPV4}" in text
    assert f"Reply {IPV4} is-at {ONE}" in text
    assert "[icmp6 sum ok]" in text
    assert f"neighbor advertisement, length 32, tgt is {IPV6}, Flags [override]" in text
    assert f"destination link-address option (2), length 8 (1): {ONE}" in text
    for tag in tags:
        assert text.count(f"vlan {tag},") == 4


@pytest.mark.guest
def test_beside_qemus_own_on_the_same_bridge(place, qemu, tmp_path):
    """Byte for byte the same RARP, and as much of it: QEMU announces by its tap, we on the bridge of that."""
    host, lan = place
    card = ("-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no")
    card += ("-device", f"virtio-net-pci,netdev=n,mac={ONE},romfile=")
    _, monitor = qemu(*card, before=host.command())
    host.ip("link set tap0 master br0 up")
    wires.forwards(host, "tap0")
    monitor.ask("cont")
    rhythm = {"initial": 5, "max": 10, "rounds": 3, "step": 5}
    with captured(lan, tmp_path / "theirs"):
        monitor.ask("announce-self", **rhythm)
        until(lambda: len(rdpcap(str(tmp_path / "theirs"))) >= 3, "QEMU's frames have come")
    words = [part for name, value in rhythm.items() for part in (f"--{name}", str(value))]
    with captured(lan, tmp_path / "ours"):
        assert host.announce("--as-is", *words, ONE, "tap0").returncode == 0
        until(lambda: len(rdpcap(str(tmp_path / "ours"))) >= 3, "our frames have come")
    theirs, ours = ([bytes(packet) for packet in rdpcap(str(tmp_path / name))] for name in ("theirs", "ours"))
    assert ours == theirs == of(Nic(ONE, "tap0")) * 3


def test_a_bridge_that_knows_of_vlans(place):
    """Its port in VLAN 10 hears what is tagged for that, without the tag; the port of another VLAN does not."""
    host, lan = place
    if subprocess.run(
        ["ip", "-n", host.name, *["link", "set", "br0", "type", "bridge", "vlan_filtering", "1"]], check=False
    ).returncode:
        warnings.warn("not available in this kernel: VLANs of bridges (BRIDGE_VLAN_FILTERING)", stacklevel=1)
        return
    host.ip(f"link add up1 type veth peer name lan1 netns {lan.name}")
    host.ip("link set up1 master br0 up")
    lan.ip("link set lan1 up")
    for words in ("vid 10 dev br0 self", "vid 10 dev up0 pvid untagged"):
        host.sh("bridge", "vlan", "add", *words.split())
    with lan.listening("wire", "lan0") as here, lan.listening("wire", "lan1") as there:
        assert host.announce(*ONCE, "--vlan", "10", ONE, "br0", IPV4).returncode == 0
        assert host.announce(*ONCE, TWO, "br0").returncode == 0
    plain = [frame.data for frame in frames.of_card(ONE, (IPV4,))]
    # What has had a tag is longer than it would have been.
    assert [frame[: len(one)] for frame, one in zip(here, plain, strict=True)] == plain
    assert [frame[6:12] for frame in there] == [frames.packed(TWO)]
