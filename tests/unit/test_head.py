"""The head of a state, from real ones and from what is made wrong in them."""

import pytest
from vmstate import layout
from vmstate.errors import Damaged
from vmstate.head import MoreNeeded, parse
from vmstate.relay import without_return_path

from unit.streams import NAMES, state


@pytest.mark.parametrize("name", NAMES)
def test_a_real_head(name: str) -> None:
    head = parse(state(name)[:4096])
    assert head.machine == f"pc-{name}"
    assert head.capabilities == ()
    assert dict(head.blocks)["pc.ram"] == 4 << 20
    assert dict(head.blocks)["pc.bios"] == 256 << 10
    assert head.commands == ()
    assert head.end == 13 + len(head.machine)


@pytest.mark.parametrize("name", NAMES)
def test_every_shorter_piece_asks_for_more(name: str) -> None:
    whole = state(name)[:4096]
    last = max(whole.find(b"/rom@etc/acpi/rsdp") + len("/rom@etc/acpi/rsdp") + 8, 0)
    for size in range(last):
        with pytest.raises(MoreNeeded):
            parse(whole[:size])
    assert parse(whole[:last]) == parse(whole)


@pytest.mark.parametrize(
    ("at", "wrong", "words"),
    [
        (0, b"GEVM", "no state of a guest: expected 'QEVM' at offset 0, found b'GEVM'"),
        (0, b"\x1f\x8b\x08\x00", "no state of a guest"),
        (4, b"\0\0\0\2", "unknown version at offset 4: expected 3, found 2"),
        (8, b"\1", "no configuration at offset 8: expected tag 0x07, found 0x01"),
        (9, b"\0\1\0\0", "name of machine at offset 9: expected at most 255 bytes, found 65536"),
        (23, b"\x55", "no section at offset 23: expected tag 0x01 or 0x04, found 0x55"),
    ],
)
def test_what_is_refused(at: int, wrong: bytes, words: str) -> None:
    data = state("q35-7.2")[:4096]
    with pytest.raises(Damaged, match="^" + words.replace("(", r"\(")):
        parse(data[:at] + wrong + data[at + len(wrong) :])


def test_blocks_that_do_not_add_up() -> None:
    data = state("q35-7.2")[:4096]
    at = data.find(b"\x06pc.ram") + 7
    with pytest.raises(Damaged, match="'pc.ram' of 8589934592 bytes does not fit the total"):
        parse(data[:at] + (8 << 30).to_bytes(8, "big") + data[at + 8 :])
    with pytest.raises(Damaged, match="'pc.ram' of 0 bytes"):
        parse(data[:at] + bytes(8) + data[at + 8 :])


def subsection(name: str, payload: bytes) -> bytes:
    return bytes([layout.QEMU_VM_SUBSECTION, len(name)]) + name.encode() + bytes([0, 0, 0, 1]) + payload


def test_subsections_of_the_configuration() -> None:
    data = state("q35-7.2")[:4096]
    known = subsection("configuration/target-page-bits", bytes([0, 0, 0, 12]))
    known += subsection("configuration/capabilities", bytes([0, 0, 0, 1, 10]) + b"mapped-ram")
    known += subsection("configuration/uuid", bytes(16))
    head = parse(data[:23] + known + data[23:])
    assert head.capabilities == ("mapped-ram",)
    assert head.end == 23 + len(known)
    with pytest.raises(Damaged, match="unknown part of the configuration at offset 23: 'configuration/new'"):
        parse(data[:23] + subsection("configuration/new", b"") + data[23:])


def test_a_head_without_end_is_refused_soon() -> None:
    """Names that never stop must not fill the memory."""
    from vmstate.head import ENOUGH
    from vmstate.relay import read_head

    class Endless:
        came = 0

        def readinto(self, view: memoryview) -> int:
            count = min(len(view), 4096)
            view[:count] = (start + bytes(count))[:count] if self.came == 0 else bytes(count)
            self.came += count
            return count

    start = state("q35-7.2")[:23] + subsection("configuration/capabilities", b"\xff\xff\xff\xff")
    source = Endless()
    with pytest.raises(Damaged, match="no end of the state's head"):
        read_head(source)
    assert source.came < 8 * ENOUGH


def command(number: int, payload: bytes = b"") -> bytes:
    return layout.COMMAND.pack(layout.QEMU_VM_COMMAND, number, len(payload)) + payload


@pytest.mark.parametrize("others", [b"", command(3, bytes(16))])
def test_the_return_path_is_taken_out_and_nothing_else(others: bytes) -> None:
    plain = state("q35-10.0")[:4096]
    at = parse(plain).end
    asked = command(layout.MIG_CMD_OPEN_RETURN_PATH) + others + command(layout.MIG_CMD_PING, bytes([0, 0, 0, 1]))
    data = plain[:at] + asked + plain[at:]
    assert len(asked) - len(others) == 14
    head = parse(data)
    assert [c.size for c in head.commands] == ([5, 21, 9] if others else [5, 9])
    assert without_return_path(head, data) == plain[:at] + others + plain[at:]
