"""The end of a state: real ones, cut at any byte, and forged."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmstate.errors import Damaged
from vmstate.io.descriptors import HOLD
from vmstate.stream import constants
from vmstate.stream.description import description_at_end, find_end, validate_end

from unit.streams import NAMES, state


@pytest.mark.parametrize("name", NAMES)
def test_a_real_end(name: str) -> None:
    data = state(name)
    end = validate_end(data)
    assert end.runstate == "prelaunch"
    mark, start = description_at_end(data) or (0, 0)
    assert end.description == len(data) - start
    assert data[mark] == constants.QEMU_VM_EOF
    devices = json.loads(data[start:])["devices"]
    assert end.devices == len(devices)
    # The first device section follows the footer of the RAM section.
    first = len(data) - end.tail
    assert data[first] == constants.QEMU_VM_SECTION_FULL
    assert data[first - 5] == constants.QEMU_VM_SECTION_FOOTER
    assert data[first - 13 : first - 5] == bytes([0, 0, 0, 0, 0, 0, 0, 0x10])


@pytest.mark.parametrize("name", NAMES)
def test_the_tail_alone_is_enough_but_no_less(name: str) -> None:
    data = state(name)
    end = validate_end(data)
    assert validate_end(data[-end.tail - 13 :]) == end
    with pytest.raises(Damaged, match="are not those of the description"):
        validate_end(data[-end.tail + 1 :])


@pytest.mark.parametrize("name", NAMES)
def test_cut_anywhere_it_is_not_whole(name: str) -> None:
    data = state(name)
    end = validate_end(data)
    cuts = {*range(1, 300), *range(300, end.tail, 977), end.description, end.description + 1, end.description + 6}
    for cut in cuts:
        assert find_end(data[:-cut]) is None, cut


@pytest.mark.parametrize("junk", [b"}", b"\0", b"x", bytes(1024), b'{"devices": []}'])
def test_anything_behind_the_end(junk: bytes) -> None:
    with pytest.raises(Damaged, match="the state is not whole: expected an end mark and the whole description"):
        validate_end(state("q35-7.2") + junk)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_byte_around_a_section_is_seen(data: st.DataObject) -> None:
    """Headers, names and footers of the device sections; what is inside them is not judged yet."""
    whole = state("q35-10.0")
    end = validate_end(whole)
    mark = (description_at_end(whole) or (0, 0))[0]
    at = whole.find(b"globalstate", len(whole) - end.tail)
    place = data.draw(st.sampled_from([at + i for i in range(-6, 15)] + [mark - 5 + i for i in range(5)]))
    flip = data.draw(st.integers(1, 255))
    forged = whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :]
    with pytest.raises(Damaged):
        validate_end(forged)


def test_a_description_that_is_no_json() -> None:
    text = b"{" + b"x" * 100 + b"}"
    forged = bytes([0x7E, 0, 0, 0, 2]) + constants.END.pack(0, 6, len(text)) + text
    with pytest.raises(Damaged, match="the description at the end cannot be read"):
        validate_end(forged)


@pytest.mark.parametrize(
    "description",
    [
        "{}",
        '{"devices": 1}',
        '{"devices": [{}]}',
        '{"devices": [{"name": 1}]}',
        '{"devices": []}',
        '{"devices":' + "[" * 60,
    ],
)
def test_a_forged_description(description: str) -> None:
    """As a guest could put it into its memory."""
    text = description.encode() + (b"]" * 60 + b"}" if description.endswith("[") else b"")
    forged = bytes([0x7E, 0, 0, 0, 2]) + constants.END.pack(0, 6, len(text)) + text
    with pytest.raises(Damaged):
        validate_end(forged)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"runstate"', b'"nunstate"'), (b'"instance_id": 0', b'"instance_id": -'), (b'"size": 104', b'"size": 1e9')],
)
def test_a_damaged_description_is_damage_and_no_bug(old: bytes, new: bytes) -> None:
    data = state("q35-7.2")
    at = data.rfind(old)
    forged = data[:at] + new + data[at + len(old) :]
    if at >= 0:
        with pytest.raises(Damaged):
            validate_end(forged)
    text = json.dumps({"devices": [{"name": "x" * 300, "instance_id": 1 << 40, "fields": []}]}).encode()
    with pytest.raises(Damaged):
        validate_end(bytes(20) + constants.END.pack(0, 6, len(text)) + text)


def test_a_large_description() -> None:
    """1.6 MB, as with 200 vCPUs; the length's first two bytes are then not all zero."""
    pad = " " * 1_600_000
    text = ('{"page_size": 4096,' + pad + '"devices": []}').encode()
    forged = bytes([0x7E, 0, 0, 0, 2]) + constants.END.pack(0, 6, len(text)) + text
    assert description_at_end(forged) == (5, 11)


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail_otherwise(data: bytes) -> None:
    assert find_end(data) is None
    assert description_at_end(data + b"}") is None or data


def section(number: int, name: str, payload: bytes) -> bytes:
    header = bytes([constants.QEMU_VM_SECTION_FULL]) + constants.U32.pack(number) + bytes([len(name)]) + name.encode()
    return header + bytes(8) + payload + constants.FOOTER.pack(constants.QEMU_VM_SECTION_FOOTER, number)


def made_state(size: int) -> bytes:
    """A RAM section's end, one device of `size` bytes, and globalstate."""
    field = {"name": "data", "type": "buffer"}
    devices = [
        {"name": "gpu", "instance_id": 0, "fields": [{**field, "size": size}]},
        {"name": "globalstate", "instance_id": 0, "fields": [{**field, "name": "runstate", "size": 100}]},
    ]
    text = json.dumps({"page_size": 4096, "devices": devices}).encode()
    ram = constants.U64.pack(constants.RAM_SAVE_FLAG_EOS) + constants.FOOTER.pack(constants.QEMU_VM_SECTION_FOOTER, 2)
    sections = section(3, "gpu", bytes(size)) + section(4, "globalstate", b"running".ljust(100, b"\0"))
    return ram + sections + constants.END.pack(0, 6, len(text)) + text


def test_a_device_larger_than_what_is_held() -> None:
    whole = made_state(20 << 20)
    assert validate_end(whole).devices == 2
    held = validate_end(whole[-HOLD:])
    assert (held.devices, held.runstate, held.tail) == (1, "running", HOLD)
    with pytest.raises(Damaged):
        validate_end(whole[-HOLD + 1 :])
    assert find_end(whole[-HOLD - 1 : -1]) is None
