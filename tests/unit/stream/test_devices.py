"""Device sections: real ones, made ones with the rarer kinds of fields, and damaged descriptions."""

import copy
import functools
import json
import re
import struct
import time
from typing import Any

import pytest
from conftest import IN_NUMBERS
from hypothesis import given, settings
from hypothesis import strategies as st
from vmstate.errors import Damaged
from vmstate.stream import constants, device_facts
from vmstate.stream.description import _size, description_at_end
from vmstate.stream.device_values import Device, Field, Struct, find_field, to_json
from vmstate.stream.devices import NUMBERS, decode, decode_part, parse_description
from vmstate.stream.validate import validate

from unit.streams import NAMES, Pieces, names, refused, state

ALL = [name for name in names() if refused(name) is None or name.startswith(("multifd", "mapped-ram"))]


@functools.cache
def sections(name: str) -> list[tuple[dict[str, Any], bytes]]:
    """Entries of the description and their payloads, in the order of the stream; found from the end mark backwards."""
    data = state(name)
    place = description_at_end(data)
    assert place
    at, start = place
    found = []
    for device in reversed(parse_description(data[start:])["devices"]):
        behind = at - constants.FOOTER.size
        first = behind - _size(device)
        at = first - (1 + 4 + 1 + len(device["name"].encode()) + 4 + 4)
        if data[at] != constants.QEMU_VM_SECTION_FULL:
            break  # those that come before RAM
        found.append((device, data[first:behind]))
    return found[::-1]


@functools.cache
def devices(name: str) -> list[Device]:
    return [decode(device, payload) for device, payload in sections(name)]


def device(name: str, section: str, instance: int = 0) -> Device:
    return next(found for found in devices(name) if (found.name, found.instance) == (section, instance))


def encoded(value: Any, kind: str, size: int) -> bytes:
    """What QEMU writes for `value`, with nothing from the payload."""
    if isinstance(value, Struct):
        return written(value)
    if isinstance(value, list):
        parts = [encoded(part, kind, size // len(value)) for part in value]
        if kind == "gtree":
            half = len(parts) // 2
            pairs = b"".join(b"\1" + key + part for key, part in zip(parts[::2], parts[1::2], strict=True))
            return struct.pack(">I", half) + pairs + b"\0"
        if kind in ("qtailq", "qlist"):
            return b"".join(b"\1" + part for part in parts) + b"\0"
        return b"".join(parts)
    if isinstance(value, bytes):
        return value
    return b"0" if value is None else struct.pack(">" + NUMBERS.get(kind.split()[0], ("Q", 8))[0], value)


def written(part: Struct) -> bytes:
    data = b"".join(encoded(field.value, field.type, field.size) for field in part.fields)
    for below in part.subsections:
        data += bytes([5, len(below.name)]) + below.name.encode() + struct.pack(">I", below.version) + written(below)
    return data


def leaves(part: Struct) -> list[Field]:
    """Fields in the order of the stream, without those that consist of others."""
    found = []
    for field in part.fields:
        values = field.value if isinstance(field.value, list) else [field.value]
        structs = [value for value in values if isinstance(value, Struct)]
        found += [leaf for value in structs for leaf in leaves(value)] if structs else [field]
    return found + [leaf for below in part.subsections for leaf in leaves(below)]


@pytest.mark.parametrize("name", ALL)
def test_every_byte_has_its_field(name: str) -> None:
    for found in devices(name):
        assert found.root is not None
        assert found.root.size == found.size == len(found.raw), found.name
        assert written(found.root) == found.raw, found.name
        at = 0
        for leaf in leaves(found.root):
            assert leaf.offset >= at
            assert encoded(leaf.value, leaf.type, leaf.size) == found.raw[leaf.offset : leaf.offset + leaf.size]
            at = leaf.offset + leaf.size


@pytest.mark.parametrize("name", ALL)
def test_sections_are_where_the_description_says(name: str) -> None:
    names = [found.name for found in devices(name)]
    assert "globalstate" in names
    assert len(names) == len({(found.name, found.instance) for found in devices(name)})


@pytest.mark.parametrize("name", ALL)
def test_paths_lead_to_their_fields(name: str) -> None:
    for found in devices(name):
        assert found.root
        for field in found.root.fields:
            assert find_field(found, field.name) == field
            values = field.value if isinstance(field.value, list) else []
            for i in {0, len(values) // 2, len(values) - 1} if values else ():
                element = find_field(found, f"{field.name}[{i}]")
                assert element.value == values[i]
                if not isinstance(values[i], Struct):
                    there = found.raw[element.offset : element.offset + element.size]
                    assert encoded(values[i], field.type, element.size) == there


@pytest.mark.parametrize("name", ALL)
def test_json(name: str) -> None:
    text = json.dumps([to_json(found) for found in devices(name)])
    assert json.loads(text)[-1]["name"] == devices(name)[-1].name


@pytest.mark.parametrize("name", ALL)
def test_facts(name: str) -> None:
    found = devices(name)
    assert re.fullmatch("[a-z-]+", device_facts.runstate(found))
    assert [cpu["index"] for cpu in device_facts.vcpus(found)] == list(range(len(device_facts.vcpus(found))))
    for cpu in device_facts.vcpus(found):
        assert cpu["mode"] in ("real", "protected", "long", "long (user)", "AArch32", "EL0", "EL1", "EL2", "EL3")
        assert "rip" in cpu or "pc" in cpu
    for card in device_facts.nics(found):
        if card["model"] in ("virtio-net", "e1000", "e1000e", "igb", "rtl8139", "pcnet"):
            assert re.fullmatch("52:54:00(:[0-9a-f]{2}){3}", card["mac"]), card
    for address, (vendor, _) in device_facts.pci(found).items():
        assert re.fullmatch("[0-9a-f:.]+", address)
        assert vendor in (0x8086, 0x1AF4, 0x1B36, 0x1234, 0x1022, 0x10EC, 0x1013, 0x15AD), address
    for part in found:
        kept = device_facts.virtio(part)
        is_virtio = part.root and any(field.type == "virtio" for field in part.root.fields)
        assert (kept is not None) == is_virtio
        # Behind what is the device's own are the subsections that all kinds share.
        assert kept is None or b"virtio/" in kept.own[:4096]


@pytest.mark.parametrize("name", NAMES)
def test_a_guest_that_has_not_run(name: str) -> None:
    assert device_facts.runstate(devices(name)) == "prelaunch"
    (cpu,) = device_facts.vcpus(devices(name))
    assert (cpu["rip"], cpu["cr0"], cpu["flags"], cpu["mode"]) == (0xFFF0, 0x60000010, 2, "real")
    assert find_field(device(name, "cpu"), "env.segs[1].base").value == 0xFFFF0000
    assert [(card["pci"], card["model"], card["mac"]) for card in device_facts.nics(devices(name))] == [
        ("0000:00:02.0", "virtio-net", "52:54:00:12:34:56"),
        ("0000:00:03.0", "e1000", "52:54:00:12:34:57"),
    ]
    ids = device_facts.pci(devices(name))
    assert (ids["0000:00:00.0"], ids["0000:00:02.0"], ids["0000:00:03.0"]) == (
        (0x8086, 0x29C0),
        (0x1AF4, 0x1000),
        (0x8086, 0x100E),
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_clock_agrees_with_itself(name: str) -> None:
    rtc = device(name, "mc146818rtc")
    moment = time.gmtime(find_field(rtc, "base_rtc").value)
    cmos = find_field(rtc, "cmos_data").value
    assert cmos[0:10:2].hex() == time.strftime("%S%M%H", moment) + f"{cmos[6]:02x}" + time.strftime("%m", moment)
    assert cmos[7:10].hex() == time.strftime("%d%m%y", moment)
    assert find_field(rtc, "periodic_timer").value == -1
    assert find_field(rtc, "unused[0]").type == "unused_buffer"


@pytest.mark.parametrize("name", NAMES)
def test_fields_of_many_kinds(name: str) -> None:
    assert find_field(device(name, "i8259", 1), "irq_base").value == 0
    assert len(find_field(device(name, "cpu"), "env.regs").value) == 16
    assert find_field(device(name, "cpu"), "env.fpregs[7].tmp.tmp_exp").size == 2
    timers = find_field(device(name, "hpet"), "timer")
    assert [timer.fields[0].value for timer in timers.value] == [0, 1, 2]
    assert find_field(device(name, "hpet"), "timer[2].tn").value == 2
    config = find_field(device(name, "0000:00:03.0/e1000"), "parent_obj.config[0]")
    assert (config.type, config.value[:4].hex()) == ("pci config", "86800e10")
    e1000 = device(name, "0000:00:03.0/e1000")
    assert find_field(e1000, "e1000/mit_state.mit_irq_level").value is False
    assert find_field(e1000, "mac_reg[CTRL]").size == 4
    assert len(find_field(e1000, "e1000/full_mac_state.mac_reg").value) == 32768
    assert (
        find_field(e1000, "e1000/full_mac_state.mac_reg[3]").offset % 4
        == find_field(e1000, "e1000/full_mac_state.mac_reg").offset % 4
    )


@pytest.mark.parametrize(
    "path", ["", ".", "[", "env", "env.regs[", "env.regs[16]", "env.regs[-1]", "env.regs[x]", "env.eip.x", "env.eip[0]"]
)
def test_a_path_that_leads_nowhere(path: str) -> None:
    for wrong in (path, path + ".", path + "[²]", path + "[" + "9" * 5000 + "]"):
        with pytest.raises(LookupError):
            find_field(device("q35-7.2", "cpu"), wrong)


def made(fields: str, payload: bytes, more: str = "") -> Device:
    """A device of `fields`, as QEMU writes them: keys may come repeatedly."""
    text = f'{{"name": "d", "instance_id": 3, "vmsd_name": "d", "version": 2, "fields": [{fields}]{more}}}'
    return decode(parse_description(b'{"devices": [' + text.encode() + b"]}")["devices"][0], payload)


def values(found: Any) -> Any:
    if isinstance(found, Struct):
        return {field.name: values(field.value) for field in found.fields}
    return [values(one) for one in found] if isinstance(found, list) else found


BYTE = '"fields": [{"name": "x", "type": "uint8", "size": 1}]'
SHAPE = f'"vmsd_name": "s", "version": 1, {BYTE}'


@pytest.mark.parametrize(
    ("fields", "payload", "expected"),
    [
        ('{"name": "a", "type": "int32 le", "size": 4}', b"\xff\xff\xff\xfe", -2),
        ('{"name": "a", "type": "int64 equal", "size": 8}', bytes(7) + b"\5", 5),
        ('{"name": "a", "type": "uint16 equal", "array_len": 2, "size": 2}', b"\1\0\0\1", [256, 1]),
        ('{"name": "a", "type": "timer", "size": 8}', b"\xff" * 8, -1),
        ('{"name": "a", "type": "bitmap", "size": 16}', bytes(15) + b"\1", [0, 1]),
        ('{"name": "a", "type": "bool", "array_len": 2, "size": 1}', b"\1\0", [True, False]),
        ('{"name": "a", "type": "CPU_Double_U", "size": 8}', b"12345678", b"12345678"),
        ('{"name": "a", "type": "never heard of", "array_len": 2, "size": 2}', b"abcd", [b"ab", b"cd"]),
        ('{"name": "a", "type": "uint32", "size": 3}', b"abc", b"abc"),
        ('{"name": "a", "type": "buffer", "size": 0}', b"", b""),
        ('{"name": "a", "type": "tmp", ' + SHAPE + ', "size": 1}', b"\7", {"x": 7}),
        ('{"name": "a", "type": "vstruct", "array_len": 2, ' + SHAPE + ', "size": 1}', b"\7\x08", [{"x": 7}, {"x": 8}]),
        ('{"name": "a", "type": "qtailq", "size": 1}', b"\0", []),
        (f'{{"name": "a", "type": "qlist", {SHAPE}, {SHAPE}, "size": 5}}', b"\1\7\1\x08\0", [{"x": 7}, {"x": 8}]),
        (
            f'{{"name": "a", "type": "gtree", {SHAPE}, {SHAPE}, "size": 8}}',
            bytes([0, 0, 0, 1, 1, 7, 8, 0]),
            [{"x": 7}, {"x": 8}],
        ),
        (
            f'{{"name": "a", "type": "gtree", {SHAPE}, "size": 15}}',
            bytes([0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 9, 8, 0]),
            [9, {"x": 8}],
        ),
        ('{"name": "a", "type": "struct", "struct": {}, "size": 1}', b"0", None),
        (
            f'{{"name": "a", "type": "struct", "array_len": 2, "struct": {{{SHAPE}}}, "size": 1}}',
            b"\7\x08",
            [{"x": 7}, {"x": 8}],
        ),
    ],
)
def test_one_field(fields: str, payload: bytes, expected: Any) -> None:
    found = made(fields, payload)
    assert found.root
    assert values(found.root) == {"a": expected}
    assert (found.version, found.instance, found.size) == (2, 3, len(payload))
    if not fields.startswith('{"name": "a", "type": "qtailq"'):
        assert written(found.root) == payload


def entry(kind: str, *more: str) -> str:
    return "{" + ", ".join([f'"name": "a", "type": "{kind}"', *more]) + "}"


def test_runs_of_null_pointers_belong_to_one_array() -> None:
    """As QEMU 10.0 writes them; the last of a run of one has neither array_len nor index."""
    pointed = entry("struct", '"array_len": 2', f'"struct": {{{SHAPE}}}', '"size": 1')
    runs = [entry("nullptr", '"array_len": 3', '"size": 1'), pointed, entry("nullptr", '"size": 1')]
    found = made(",".join([*runs, '{"name": "b", "type": "uint8", "size": 1}']), b"000\7\x080\x09")
    assert values(found.root) == {"a": [None, None, None, {"x": 7}, {"x": 8}, None], "b": 9}
    field = find_field(found, "a")
    assert (field.type, field.offset, field.size) == ("struct", 0, 6)
    assert find_field(found, "a[4].x") == Field("x", "uint8", 4, 1, 8)
    assert find_field(found, "a[5]") == Field("a[5]", "struct", 5, 1, None)


def test_null_pointers_among_numbers() -> None:
    runs = [entry("uint32", '"array_len": 2', '"size": 4'), entry("nullptr", '"size": 1'), entry("uint32", '"size": 4')]
    found = made(",".join(runs), b"\0\0\0\1\0\0\0\0020\0\0\0\3")
    assert values(found.root) == {"a": [1, 2, None, 3]}
    assert [find_field(found, f"a[{i}]").offset for i in range(4)] == [0, 4, 8, 9]
    assert [find_field(found, f"a[{i}]").size for i in range(4)] == [4, 4, 1, 4]


@pytest.mark.parametrize("last", ['"index": 2', '"size": 4'])
def test_entries_with_an_index_belong_to_one_array(last: str) -> None:
    """QEMU 7.2 numbers all of them, 10.0 all but the last."""
    entries = [entry("uint32", '"index": 0', '"size": 4'), entry("uint32", '"index": 1', '"size": 4')]
    found = made(",".join([*entries, entry("uint32", last, '"size": 4')]), bytes([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3]))
    assert values(found.root) == {"a": [1, 2, 3]}
    assert find_field(found, "a[2]") == Field("a[2]", "uint32", 8, 4, 3)


def test_subsections_below_subsections_and_below_structs() -> None:
    part = '"subsections": [{"vmsd_name": "s/t", "version": 4, ' + BYTE + "}]"
    inner = f'{{"name": "a", "type": "struct", "struct": {{{SHAPE}, {part}}}, "size": 11}}'
    whole = '{"vmsd_name": "d/e", "version": 5, ' + BYTE + ', "subsections": [{"vmsd_name": "d/e/f", "version": 6, '
    data = b"\1\5\3s/t\0\0\0\4\2" + b"\5\3d/e\0\0\0\5\3" + b"\5\5d/e/f\0\0\0\6\4"
    found = made(inner, data, ', "subsections": [' + whole + BYTE + "}]}]")
    assert found.root
    assert written(found.root) == data
    assert [find_field(found, path).value for path in ("a.x", "a.s/t.x", "d/e.x", "d/e.d/e/f.x")] == [1, 2, 3, 4]
    for changed in range(len(data)):
        if data[changed] not in (1, 2, 3, 4) or changed in (2, 12):
            with pytest.raises(Damaged):
                made(
                    inner, data[:changed] + b"\xff" + data[changed + 1 :], ', "subsections": [' + whole + BYTE + "}]}]"
                )


def test_an_old_style_device_is_a_buffer() -> None:
    old = {"name": "o", "instance_id": 1, "fields": [{"name": "data", "size": 3, "type": "buffer"}]}
    found = decode(old, memoryview(b"abc"))
    assert (found.root, found.version) == (Struct("o", 0, (Field("data", "buffer", 0, 3, b"abc"),), ()), 0)


def test_the_description_is_the_same_for_others() -> None:
    for name in NAMES:
        data = state(name)
        text = data[(description_at_end(data) or (0, 0))[1] :]
        ours, plain = parse_description(text), json.loads(text)
        assert ours.keys() == plain.keys()
        assert [_size(one) for one in ours["devices"]] == [_size(one) for one in plain["devices"]]
        assert ours["devices"][2]["subsections"] == plain["devices"][2]["subsections"]


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"1", b"{", b"\xff\xfe{}", b'{"a":' * 100_000, b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_no_description(text: bytes) -> None:
    with pytest.raises(Damaged, match="the description at the end cannot be read"):
        parse_description(text)


def nested(levels: int) -> str:
    text = '{"name": "a", "type": "uint8", "size": 1}'
    for _ in range(levels):
        shape = f'{{"vmsd_name": "s", "version": 1, "fields": [{text}]}}'
        text = f'{{"name": "a", "type": "struct", "struct": {shape}, "size": 1}}'
    return text


MANY = ", ".join([f'{{"name": "{i}", "type": "uint8", "array_len": 0, "size": 1}}' for i in range(1000)])
EMPTY = f'"struct": {{"vmsd_name": "s", "version": 1, "fields": [{MANY}]}}'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (entry("uint8", '"array_len": 1000000000000', '"size": 1'), "1000000000000 bytes are described, 100 are there"),
        (entry("struct", '"array_len": 1000000000000', f'"struct": {{{SHAPE}}}', '"size": 1'), "bytes are described"),
        (entry("struct", '"array_len": 1000000000000', f'"struct": {{{SHAPE}}}', '"size": 0'), "'a' has 0 bytes"),
        (entry("buffer", '"array_len": 1000000000000', '"size": 0'), "100 bytes more than described"),
        (entry("uint8", '"array_len": -1', '"size": 1'), "is no number of anything"),
        (entry("uint8", '"size": -1'), "is no number of anything"),
        (entry("uint8", '"size": true'), "is no number of anything"),
        (entry("uint8", '"size": 1.0'), "is no number of anything"),
        (entry("uint8", '"size": "1"'), "is no number of anything"),
        (entry("uint8", '"size": 1' + "0" * 4000), "is no number of anything"),
        (entry("uint8", '"size": 1' + "0" * 18, '"array_len": 1' + "0" * 18), "bytes are described"),
        (entry("uint8"), "cannot be read"),
        (entry("buffer", '"size": 99'), "1 bytes more than described"),
        (entry("buffer", '"size": 101'), "byte 0 of 100: 101 bytes are described"),
        (entry("struct", f'"struct": {{{SHAPE}}}', '"size": 100'), "'a' has 100 bytes, its parts have 1"),
        (entry("struct", '"struct": [1]', '"size": 100'), "cannot be read"),
        (entry("tmp", '"vmsd_name": 1', '"size": 100'), "cannot be read"),
        (entry("qtailq", SHAPE, '"size": 100'), "a list has more or fewer elements"),
        (entry("gtree", SHAPE, '"size": 100'), "a tree of 0 has 1 structs"),
        ('{"name": "\\ud800", "type": "buffer", "size": 100}', "cannot be read"),
        ('{"name": [], "type": "buffer", "size": 100}', "cannot be read"),
        ("7", "cannot be read"),
        (nested(60), "structs in structs without end"),
        (
            entry("struct", EMPTY, '"array_len": 100', '"size": 1'),
            "more fields are described than it can hold|its parts",
        ),
    ],
)
def test_a_description_that_does_not_fit(fields: str, message: str) -> None:
    with pytest.raises(Damaged, match=message) as caught:
        made(fields, bytes(100))
    assert "device 'd', byte " in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_small_description_makes_no_endless_work() -> None:
    """Many structs of one byte with a thousand empty fields each."""
    shape = (
        f'"struct": {{"vmsd_name": "s", "version": 1, "fields": [{MANY}, {{"name": "x", "type": "uint8", "size": 1}}]}}'
    )
    begun = time.monotonic()
    with pytest.raises(Damaged, match="more fields are described than it can hold"):
        made(entry("struct", shape, '"array_len": 10000', '"size": 1'), bytes(10_000))
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "device", [{}, {"name": 1}, {"name": "x" * 300}, [], None, 7, "x", {"name": "x", "fields": []}]
)
def test_no_device(device: Any) -> None:
    with pytest.raises(Damaged):
        decode(device, b"")


def test_a_payload_cut_anywhere() -> None:
    for description, payload in sections("q35-7.2"):
        for cut in {1, 2, len(payload) // 3, len(payload) // 2, len(payload)} - {0}:
            if cut <= len(payload) and payload:
                with pytest.raises(Damaged):
                    decode(description, payload[:-cut])
        with pytest.raises(Damaged):
            decode(description, payload + b"\0")


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from(
        [10**12, 1 << 64, 10**400, 1e308, float("nan"), "", "struct", "gtree", "qlist", "nullptr", "\ud800"]
    ),
    st.sampled_from(["uint64", "tmp", "vstruct", "bitmap", "timer", "x" * 300, [], {}, [[]], [{}], {"fields": [{}]}]),
)


def places(part: Any) -> list[tuple[Any, Any]]:
    """Every container and key below `part`."""
    keys = part.keys() if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
    return [(part, key) for key in keys] + [place for key in keys for place in places(part[key])]


@settings(max_examples=600 if IN_NUMBERS else 60)
@given(st.data())
def test_a_damaged_description_is_damage_and_no_bug(data: st.DataObject) -> None:
    small = [section for section in sections("q35-10.0") if len(section[1]) < 10_000]
    description, payload = data.draw(st.sampled_from(small))
    forged = copy.deepcopy(description)
    for _ in range(data.draw(st.integers(1, 3))):
        where, key = data.draw(st.sampled_from(places(forged)))
        match data.draw(st.sampled_from(["change", "remove", "repeat"])):
            case "change":
                # What is drawn is changed later on; hypothesis keeps the original.
                where[key] = copy.deepcopy(data.draw(ODD))
            case "remove":
                del where[key]
            case "repeat" if isinstance(where, list):
                where.append(where[key])
        if not places(forged):
            return
    judged(forged, payload)


@settings(max_examples=200 if IN_NUMBERS else 50)
@given(st.data())
def test_a_damaged_text_is_damage_and_no_bug(data: st.DataObject) -> None:
    small = [section for section in sections("q35-7.2") if len(section[1]) < 10_000]
    description, payload = data.draw(st.sampled_from(small))
    text = bytearray(json.dumps(description).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        forged = parse_description(bytes(text))
    except Damaged:
        return
    judged(forged, payload)


@settings(max_examples=200 if IN_NUMBERS else 50)
@given(st.data())
def test_a_damaged_payload_still_has_all_its_facts_or_is_damage(data: st.DataObject) -> None:
    description, payload = data.draw(st.sampled_from(sections("q35-7.2")))
    changed = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, min(len(changed), 800) - 1))] = data.draw(st.integers(0, 255))
    judged(description, bytes(changed))


def judged(description: dict[str, Any], payload: bytes) -> None:
    """Either all is as it should be, or Damaged."""
    try:
        found = decode(description, payload)
    except Damaged as error:
        assert str(error).isprintable()
        return
    json.dumps(to_json(found)).encode()
    assert found.root and found.root.size <= len(payload)
    for look in (device_facts.vcpus, device_facts.nics, device_facts.pci, device_facts.runstate):
        look([found])
    device_facts.virtio(found)


def test_a_section_before_ram_that_is_not_described_is_shown_as_bytes() -> None:
    data = state("virtio-mem-10.0")
    mark, start = description_at_end(data) or (0, 0)
    description = json.loads(data[start:])
    early = description["devices"].pop(0)
    text = json.dumps(description).encode()
    whole = data[:mark] + constants.END.pack(0, 6, len(text)) + text
    part = validate(Pieces(whole)).parts[0]
    shown = decode_part(part)
    assert (shown.name, shown.instance, shown.root) == (early["name"], early["instance_id"], None)
    assert shown.raw == validate(Pieces(data)).parts[0].payload
    # Its footer is looked at all the same.
    at = data.index(early["name"].encode()) - 5
    with pytest.raises(Damaged, match="no footer of section"):
        validate(Pieces(whole[:at] + b"\xff" + whole[at + 1 :]))
