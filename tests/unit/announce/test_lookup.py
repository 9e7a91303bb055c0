"""What is looked up beyond a line, and in which order it counts."""

from types import SimpleNamespace

from vmstate.announce import guest_query, lookup
from vmstate.announce.guest_query import Told
from vmstate.announce.lookup import AGENT, FILTER, FORWARDING, NEIGHBOURS, Candidate
from vmstate.net import neighbours
from vmstate.net.egress import Egress
from vmstate.net.nic import Nic
from vmstate.qemu import answers

ONE, TWO, THREE = "52:54:00:12:34:56", "52:54:00:12:34:57", "52:54:00:12:34:58"


def told(**values):
    return Told(
        **{"nics": [], "further": {}, "vlans": {}, "addresses": {}, "silent": None, "state": "running", **values}
    )


def test_a_family_is_asked_for_only_once():
    agent, neighbours = (AGENT, ("192.0.2.7", "192.0.2.8")), (NEIGHBOURS, ("192.0.2.9", "2001:db8::7"))
    assert lookup.further((), [agent, neighbours]) == {
        "192.0.2.7": AGENT,
        "192.0.2.8": AGENT,
        "2001:db8::7": NEIGHBOURS,
    }
    assert lookup.further(("192.0.2.1",), [agent, neighbours]) == {"2001:db8::7": NEIGHBOURS}
    assert lookup.further(("192.0.2.1", "fe80::1"), [agent, neighbours]) == {}


def test_the_order_of_the_sources(monkeypatch):
    monkeypatch.setattr(neighbours, "neighbours", lambda: {ONE: ("192.0.2.9",), THREE: ("2001:db8::3",)})
    monkeypatch.setattr(neighbours, "learned", lambda: {"tap0": (ONE, TWO), "up0": ("52:54:00:12:34:99",)})
    place = Egress(Nic(ONE, "tap0", ("2001:db8::1",)), "br0", "tap0")
    known = told(further={ONE: (THREE, TWO)}, vlans={ONE: (10, 20)}, addresses={ONE: ("192.0.2.7",)})
    assert list(lookup.find([place], known)) == [
        Candidate(place, {"192.0.2.7": AGENT}, fresh=False),
        Candidate(place._replace(nic=Nic(TWO, "tap0")), {None: FILTER}),
        Candidate(place._replace(nic=Nic(THREE, "tap0")), {None: FILTER, "2001:db8::3": NEIGHBOURS}),
        Candidate(place, {None: FILTER}, (10,)),
        Candidate(place, {None: FILTER}, (20,)),
    ]
    assert list(lookup.find([place], None)) == [
        Candidate(place, {"192.0.2.9": NEIGHBOURS}, fresh=False),
        Candidate(place._replace(nic=Nic(TWO, "tap0")), {None: FORWARDING}),
    ]


def test_a_card_with_a_line_of_its_own_is_not_found_again(monkeypatch):
    monkeypatch.setattr(neighbours, "neighbours", dict)
    monkeypatch.setattr(neighbours, "learned", lambda: {"tap0": (ONE, TWO)})
    places = [Egress(Nic(mac, "tap0"), "br0", "tap0") for mac in (ONE, TWO)]
    assert list(lookup.find(places, None)) == []


def entry(**values):
    """As QEMU 7.2 answers `query-rx-filter` of a virtio card, read."""
    plain = {"name": "net0", "main-mac": ONE, "vlan": "all", "vlan-table": [], "unicast-table": []}
    answer = {**plain, **{name.replace("_", "-"): value for name, value in values.items()}}
    (found,) = answers.rx_filters(SimpleNamespace(ask=lambda command: [answer]))
    return found


def test_the_filter_of_a_card():
    assert guest_query.unicast(entry(unicast_table=[TWO.upper(), ONE, TWO])) == (TWO,)
    assert guest_query.vlans(entry(vlan="normal", vlan_table=[20, 0, 10])) == (10, 20)
    assert guest_query.vlans(entry(vlan="all", vlan_table=[20])) == ()
    assert guest_query.vlans(entry(vlan="normal", vlan_table=list(range(4096)))) == ()
    assert guest_query.unicast(entry()) == guest_query.vlans(entry()) == ()


def test_a_finder_works_beside(monkeypatch):
    monkeypatch.setattr(neighbours, "neighbours", lambda: {ONE: ("192.0.2.9",)})
    finder = lookup.Lookup("nowhere.qmp")
    place = Egress(Nic(ONE, "br0"), "br0")
    finder.look([place])
    assert finder.jobs == 1
    silent = finder.take()
    assert silent.serious
    assert "no guest at nowhere.qmp" in silent.reason
    assert finder.take() == [Candidate(place, {"192.0.2.9": NEIGHBOURS}, fresh=False)]
    assert finder.jobs == 0
