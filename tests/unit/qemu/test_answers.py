"""Whatever QEMU answers is read into a type, or is an error that names the field."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.errors import CannotDo
from vmstate.qemu import answers, blocks, guest_agent, inventory, markers, settings
from vmstate.qemu.monitor import Monitor
from vmstate.qemu.state import GuestState, Ram, query

from unit.qemu.fake_qemu import FakeQemu

NAMES = [
    "status",
    "error-desc",
    "blocked-reasons",
    "ram",
    "total",
    "remaining",
    "transferred",
    "mbps",
    "downtime",
    "capability",
    "state",
    "max-bandwidth",
    "tls-creds",
    "qemu",
    "major",
    "minor",
    "micro",
    "enabled",
    "qom-path",
    "human-readable-text",
    "id",
    "share",
    "label",
    "filename",
    "name",
    "main-mac",
    "vlan",
    "vlan-table",
    "unicast-table",
    "type",
    "device",
    "inserted",
    "ro",
    "drv",
    "image",
    "virtual-size",
    "snapshots",
    "backing-image",
    "node-name",
    "qdev",
    "file",
    "cpuid-input-eax",
    "cpuid-input-ecx",
    "cpuid-register",
    "features",
    "event",
    "timestamp",
    "seconds",
    "microseconds",
    "at",
    "owner",
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["4", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=8),
    max_leaves=20,
)
READERS: list[Callable[[Any], object]] = [
    query,
    answers.capabilities,
    answers.parameters,
    answers.version,
    answers.kvm,
    answers.vcpus,
    answers.ram_blocks,
    answers.shared_backends,
    answers.chardevs,
    answers.rx_filters,
    answers.machine,
    lambda monitor: answers.children(monitor, "/objects"),
    lambda monitor: answers.qom_flag(monitor, "/machine", "x"),
    lambda monitor: answers.feature_words(monitor, "/cpu"),
    lambda monitor: answers.event(monitor, 0),
    blocks.block_devices,
    blocks.block_jobs,
    blocks.opened_files,
    markers.read,
    settings.left_behind,
    guest_agent.path_of,
    inventory.facts,
]


@pytest.mark.parametrize("read", READERS)
@given(ANYTHING)
def test_any_answer_is_read_or_refused(read: Callable[[Any], object], said: Any) -> None:
    monitor = SimpleNamespace(ask=lambda command, **_: said, event=lambda patience: said, pid=lambda: 1)
    try:
        read(monitor)
    except CannotDo as error:
        assert "field '" in str(error) or "expected an object" in str(error)


@given(ANYTHING, st.sampled_from(markers.SETTINGS))
def test_any_object_of_settings_is_read_or_refused(said: Any, name: str) -> None:
    """Another hand may have put it there."""
    import json

    def ask(command: str, **_: Any) -> Any:
        return [{"name": name, "type": "child<secret>"}] if command == "qom-list" else json.dumps(said)

    try:
        settings.left_behind(SimpleNamespace(ask=ask))  # type: ignore[arg-type]
    except CannotDo as error:
        assert f"the object '{name}' in QEMU: field '" in str(error)


def test_how_far_a_migration_is(qemu: FakeQemu, path: str) -> None:
    ram = {"total": 100, "remaining": 40, "transferred": 70, "normal": 3, "duplicate": 4, "mbps": 8.0}
    counts = {"dirty-pages-rate": 2, "page-size": 4096, "dirty-sync-count": 5}
    qemu.query_migrate = lambda: {  # type: ignore[method-assign]
        "status": "active",
        "ram": {**ram, **counts},
        "expected-downtime": 300,
        "blocked-reasons": ["no"],
    }
    with Monitor(path) as monitor:
        found = query(monitor)
    assert found == GuestState(
        "running", "active", blocked=("no",), ram=Ram(100, 40, 70, 7, 1e6, 8192, 5), expected_downtime=300
    )


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([], "expected an object, found \\[\\]"),
        ({"status": 5}, "field 'status': expected a text, found 5"),
        ({"status": "active", "ram": {"total": "1"}}, "field 'ram.total': expected a whole number, found '1'"),
        ({"ram": {"remaining": 1 << 65}}, "field 'ram.remaining': expected a number from -"),
        ({"blocked-reasons": "no"}, "field 'blocked-reasons': expected a list, found 'no'"),
        ({"downtime": "x"}, "field 'downtime': expected a whole number, found 'x'"),
    ],
)
def test_a_wrong_field_of_a_migration(qemu: FakeQemu, path: str, told: Any, words: str) -> None:
    qemu.query_migrate = lambda: told  # type: ignore[method-assign]
    with Monitor(path) as monitor, pytest.raises(CannotDo, match=f"QEMU's answer to 'query-migrate': {words}"):
        query(monitor)


def test_disks_and_what_lies_below_them() -> None:
    below = {"filename": "b", "virtual-size": 5, "backing-image": {"filename": "c", "virtual-size": 5}}
    image = {"filename": "a", "virtual-size": 6, "snapshots": [{"name": "t"}], "backing-image": below}
    said = [
        {"device": "d", "qdev": "q", "removable": True},
        {"device": "", "inserted": {"node-name": "n", "drv": "qcow2", "ro": False, "image": image}},
    ]
    empty, full = blocks.block_devices(SimpleNamespace(ask=lambda command: said))  # type: ignore[arg-type]
    assert empty == blocks.BlockDevice("d", "q", True, None)
    assert full.writable == blocks.Medium("n", "qcow2", False, blocks.Image("a", 6, ("t",), ("b", "c")))


def test_only_the_door_names_fields_of_these_answers() -> None:
    from conftest import ROOT

    fields = ("query-migrate", "query-status", "query-block", "dirty-sync-count", "blocked-reasons", "virtual-size")
    door = {"state.py", "answers.py", "blocks.py"}
    for file in [*(ROOT / "lib").rglob("*.py"), *(ROOT / "bin").glob("vm-*")]:
        named = [name for name in fields if f'"{name}"' in file.read_text()]
        assert not named or file.name in door, (file, named)
