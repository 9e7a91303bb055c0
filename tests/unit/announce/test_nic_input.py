"""NIC lines as they come, in pieces."""

import os

from hypothesis import given
from hypothesis import strategies as st
from vmstate.announce.nic_input import LONGEST, Lines, hold_open
from vmstate.errors import Damaged
from vmstate.net.nic import Nic

ONE, TWO = "52:54:00:12:34:56", "52:54:00:12:34:57"
TEXT = f"{ONE} br0 192.0.2.7\n\nnonsense\n{TWO} -".encode()


def all_of(pieces):
    source, sink = os.pipe()
    lines, found = Lines(source), []
    try:
        for piece in pieces:
            os.write(sink, piece)
            found += lines.read()
        os.close(sink)
        found += lines.read()
    finally:
        os.close(source)
    assert not lines.open
    return [str(one) if isinstance(one, Damaged) else one for one in found]


@given(st.lists(st.integers(0, len(TEXT)), max_size=5))
def test_however_they_are_cut(cuts):
    edges = [0, *sorted(set(cuts) - {0, len(TEXT)}), len(TEXT)]
    pieces = [TEXT[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    bad = "line 3: expected MAC IFACE [IP...], found 'nonsense'"
    assert all_of(pieces) == [Nic(ONE, "br0", ("192.0.2.7",)), bad, Nic(TWO)]


def test_a_line_comes_out_before_the_next_one_has_come():
    source, sink = os.pipe()
    lines = Lines(source)
    os.write(sink, f"{ONE} br0\n{TWO}".encode())
    assert list(lines.read()) == [Nic(ONE, "br0")]
    assert lines.open
    os.close(sink)
    os.close(source)


def test_what_is_no_text_is_not_read_to_its_end():
    source, sink = os.pipe()
    lines, found = Lines(source), []
    for _ in range(3):
        os.write(sink, b"x" * (LONGEST // 2))
        found += lines.read()
    assert [str(one) for one in found] == [f"line 1: expected NIC lines, found one of more than {LONGEST} bytes"]
    assert not lines.open
    os.close(sink)
    os.close(source)


def test_a_fifo_is_held_open(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    source = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    lines = Lines(source)
    hold_open(source)
    for _ in range(2):
        with open(tmp_path / "fifo", "w") as sink:
            sink.write(f"{ONE} br0\n")
        assert list(lines.read()) == [Nic(ONE, "br0")]
        assert list(lines.read()) == []
        assert lines.open
    os.close(source)


def test_a_file_is_read_to_its_end(tmp_path):
    (tmp_path / "lines").write_text(f"{ONE} br0\n")
    with open(tmp_path / "lines", "rb") as source:
        before = os.listdir("/proc/self/fd")
        hold_open(source.fileno())
        assert os.listdir("/proc/self/fd") == before
        lines = Lines(source.fileno())
        assert list(lines.read()) == [Nic(ONE, "br0")]
        assert list(lines.read()) == []
    assert not lines.open


def test_a_plain_pipe_still_ends():
    source, sink = os.pipe()
    hold_open(source)
    os.close(sink)
    lines = Lines(source)
    assert list(lines.read()) == []
    assert not lines.open
    os.close(source)
