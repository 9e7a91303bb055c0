"""The order in which a guest wanted its pages, in a file and back."""

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vmstate.errors import CannotDo, Damaged, VmstateError
from vmstate.restore import page_order

# Names of QEMU: printable, and one with a blank within.
BLOCK = st.sampled_from([b"pc.ram", b"0000:00:02.0/vga.vram", b"/rom@etc/acpi/tables", b"a b"])
PLACES = st.lists(st.tuples(BLOCK, st.integers(0, 1 << 40)), max_size=50)


@given(PLACES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_there_and_back(tmp_path: Path, places: list[page_order.Place]) -> None:
    page_order.write(str(tmp_path / "o"), places)
    assert page_order.read(str(tmp_path / "o")) == places


def test_neighbours_share_a_line(tmp_path: Path) -> None:
    places = [(b"pc.ram", 7), (b"pc.ram", 8), (b"pc.ram", 9), (b"vga", 10), (b"pc.ram", 10), (b"pc.ram", 9)]
    page_order.write(str(tmp_path / "o"), places)
    lines = (tmp_path / "o").read_text().splitlines()
    assert lines == ["vmstate order 1", "pc.ram 7 3", "vga 10 1", "pc.ram 10 1", "pc.ram 9 1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no record of vm-restore --record"),
        ("vmstate order 2\n", "no record of vm-restore --record"),
        ("QEVM", "no record"),
        ("vmstate order 1\npc.ram 1\n", "line 2: expected BLOCK PAGE COUNT, found 'pc.ram 1'"),
        ("vmstate order 1\npc.ram 1 1\npc.ram x 1\n", "line 3"),
        ("vmstate order 1\npc.ram -1 1\n", "line 2"),
        ("vmstate order 1\npc.ram 4503599627370496 1\n", "line 2"),
        ("vmstate order 1\n\n", "line 2"),
        (f"vmstate order 1\npc.ram 1 {'9' * 5000}\n", "line 2"),
    ],
)
def test_what_is_none(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "o").write_text(text)
    with pytest.raises(Damaged, match=words):
        page_order.read(str(tmp_path / "o"))


def test_one_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a wish: of one without end the first pages will do."""
    monkeypatch.setattr(page_order, "MOST", 1000)
    (tmp_path / "o").write_text("vmstate order 1\npc.ram 7 2\npc.ram 0 99999999999999999999\npc.ram 0 5\n")
    found = page_order.read(str(tmp_path / "o"))
    assert len(found) == 1000
    assert found[:4] == [(b"pc.ram", 7), (b"pc.ram", 8), (b"pc.ram", 0), (b"pc.ram", 1)]


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "o").write_bytes(b"vmstate order 1\n" + data)
    try:
        found = page_order.read(str(tmp_path / "o"))
    except VmstateError:
        return
    assert len(list(itertools.islice(found, 10))) <= 10


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CannotDo, match="No such file"):
        page_order.read(str(tmp_path / "absent"))
    with pytest.raises(CannotDo, match="cannot create"):
        page_order.write(str(tmp_path / "no" / "where"), [])
    assert list(tmp_path.iterdir()) == []
