"""What QEMU is told that loads in postcopy, and what it says, without a QEMU."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams.walk import Walk
from vmstate.errors import CannotDo
from vmstate.restore.postcopy import BITMAP_END, BITMAP_LIMIT, NoIndex, NotLazy, Opening, ReturnPath, Said, opening_of
from vmstate.stream import constants
from vmstate.vmz.state_file import RawFile

from unit.streams import GOOD, state

# Those that can only be restored as a whole, and why.
WHOLE = {
    "bitmaps": "holds more than RAM and devices",
    "block": "holds more than RAM and devices",
    "compress": "differences .xbzrle. or packed",
    "xbzrle": "differences .xbzrle. or packed",
    "ignore-shared": "not in it .x-ignore-shared",
}
LAZY = [name for name in GOOD if name.rpartition("-")[0] not in WHOLE]
ADVISED = [constants.MIG_CMD_OPEN_RETURN_PATH, constants.MIG_CMD_POSTCOPY_ADVISE]
PACKAGE = [constants.MIG_CMD_PACKAGED, constants.MIG_CMD_POSTCOPY_LISTEN, constants.MIG_CMD_POSTCOPY_RUN]


def file_of(folder: Path, data: bytes) -> io.FileIO:
    path = folder / "s"
    path.write_bytes(data)
    return path.open("rb", buffering=0)


def opening(folder: Path, name: str) -> Opening:
    with file_of(folder, state(name)) as file:
        return opening_of(RawFile(file.fileno()))


# What it is told


@pytest.mark.parametrize("name", LAZY)
def test_the_opening_of_every_state(name: str, tmp_path: Path) -> None:
    """Read by the tests' own reader: the state's head and blocks, one discard for each, the devices in a package."""
    whole, found = Walk(state(name)), opening(tmp_path, name)
    walk = Walk(found.stream() + found.closing())
    assert walk.machine == whole.machine
    assert walk.configuration == whole.configuration
    assert walk.blocks == whole.blocks
    assert (walk.parts, walk.ended, walk.flags) == (1, True, {})
    assert walk.early == whole.early
    told = [number for number, _ in walk.commands]
    discards = [constants.MIG_CMD_POSTCOPY_RAM_DISCARD] * len(whole.blocks)
    knows = constants.MIG_CMD_SWITCHOVER_START in [number for number, _ in whole.commands]
    assert told == ADVISED + discards + [constants.MIG_CMD_SWITCHOVER_START] * knows + PACKAGE
    assert [data for number, data in walk.commands if number == constants.MIG_CMD_POSTCOPY_RAM_DISCARD] == [
        b"\0" + bytes((len(block),)) + block.encode() + b"\0" + bytes(8) + size.to_bytes(8, "big")
        for block, size in whole.blocks.items()
    ]


@pytest.mark.parametrize("name", LAZY)
def test_the_devices_are_those_of_the_state(name: str, tmp_path: Path) -> None:
    """Everything between the end of RAM and the end mark, byte by byte."""
    from streams.walk import describing

    data, found = state(name), opening(tmp_path, name)
    end = describing(data)
    assert end is not None
    assert data[end - len(found.devices) : end] == found.devices
    before = data[end - len(found.devices) - 5 : end - len(found.devices)]
    switchover = constants.COMMAND.pack(constants.QEMU_VM_COMMAND, constants.MIG_CMD_SWITCHOVER_START, 0)
    after_ram = constants.FOOTER.pack(constants.QEMU_VM_SECTION_FOOTER, found.number)
    assert before in (after_ram, switchover) or found.devices.startswith(b"\4")


@pytest.mark.parametrize("name", [name for name in GOOD if name not in LAZY])
def test_what_can_only_be_restored_as_a_whole(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotLazy, match=WHOLE[name.rpartition("-")[0]]) as caught:
        opening(tmp_path, name)
    assert caught.value.status == 1


class _Bare:
    facts = None


def test_a_file_without_an_index() -> None:
    with pytest.raises(NoIndex, match="has no index"):
        opening_of(_Bare())  # type: ignore[arg-type]


# What it says


def message(said: Said, named: bool) -> bytes:
    """As QEMU sends it; named: with the block, else the last one goes on."""
    number = constants.U16.pack
    match said.kind:
        case constants.MIG_RP_MSG_RECV_BITMAP:
            head = number(said.kind) + number(1 + len(said.block)) + bytes((len(said.block),)) + said.block
            return head + constants.U64.pack(len(said.bitmap)) + said.bitmap + constants.U64.pack(BITMAP_END)
        case constants.MIG_RP_MSG_REQ_PAGES_ID | constants.MIG_RP_MSG_REQ_PAGES:
            what = constants.U64.pack(said.start) + constants.U32.pack(said.size)
            if not named:
                return number(constants.MIG_RP_MSG_REQ_PAGES) + number(12) + what
            what += bytes((len(said.block),)) + said.block
            return number(constants.MIG_RP_MSG_REQ_PAGES_ID) + number(len(what)) + what
    return number(said.kind) + number(4) + constants.U32.pack(said.value)


BLOCK = st.binary(min_size=1, max_size=255)
NUMBER = st.integers(0, (1 << 32) - 1)
SAID = st.one_of(
    NUMBER.map(lambda value: Said(constants.MIG_RP_MSG_SHUT, value=value)),
    NUMBER.map(lambda value: Said(constants.MIG_RP_MSG_RESUME_ACK, value=value)),
    st.tuples(BLOCK, st.binary(max_size=600)).map(
        lambda made: Said(constants.MIG_RP_MSG_RECV_BITMAP, made[0], bitmap=made[1])
    ),
    st.tuples(BLOCK, st.integers(0, (1 << 64) - 1), NUMBER).map(
        lambda made: Said(constants.MIG_RP_MSG_REQ_PAGES_ID, *made)
    ),
)


@given(st.lists(SAID, max_size=20), st.lists(st.integers(1, 700), min_size=1))
def test_in_pieces_of_any_size(wanted: list[Said], sizes: list[int]) -> None:
    data, block = b"", b""
    expected: list[Said] = []
    for said in wanted:
        named = said.block != block
        if said.kind == constants.MIG_RP_MSG_REQ_PAGES_ID:
            block = said.block
            kind = said.kind if named else constants.MIG_RP_MSG_REQ_PAGES
            expected.append(Said(kind, said.block, said.start, said.size))
        else:
            expected.append(said)
        data += message(said, named)
    path, found = ReturnPath(), []
    for piece in pieces(data, sizes):
        found += list(path.feed(piece))
    assert found == expected


def pieces(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    at, number = 0, 0
    while at < len(data):
        yield data[at : at + sizes[number % len(sizes)]]
        at += sizes[number % len(sizes)]
        number += 1


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_bytes_are_understood_or_refused(parts: list[bytes]) -> None:
    path = ReturnPath()
    try:
        for part in parts:
            list(path.feed(part))
    except CannotDo as error:
        assert "strange" in str(error)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\3\xff\xff", "message 3 of 65535 bytes"),
        (b"\0\5\0\2\1x" + constants.U64.pack(BITMAP_LIMIT + 1), "a bitmap of"),
        (b"\0\5\0\2\1x" + constants.U64.pack(8) + bytes(16), "without its end"),
    ],
)
def test_what_makes_no_sense(data: bytes, words: str) -> None:
    with pytest.raises(CannotDo, match=words):
        list(ReturnPath().feed(data))
