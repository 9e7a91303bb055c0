"""Real streams read and written again, judged, cut, and forged."""

import functools
import json
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.errors import Damaged
from vmstate.io.descriptors import channel
from vmstate.io.readers import FdReader
from vmstate.io.window import Window
from vmstate.stream import constants
from vmstate.stream.reader import StateReader
from vmstate.stream.records import Command, Description, Devices, EndOfBody, Footer, Pages, Record, Section
from vmstate.stream.validate import validate
from vmstate.stream.writer import encode

from unit.streams import BAD, GOOD, Pieces, names, refused, state

# One of each kind, for what is slow: by single bytes a stream takes a second.
FEW = ["bitmaps-7.2", "compress-7.2", "microvm-10.0", "virtio-mem-10.0", "xbzrle-7.2"]
SMALL = "microvm-7.2"


def written(reader: StateReader) -> bytes:
    """What the writer makes of the records; each is asked for its bytes before the next one comes."""
    return b"".join(encode(record) for record in reader)


@functools.cache
def records(name: str) -> list[tuple[Record, int]]:
    """Each record (its views are no longer good) and the offset behind it."""
    found = []
    for record in StateReader(Pieces(state(name))):
        found.append((record, record.offset + len(encode(record))))
    return found


def place(name: str, kind: type[Record], number: int = 0) -> int:
    """The offset of the `number`th record of a kind."""
    return [record.offset for record, _ in records(name) if isinstance(record, kind)][number]


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def damage(data: bytes) -> str:
    """What the judge says of a damaged state."""
    with pytest.raises(Damaged) as raised:
        validate(Pieces(data))
    return str(raised.value)


def test_there_are_streams() -> None:
    assert len(GOOD) > 20
    assert {name.rpartition("-")[0] for name in BAD} == {"mapped-ram", "multifd", "postcopied", "nodescription"}


@pytest.mark.parametrize("piece", [4095, 1 << 30])
@pytest.mark.parametrize("name", GOOD)
def test_read_and_written_again(name: str, piece: int) -> None:
    assert written(StateReader(Pieces(state(name), piece))) == state(name)


@pytest.mark.parametrize("piece", [1, 7])
@pytest.mark.parametrize("name", FEW)
def test_read_in_crumbs(name: str, piece: int) -> None:
    assert written(StateReader(Pieces(state(name), piece))) == state(name)


@pytest.mark.parametrize("size", [1, 4099])
@pytest.mark.parametrize("name", GOOD)
def test_a_small_window(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows with what a record needs; all that was read went to the sink in order."""
    sink = bytearray()
    monkeypatch.setattr("vmstate.stream.reader.Window", functools.partial(Window, size=size))
    reader = StateReader(Pieces(state(name)), sink.extend)
    assert written(reader) == state(name)
    reader.window.flush()
    assert sink == state(name)


@given(st.binary(max_size=300), st.integers(1, 40), st.lists(st.integers(1, 60)), st.integers(1, 50))
def test_a_window(data: bytes, size: int, steps: list[int], piece: int) -> None:
    sink = bytearray()
    window, at = Window(Pieces(data, piece), sink.extend, size), 0
    for step in steps:
        found = window.need(step)
        assert (found is None) == (at + step > len(data))
        if found is None:
            break
        assert (found, window.offset) == (data[at : at + step], at)
        window.take(step)
        at += step
        assert data[: len(sink)] == sink
        assert len(sink) <= at
    window.flush()
    assert sink == data[:at]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_one_is_accepted(name: str) -> None:
    """Nothing but the input comes out, and the devices only once `settle` was called."""
    sink, before = bytearray(), []
    found = validate(Pieces(state(name), 50_000), sink.extend, settle=lambda _: before.append(len(sink)))
    assert sink == state(name)
    assert before[0] <= place(name, Devices, -1)
    assert found.size == len(state(name))
    assert found.machine.encode() in state(name)[:64]
    assert found.runstate in ("running", "paused", "prelaunch")
    assert found.background == name.startswith("background")
    described = json.loads(state(name)[-len(records(name)[-1][0].data) :])["devices"]
    assert [(part.name, part.instance) for part in found.parts] == [(d["name"], d["instance_id"]) for d in described]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_one_is_refused(name: str) -> None:
    words, hint = refused(name) or ("", "")
    with pytest.raises(Damaged, match=words) as raised:
        validate(Pieces(state(name)))
    assert hint in " ".join(raised.value.hints), raised.value.hints


@pytest.mark.parametrize("name", GOOD)
def test_cut_at_any_edge(name: str) -> None:
    """Where a record ends (not all of 30,000), and anywhere; what came out ends before the devices."""
    data, random_ones = state(name), random.Random(name)
    edges = [record.offset for record, _ in records(name)]
    cuts = {*edges[-5:], *edges[:: 1 + len(edges) // 700 * 150], len(data) - 1}
    for cut in {*cuts, *(random_ones.randrange(len(data)) for _ in range(max(3, 30 - len(edges) // 1000)))}:
        sink = bytearray()
        with pytest.raises(
            Damaged, match=f"at offset {cut}|the input is empty|at offset {cut - 1}: expected"
        ) as raised:
            validate(Pieces(data[:cut]), sink.extend)
        assert data[: len(sink)] == sink, raised.value
        assert len(sink) <= place(name, Devices, -1), raised.value


@pytest.mark.parametrize("junk", [b"\0", b"}", b"x" * 5000, b"QEVM\0\0\0\3"])
@pytest.mark.parametrize("piece", [1000, 1 << 30])
def test_anything_behind_the_end(junk: bytes, piece: int) -> None:
    sink, data = bytearray(), state(SMALL)
    text = f"behind the end of the state, at offset {len(data)}: expected the end, found {junk[:1].hex()}"
    with pytest.raises(Damaged, match=text):
        validate(Pieces(data + junk, piece), sink.extend)
    assert len(sink) <= place(SMALL, Devices, -1)


class Live(Pieces):
    """One that would wait for ever, once it has given all."""

    def readinto(self, view: memoryview, /) -> int:
        assert self.data, "asked for more behind the end"
        return super().readinto(view)


@pytest.mark.parametrize("piece", [999, 4096, 1 << 30])
@pytest.mark.parametrize("name", ["bitmaps-7.2", "microvm-10.0", "background-7.2", "xbzrle-7.2"])
def test_an_input_that_does_not_end(name: str, piece: int) -> None:
    """QEMU falls silent behind its last byte, and waits."""
    last = list(StateReader(Live(state(name), piece)))[-1]
    assert isinstance(last, Description)


def test_a_socket_that_stays_open() -> None:
    ours, theirs = channel()
    with ours, theirs:
        data, got = state(SMALL), bytearray()
        reader = StateReader(FdReader(ours.fileno()), got.extend)
        theirs.sendall(data)
        assert isinstance(list(reader)[-1], Description)
        reader.window.flush()
        assert got == data


def with_payload(payload: bytes, name: str = SMALL) -> bytes:
    """A state whose device globalstate has these bytes behind its run state."""
    data = state(name)
    at = data.index(b"paused\0", place(name, Devices, -1)) + 7
    assert len(payload) < 90
    return changed(data, at, payload)


def fake(length: int, text: bytes) -> bytes:
    return bytes((constants.QEMU_VM_SECTION_FOOTER, 1, 2, 3, 4)) + constants.END.pack(0, 6, length) + text


@pytest.mark.parametrize(
    "forged",
    [
        fake(1000, b"{"),
        fake(1 << 23, b"{"),
        fake(0xFFFFFFFF, b"{"),
        fake(0, b"{"),
        fake(1, b"{"),
        fake(2, b"{}"),
        fake(14, b'{"devices":[]}'),
        fake(1000, b"{") * 7,
    ],
)
def test_a_false_end_in_a_device(forged: bytes) -> None:
    """A guest may write what it likes into its devices: the true end is found, and nothing is waited for."""
    data = with_payload(forged)
    last = list(StateReader(Live(data, 5000)))[-1]
    assert isinstance(last, Description)
    assert last.data == records(SMALL)[-1][0].data
    assert validate(Pieces(data)).runstate == "paused"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"devices":[{"name":"timer","instance_id":0,"fields":[]}]}', "no footer of section 'timer' at offset"),
        (b'{"devices":[1]}', "the description at "),
        (b'{"devices":1}', "the description at "),
    ],
)
def test_a_false_end_that_can_be_read(text: bytes, words: str) -> None:
    """It is taken for the end, and does not describe the devices before it."""
    assert words in damage(with_payload(fake(len(text), text)))


def test_many_false_ends_take_no_time() -> None:
    """As a picture in a graphics card could hold them: each begins a text of a megabyte, as much as to copy 700 GB."""
    data, at = state(SMALL), place(SMALL, Devices, -1) + 60
    forged = data[:at] + fake(1 << 20, b'{"a":[') * 700_000 + data[at:]
    started = time.process_time()
    assert "the description expects it" in damage(forged)
    assert time.process_time() - started < 20


def test_a_header_before_the_rounds_of_ram() -> None:
    """virtio-mem has a device section between the START of RAM and its first round."""
    early, last = (record for record, _ in records("virtio-mem-10.0") if isinstance(record, Devices))
    assert (early.early, last.early) == (True, False)
    found = validate(Pieces(state("virtio-mem-10.0")))
    assert found.parts[0].name.endswith("virtio-mem-device-early")
    at = early.offset + 40
    assert f"no section {found.parts[0].name!r}" in damage(changed(state("virtio-mem-10.0"), at, b"~"))


@pytest.mark.parametrize("name", GOOD)
def test_a_round_of_ram_is_not_taken_for_an_early_device(name: str) -> None:
    """Also where no page tells that it is missing, since not all are in the state."""
    rounds = [r.offset for r, _ in records(name) if isinstance(r, Section) and r.tag != constants.QEMU_VM_SECTION_START]
    assert damage(changed(state(name), rounds[0], bytes((constants.QEMU_VM_SECTION_FULL,))))


def u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


@pytest.mark.parametrize(
    ("kind", "number", "shift", "new", "words"),
    [
        (Section, 0, 0, b"\x09", "no section at offset {}: found tag 0x09"),
        (Section, 1, 1, u32(77), "section of unknown id at offset {}: found 77"),
        (Section, 0, 1, u32(77), r"no footer of ram at offset \d+: expected 7e 00 00 00 4d, found 7e 00 00 00 02"),
        (Section, 0, 6, b"rom", "device sections at offset .*, but no section of RAM before them"),
        (Section, 0, 9, u32(1), "section of RAM at offset {}: expected instance 0, version 4, found instance 1"),
        (Section, 0, 13, u32(3), "section of RAM at offset {}: expected instance 0, version 4, found .*version 3"),
        (Section, 1, 0, b"\x03", "section 2 at offset {next} goes on behind its end"),
        (Section, 2, 0, b"\x04", "no section 'timer' at offset {}: the description expects it, found"),
        (Footer, 0, 0, b"\x7f", "no footer of ram at offset {}: expected 7e 00 00 00 02, found 7f 00 00 00 02"),
        (Footer, 2, 4, b"\x07", "no footer of ram at offset {}: expected 7e 00 00 00 02, found 7e 00 00 00 07"),
        (EndOfBody, 1, 7, b"\0", "no record of RAM at offset {}: found 0x0000000000000000"),
        (EndOfBody, 1, 7, b"\x80", "not in this stream .*: flag 0x80 at offset {}"),
        (Pages, 0, 9, b"xx", r"page at offset {} of an unknown RAM block b'xx"),
        (Pages, 0, 0, b"\x01", r"page outside its block at offset {} .*found 0x1\w+ of RAM block '.*', which has 0x"),
        (Devices, 0, 4, b"\x55", r"no footer of section 'timer' at offset \d+.*expected 7e 00 00 00 55, found"),
        (Devices, 0, 6, b"T", "no section 'timer' at offset {}: the description expects it, found"),
        (Description, 0, 0, b"\x05", "truncated at offset .*: no end mark with a whole description there"),
        (Description, 0, 4, b"\0", "truncated at offset .*: no end mark with a whole description there"),
    ],
)
def test_what_is_said_of_damage(kind: type[Record], number: int, shift: int, new: bytes, words: str) -> None:
    """Where, what was expected, what was found."""
    at = place("microvm-7.2", kind, number)
    behind = place("microvm-7.2", Section, 2)
    found = damage(changed(state("microvm-7.2"), at + shift, new))
    assert re.search(words.replace("{}", str(at)).replace("{next}", str(behind)), found), found


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the input is empty: expected the state of a guest, found 0 bytes"),
        (b"hello", "no state of a guest: expected 'QEVM' at offset 0, found b'hell'"),
        (b"QEVM\0\0\0\2", "unknown version at offset 4: expected 3, found 2"),
        (b"QEVM\0\0\0\3\1", "no configuration at offset 8: expected tag 0x07, found 0x01"),
        (b"QEVM\0\0\0\3\7\0\1\0\0", "name of machine at offset 9: expected at most 255 bytes, found 65536"),
        (b"QEVM\0\0\0\3\7\0\0\0\1x\5\1y" + bytes(4), "unknown part of the configuration at offset 14: b'y'"),
        (b"QEVM\0\0\0\3\7\0\0\0\1x\0\6\0", "end mark at offset 14, but no device sections before it"),
        (b"QEVM\0\0\0\3\7\0\0\0\1x\x08\0\x63\0\0", "no command of QEMU at offset 14: found number 99 with 0 bytes"),
        (b"QEVM\0\0\0\3\7\0\0\0\1x\x08\0\x07\0\4\xff\xff\xff\xff", "package at offset 14: expected at most 33554432"),
    ],
)
def test_what_is_said_of_a_wrong_beginning(data: bytes, words: str) -> None:
    assert words in damage(data)


def test_a_command_more_is_as_good() -> None:
    """PING: it belongs to the return path, and says nothing about the state."""
    at = place("microvm-7.2", Section)
    ping = encode(Command(constants.MIG_CMD_PING, u32(1)))
    data = state("microvm-7.2")
    assert validate(Pieces(data[:at] + ping + data[at:])).commands == [constants.MIG_CMD_PING]


def test_all_streams_are_named() -> None:
    assert sorted(GOOD + BAD) == names()
