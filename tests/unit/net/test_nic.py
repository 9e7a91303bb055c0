"""NIC lines, and what QEMU says about its cards."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.errors import Damaged, WrongUsage
from vmstate.net import neighbours
from vmstate.net import nic as net_nic
from vmstate.net.nic import Nic
from vmstate.qemu import nics
from vmstate.qemu.answers import RxFilter

ONE, TWO = "52:54:00:12:34:56", "52:54:00:12:34:57"


def plain(mac_bytes):
    return ":".join(f"{byte:02x}" for byte in bytes([mac_bytes[0] & 0xFE, *mac_bytes[1:]]))


macs = st.binary(min_size=6, max_size=6).map(plain).filter(lambda mac: mac != "00:00:00:00:00:00")
ifaces = st.none() | st.from_regex(r"[a-z][a-z0-9._-]{0,14}", fullmatch=True)
addresses = (
    st.ip_addresses().filter(net_nic.is_announceable).filter(lambda ip: not getattr(ip, "scope_id", None)).map(str)
)


@given(st.builds(Nic, macs, ifaces, st.lists(addresses, max_size=4, unique=True).map(tuple)))
def test_a_line_comes_back(nic):
    assert net_nic.parse_line(net_nic.line(nic)) == nic


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("52:54:00:12:34:56 tap0", Nic(ONE, "tap0")),
        ("52:54:00:12:34:56 -", Nic(ONE)),
        ("  52:54:00:AB:CD:EF\tbr0  192.0.2.7 \r", Nic("52:54:00:ab:cd:ef", "br0", ("192.0.2.7",))),
        ("52-54-00-12-34-56 eth0 2001:DB8:0::7", Nic(ONE, "eth0", ("2001:db8::7",))),
        ("52:54:00:12:34:56 br0 192.0.2.7 192.0.2.7", Nic(ONE, "br0", ("192.0.2.7",))),
        ("52:54:00:12:34:56 br0.10 fe80::1", Nic(ONE, "br0.10", ("fe80::1",))),
    ],
)
def test_lines(text, expected):
    assert net_nic.parse_line(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("52:54:00:12:34:56", "expected MAC IFACE [IP...], found '52:54:00:12:34:56'"),
        ("52:54:00:12:34 br0", "expected a MAC address like 52:54:00:12:34:56, found '52:54:00:12:34'"),
        ("52:54:00:12:34:5g br0", "expected a MAC address"),
        ("01:00:5e:00:00:01 br0", "MAC address of one card, found '01:00:5e:00:00:01'"),
        ("ff:ff:ff:ff:ff:ff br0", "MAC address of one card"),
        ("00:00:00:00:00:00 br0", "MAC address of one card"),
        (f"{ONE} ../../x", "name of an interface, or -, found '../../x'"),
        (f"{ONE} ..", "name of an interface"),
        (f"{ONE} a234567890123456", "name of an interface"),
        (f"{ONE} br0 192.0.2.256", "IPv4 or IPv6 address, found '192.0.2.256'"),
        (f"{ONE} br0 192.0.2.7/24", "IPv4 or IPv6 address"),
        (f"{ONE} br0 224.0.0.1", "address of one card, found '224.0.0.1'"),
        (f"{ONE} br0 255.255.255.255", "address of one card"),
        (f"{ONE} br0 ff02::1", "address of one card"),
        (f"{ONE} br0 ::", "address of one card"),
        (f"{ONE} br0 fe80::1%eth0", "address of one card"),
    ],
)
def test_bad_lines(text, words):
    with pytest.raises(Damaged) as caught:
        net_nic.parse_line(text, 7)
    assert str(caught.value).startswith("line 7: ")
    assert words in str(caught.value)
    mac, iface, *rest = [*text.split(), ""][: max(2, len(text.split()))]
    with pytest.raises(WrongUsage):
        net_nic.from_arguments(mac, iface or "/", rest)


@given(st.text(max_size=200))
def test_any_text_is_lines_or_damaged(text):
    try:
        found = net_nic.parse_lines(text)
    except Damaged as error:
        assert str(error).startswith("line ")
        assert str(error).isprintable()
    else:
        assert net_nic.parse_lines("".join(net_nic.line(nic) + "\n" for nic in found)) == found


def test_lines_are_counted_with_the_empty_ones():
    assert net_nic.parse_lines("\n\n") == []
    assert net_nic.parse_lines(f"{ONE} a\n\n{TWO} -") == [Nic(ONE, "a"), Nic(TWO)]
    with pytest.raises(Damaged, match="^line 3: "):
        net_nic.parse_lines(f"{ONE} a\n\n{TWO}\n")


def card(name, mac, more="", queue=0):
    rest = f"model={name.split('.')[0]},macaddr={mac}" if mac else ""
    return f"{name}: index={queue},type=nic,{rest}\r\n{more}"


def tap(info, name="net0", queue=0):
    return f" \\ {name}: index={queue},type=tap,{info}\r\n"


# As QEMU 7.2 printed them.
NIC_FORMS = (
    "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n"
    " \\ #net009: index=0,type=user,net=10.0.2.0,restrict=off\r\n"
    "e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57\r\n"
    " \\ #net179: index=0,type=tap,ifname=tap0,script=no,downscript=no\r\n"
)
QUEUES = (
    "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n"
    " \\ net0: index=0,type=tap,ifname=tap0,script=no,downscript=no\r\n"
    "virtio-net-pci.1: index=1,type=nic,\r\n"
    " \\ net0: index=1,type=tap,ifname=tap0,script=no,downscript=no\r\n"
    "e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57\r\n"
    " \\ u: index=0,type=user,net=10.0.2.0,restrict=off\r\n"
)
NET_FORMS = (
    "hub 0\r\n"
    " \\ hub0port2: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57\r\n"
    " \\ hub0port1: #net187: index=0,type=tap,ifname=tap0,script=no,downscript=no\r\n"
    " \\ hub0port0: virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n"
)
HUBPORTS = (
    "hub 3\r\n"
    " \\ h2: t: index=0,type=tap,ifname=tap0,script=no,downscript=no\r\n"
    " \\ h1: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\r\n"
)
NO_PEER = (
    "orphan: index=0,type=user,net=10.0.2.0,restrict=off\r\n"
    "my.card: index=0,type=nic,model=rtl8139,macaddr=52:54:00:12:34:56\r\n"
    " \\ s: index=0,type=socket,socket: udp=127.0.0.1:12399\r\n"
    "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\r\n"
)
HELPER = card("virtio-net-pci.0", ONE, tap("helper=(null),br=br7"))


@pytest.fixture(autouse=True)
def no_neighbours(monkeypatch):
    monkeypatch.setattr(nics, "neighbours", dict)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (NIC_FORMS, [(ONE, None), (TWO, "tap0")]),
        (QUEUES, [(ONE, "tap0"), (TWO, None)]),
        (NET_FORMS, [(TWO, "tap0"), (ONE, "tap0")]),
        (HUBPORTS, [(ONE, "tap0")]),
        (NO_PEER, [(ONE, None), (TWO, None)]),
        (HUBPORTS + NIC_FORMS.replace("tap0", "tap1"), [(ONE, "tap0"), (ONE, None), (TWO, "tap1")]),
        (HELPER, [(ONE, "br7")]),
        (card("a", ONE, tap("fd=3")), [(ONE, None)]),
        (card("a", ONE, tap("ifname=a,b,script=no,downscript=no")), [(ONE, "a,b")]),
        (card("a", ONE, "filters:\r\n  - f0: type=filter-dump,file=x\r\n" + tap("ifname=t,script=no")), [(ONE, "t")]),
        (card("a", ""), []),
    ],
)
def test_info_network(text, expected):
    assert [(nic.mac, nic.iface) for nic in nics.from_info_network(text, None)] == expected


def rx_filter(name, mac):
    return RxFilter(name, mac, (), None)


def test_the_filter_knows_what_the_guest_changed():
    changed = [rx_filter("virtio-net-pci.0", "52:54:00:aa:bb:cc"), rx_filter("other", ONE)]
    assert [nic.mac for nic in nics.from_info_network(NIC_FORMS, None, changed)] == ["52:54:00:aa:bb:cc", TWO]
    for useless in ("", "00:00:00:00:00:00", "01:00:5e:00:00:01", "x"):
        filters = [rx_filter("virtio-net-pci.0", useless)]
        assert nics.from_info_network(NIC_FORMS, None, filters)[0].mac == ONE


@pytest.fixture
def process(tmp_path, monkeypatch):
    """A made-up process 42: a function that gives it a descriptor of a tap in a bridge."""
    (tmp_path / "42/fdinfo").mkdir(parents=True)
    (tmp_path / "42/fd").mkdir()
    os.symlink("/dev/null", tmp_path / "42/fd/0")
    (tmp_path / "42/fdinfo/0").write_text("pos:\t0\nflags:\t02100002\n")
    monkeypatch.setattr(nics, "PROC", str(tmp_path))
    monkeypatch.setattr(nics, "SYS", str(tmp_path))

    def add(number, iface, bridge="br7"):
        (tmp_path / f"42/fdinfo/{number}").write_text(
            f"pos:\t0\nflags:\t0104002\nmnt_id:\t24\nino:\t105\niff:\t{iface}\n"
        )
        if not (tmp_path / "class/net" / iface).exists():
            (tmp_path / "class/net" / iface).mkdir(parents=True)
            os.symlink(f"../{bridge}", tmp_path / "class/net" / iface / "master")

    return add


def found(text, pid=42):
    return [nic.iface for nic in nics.from_info_network(text, pid)]


def test_a_tap_by_descriptor(process):
    process(8, "tap8")
    assert found(card("a", ONE, tap("fd=8"))) == ["tap8"]
    assert found(card("a", ONE, tap("fd=0"))) == [None]
    assert found(card("a", ONE, tap("fd=9"))) == [None]
    assert found(card("a", ONE, tap("fd=8")), pid=43) == [None]
    assert found(card("a", ONE, tap("fd=8")), pid=None) == [None]


def test_a_tap_of_the_helper_is_the_one_that_is_left(process):
    process(8, "tap8")
    process(9, "tap9")
    process(10, "tap9")
    named = card("b", TWO, tap("fd=8", "net1"))
    assert found(HELPER + named) == ["tap9", "tap8"]
    assert found(card("a", ONE, tap("helper=/usr/lib/qemu/qemu-bridge-helper")) + named) == ["tap9", "tap8"]


def test_taps_of_the_helper_in_two_bridges(process):
    process(8, "tap8", "br8")
    process(9, "tap9")
    other = card("b", TWO, tap("helper=(null),br=br8", "net1"))
    assert found(HELPER + other) == ["tap9", "tap8"]


def test_taps_of_the_helper_that_cannot_be_told_apart(process):
    process(8, "tap8")
    process(9, "tap9")
    assert found(HELPER + card("b", TWO, tap("helper=(null),br=br7", "net1"))) == ["br7", "br7"]
    assert found(HELPER + card("b", TWO, tap("helper=x", "net1"))) == ["br7", None]


def test_neighbours():
    entries = [
        {"dst": "2001:db8::7", "dev": "br0", "lladdr": ONE.upper(), "state": ["STALE"]},
        {"dst": "fe80::7", "dev": "br0", "lladdr": ONE, "state": ["REACHABLE"]},
        {"dst": "192.0.2.70", "dev": "br0", "lladdr": ONE, "state": ["DELAY"]},
        {"dst": "192.0.2.7", "dev": "br0", "lladdr": ONE, "state": ["PERMANENT"]},
        {"dst": "192.0.2.7", "dev": "br1", "lladdr": ONE, "state": ["STALE"]},
        {"dst": "192.0.2.8", "dev": "br0", "lladdr": ONE, "state": ["FAILED"]},
        {"dst": "192.0.2.9", "dev": "br0", "state": ["INCOMPLETE"]},
        {"dst": "224.0.0.1", "dev": "br0", "lladdr": ONE, "state": ["NOARP"]},
        {"dst": "2001:db8::1", "dev": "br0", "lladdr": TWO, "router": None, "state": ["REACHABLE"]},
        {"dst": "nonsense", "dev": "br0", "lladdr": TWO, "state": ["REACHABLE"]},
    ]
    assert neighbours.from_neighbours(entries) == {ONE: ("192.0.2.7", "192.0.2.70", "2001:db8::7", "fe80::7")}


def test_addresses_of_the_neighbour_table(monkeypatch):
    monkeypatch.setattr(nics, "neighbours", lambda: {TWO: ("192.0.2.7",)})
    assert nics.from_info_network(NIC_FORMS, None) == [Nic(ONE), Nic(TWO, "tap0", ("192.0.2.7",))]


def test_without_the_tool_there_are_no_neighbours(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(neighbours, "TOOLS", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    assert neighbours.neighbours() == {}


def test_what_a_bridge_has_learned():
    entries = [
        {"mac": ONE.upper(), "ifname": "tap0", "master": "br0", "flags": [], "state": ""},
        {"mac": TWO, "ifname": "tap0", "vlan": 10, "master": "br0", "flags": [], "state": ""},
        {"mac": TWO, "ifname": "tap0", "vlan": 20, "master": "br0", "flags": [], "state": ""},
        {"mac": "fe:54:00:12:34:56", "ifname": "tap0", "master": "br0", "flags": [], "state": "permanent"},
        {"mac": "33:33:00:00:00:01", "ifname": "tap0", "flags": ["self"], "state": "permanent"},
        {"mac": "52:54:00:12:34:58", "ifname": "up0", "flags": ["self"], "state": ""},
        {"mac": "52:54:00:12:34:59", "ifname": "up0", "master": "br0", "flags": [], "state": "stale"},
        {"mac": "nonsense", "ifname": "up0", "master": "br0"},
    ]
    assert neighbours.from_forwarding(entries) == {"tap0": (ONE, TWO), "up0": ("52:54:00:12:34:59",)}


def test_what_an_address_and_a_mac_look_like():
    assert net_nic.announceable("192.0.2.7") and net_nic.announceable("fe80::1")
    for text in ("", "fe80::1%eth0", "224.0.0.1", "127.0.0.1", "192.0.2.7/24", "x"):
        assert not net_nic.announceable(text)
    assert net_nic.is_mac(ONE) and net_nic.is_mac("52-54-00-AB-CD-EF")
    assert not net_nic.is_mac("a.qmp")
