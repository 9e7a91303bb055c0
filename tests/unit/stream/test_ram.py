"""Made bodies of RAM sections, and which pages they cover."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.errors import Damaged
from vmstate.io.window import Window
from vmstate.stream import constants
from vmstate.stream.page_map import AGAIN, CHUNK, NORMAL, UNSENT, ZERO, PageMap
from vmstate.stream.ram import Ram
from vmstate.stream.records import Block, Blocks, EndOfBody, Packed, Pages, Record
from vmstate.stream.writer import encode

from unit.streams import Pieces

PAGE = 4096
NEAR, FAR = Block(b"near", 64 * PAGE), Block(b"far away", 1024 * PAGE)
EOS = constants.U64.pack(constants.RAM_SAVE_FLAG_EOS)
CONTENT = bytes(range(1, 256)) * 16 + bytes(16)
Z, P, C = constants.RAM_SAVE_FLAG_ZERO, constants.RAM_SAVE_FLAG_PAGE, constants.RAM_SAVE_FLAG_CONTINUE
XBZRLE, COMPRESS = constants.RAM_SAVE_FLAG_XBZRLE, constants.RAM_SAVE_FLAG_COMPRESS_PAGE


def word(number: int, flags: int, name: bytes = b"") -> bytes:
    """The word of page `number`, and the name of its block where it is not continued."""
    if flags & C:
        return constants.U64.pack(number * PAGE | flags)
    return constants.U64.pack(number * PAGE | flags) + bytes((len(name),)) + name


def zero(number: int, name: bytes = b"") -> bytes:
    return word(number, Z if name else Z | C, name) + b"\0"


def plain(number: int, name: bytes = b"", content: bytes = CONTENT) -> bytes:
    return word(number, P if name else P | C, name) + content


def ram_of(body: bytes, blocks: tuple[Block, ...] = (NEAR, FAR), piece: int = 1 << 30) -> Ram:
    ram = Ram(Window(Pieces(body, piece)))
    ram.blocks = {block.name: block for block in blocks}
    return ram


def read(body: bytes, piece: int = 1 << 30) -> list[Record]:
    """The records of a body, each of which the writer makes of the same bytes."""
    found, at = [], 0
    for record in ram_of(body, piece=piece).body(False):
        assert record.offset == at
        assert encode(record) == body[at : at + len(encode(record))]
        at += len(encode(record))
        found.append(record)
    assert at == len(body)
    assert isinstance(found.pop(), EndOfBody)
    return found


def runs(body: bytes) -> list[tuple[bytes, bool, tuple[tuple[int, int], ...]]]:
    """Block, whether zero, runs by page number, of each record."""
    return [
        (record.block.name, record.zero, tuple((address // PAGE, count) for address, count in record.runs))
        for record in read(body)
        if isinstance(record, Pages)
    ]


def damage(body: bytes, beginning: bool = False, **kwargs: tuple[Block, ...]) -> str:
    with pytest.raises(Damaged) as raised:
        list(ram_of(body, **kwargs).body(beginning))
    return str(raised.value)


def test_an_empty_body() -> None:
    assert read(EOS) == []


@pytest.mark.parametrize("count", [1, 7, 8, 9, 39, 40, 41, 455, 456, 457, 1000])
def test_a_run_of_zero_pages(count: int) -> None:
    """Around the lengths at which it is looked at."""
    body = zero(1, b"far away") + b"".join(zero(number) for number in range(2, count + 1)) + EOS
    # What has a name stands first; those that continue the block are of its run.
    assert runs(body) == [(b"far away", True, ((1, count),))]


@pytest.mark.parametrize("count", [1, 8, 9, 63])
def test_a_run_of_pages(count: int) -> None:
    contents = [bytes((number,)) * PAGE for number in range(count)]
    body = plain(0, b"near", contents[0]) + b"".join(plain(n, b"", contents[n]) for n in range(1, count)) + EOS
    (record,) = read(body)
    assert isinstance(record, Pages)
    assert (record.count, record.runs) == (count, ((0, count),))


def test_where_the_content_is() -> None:
    """`first` and `stride` lead to each page's bytes."""
    contents = [bytes((number,)) * PAGE for number in (1, 2, 3)]
    body = plain(5, b"near", contents[0]) + plain(9, b"", contents[1]) + plain(4, b"", contents[2]) + EOS
    for record in ram_of(body).body(False):
        if isinstance(record, Pages):
            places = [record.first + number * record.stride for number in range(record.count)]
            assert [record.raw[at : at + PAGE] for at in places] == contents
            assert record.runs == ((5 * PAGE, 1), (9 * PAGE, 1), (4 * PAGE, 1))


def test_zero_and_plain_in_turn_and_another_block() -> None:
    body = zero(0, b"near") + plain(1) + plain(2) + zero(3) + zero(7, b"far away") + zero(8) + plain(0, b"near") + EOS
    assert runs(body) == [
        (b"near", True, ((0, 1),)),
        (b"near", False, ((1, 2),)),
        (b"near", True, ((3, 1),)),
        (b"far away", True, ((7, 2),)),
        (b"near", False, ((0, 1),)),
    ]


@given(st.lists(st.tuples(st.integers(0, 63), st.booleans(), st.booleans()), min_size=1), st.integers(1, 9000))
def test_any_order(pages: list[tuple[int, bool, bool]], piece: int) -> None:
    """Every page comes out in the order in which it went in, whatever the pieces in which it is read."""
    body = b""
    for at, (number, is_zero, named) in enumerate(pages):
        body += (zero if is_zero else plain)(number, b"near" if named or at == 0 else b"")
    found = [
        (number, record.zero)
        for record in read(body + EOS, piece)
        if isinstance(record, Pages)
        for address, count in record.runs
        for number in range(address // PAGE, address // PAGE + count)
    ]
    assert found == [(number, is_zero) for number, is_zero, _ in pages]


def test_other_pages_than_of_4_kib() -> None:
    body = constants.U64.pack(3 << 16 | Z) + b"\4near\0" + constants.U64.pack(2 << 16 | P | C) + bytes(1 << 16) + EOS
    ram = ram_of(body)
    ram.page = 1 << 16
    first, second, _ = ram.body(False)
    assert isinstance(first, Pages) and isinstance(second, Pages)
    assert (first.runs, second.runs, second.stride) == (((3 << 16, 1),), ((2 << 16, 1),), 8 + (1 << 16))


def test_packed_pages() -> None:
    delta = word(3, XBZRLE, b"near") + b"\1" + constants.U16.pack(3) + b"abc"
    packed = word(4, COMPRESS | C) + constants.U32.pack(2) + b"xy"
    assert read(delta + packed + EOS) == [
        Packed(NEAR, XBZRLE, True, 3 * PAGE, b"abc", offset=0),
        Packed(NEAR, COMPRESS, False, 4 * PAGE, b"xy", offset=len(delta)),
    ]


def test_a_block_goes_on_in_the_next_section() -> None:
    ram = ram_of(zero(1, b"near") + EOS + zero(2) + EOS)
    assert [len(list(ram.body(False))) for _ in range(2)] == [2, 2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            zero(64, b"near"),
            "page outside its block at offset 0 .*: found 0x40000 of RAM block 'near', which has 0x40000",
        ),
        (zero(62, b"near") + zero(63) + zero(64), "page outside its block at offset 0 or behind it: found 0x40000"),
        (plain(1 << 51, b"near"), "page outside its block at offset 0 or behind it: found 0x8000000000000"),
        (word(64, XBZRLE, b"near"), "page outside its block at offset 0 "),
        (word(64, COMPRESS, b"near"), "page outside its block at offset 0 "),
        (zero(0, b"nea"), "page at offset 0 of an unknown RAM block b'nea'"),
        (zero(0, b"\xff\x00"), r"page at offset 0 of an unknown RAM block b'\\xff\\x00'"),
        (zero(0), "page at offset 0 continues a block, but there was none before it"),
        (word(0, XBZRLE | C), "page at offset 0 continues a block, but there was none before it"),
        (zero(0, b"near")[:-1] + b"\1", "a page at offset 0 or behind it is of one byte that is not zero"),
        (zero(0, b"near") + zero(1)[:-1] + b"\1", "a page at offset 0 or behind it is of one byte that is not zero"),
        (constants.U64.pack(0), "no record of RAM at offset 0: found 0x0000000000000000"),
        (constants.U64.pack(Z | P), "no record of RAM at offset 0: found 0x000000000000000a"),
        (constants.U64.pack(PAGE | 0x10), "no record of RAM at offset 0: found 0x0000000000001010"),
        (constants.U64.pack(0x30), "no record of RAM at offset 0: found 0x0000000000000030"),
        (constants.U64.pack(0x400), "no record of RAM at offset 0: found 0x0000000000000400"),
        (constants.U64.pack(0x200), r"pages of this state are not in this stream .*: flag 0x200 at offset 0"),
        (constants.U64.pack(0x80), r"pages of this state are not in this stream .*: flag 0x80 at offset 0"),
        (
            zero(0, b"near") + constants.U64.pack(PAGE | 0x122) + bytes(9),
            "no record of RAM .*: found 0x0000000000001122",
        ),
        (word(0, XBZRLE, b"near") + b"\2\0\1x", "delta of a page at offset 0: found encoding 2, 1 bytes"),
        (word(0, XBZRLE, b"near") + b"\1\x10\1", "delta of a page at offset 0: found encoding 1, 4097 bytes"),
        (word(0, COMPRESS, b"near") + constants.U32.pack(8193), "packed page at offset 0: found 8193 bytes"),
        (word(0, COMPRESS, b"near") + b"\xff\xff\xff\xff", "packed page at offset 0: found 4294967295 bytes"),
        (zero(0, b"near"), "truncated at offset 14, in a record of RAM"),
        (plain(0, b"near")[:-1], "truncated at offset 4108, in a page of RAM"),
        (word(0, P, b"near")[:10], "truncated at offset 10, in the name of a RAM block"),
        (word(0, XBZRLE, b"near") + b"\1\0\5abcd", "truncated at offset 20, in a packed page"),
    ],
)
def test_a_wrong_record(body: bytes, words: str) -> None:
    with pytest.raises(Damaged, match=words):
        read(body + (b"" if words.startswith("truncated") else EOS))


def test_456_zero_pages_taken_for_one_that_is_plain() -> None:
    """4104 bytes are 456 zero pages or one plain one: only that pages are missing then tells of the changed flag."""
    body = bytearray(zero(0, b"far away") + b"".join(zero(number) for number in range(1, 1024)) + EOS)
    at = len(zero(0, b"far away")) + 10 * 9
    body[at + 7] ^= Z ^ P
    found = PageMap(FAR, PAGE)
    for record in ram_of(bytes(body)).body(False):
        if isinstance(record, Pages):
            for address, count in record.runs:
                found.mark(address, count, record.zero)
    assert (found.covered, found.first_unsent()) == (1024 - 455, 12 * PAGE)


# The list of blocks


def listed(total: int, *blocks: Block, end: bytes = EOS) -> bytes:
    return encode(Blocks(total, blocks)) + end


@pytest.mark.parametrize(("huge", "address"), [(None, None), (2 << 20, None), (None, 1 << 32)])
def test_a_list(huge: int | None, address: int | None) -> None:
    blocks = (Block(b"a", 3 * PAGE, huge, address), Block(b"b", 5 * PAGE, None, address))
    ram = ram_of(listed(8 * PAGE, *blocks), ())
    ram.advised, ram.addresses = huge is not None, address is not None
    assert next(ram.body(True)) == Blocks(8 * PAGE, blocks)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (listed(64 * PAGE, NEAR, NEAR), "no record of RAM at offset 21"),
        (listed(128 * PAGE, NEAR, NEAR), "list of RAM blocks at offset 21: 'near' of 262144 bytes .*twice"),
        (listed(65 * PAGE, NEAR, end=EOS + b"\0"), "list of RAM blocks at offset 21: '' of"),
        (listed(63 * PAGE, NEAR), "list of RAM blocks at offset 8: 'near' of 262144 bytes does not fit the total"),
        (listed(PAGE, Block(b"near", 0)), "list of RAM blocks at offset 8: 'near' of 0 bytes"),
        (listed(PAGE, Block(b"", PAGE)), "list of RAM blocks at offset 8: '' of 4096 bytes"),
        (listed(PAGE, Block(b"n", (1 << 64) - 1)), "list of RAM blocks at offset 8: 'n' of 18446744073709551615"),
        (EOS, "no list of RAM blocks at offset 0: found 0x10"),
        (listed(64 * PAGE, NEAR, end=b"")[:-1], "truncated at offset 20, in the list of RAM blocks"),
    ],
)
def test_a_wrong_list(body: bytes, words: str) -> None:
    with pytest.raises(Damaged, match=words):
        list(ram_of(body, ()).body(True))


# Which pages there are


def test_nothing_was_sent() -> None:
    found = PageMap(Block(b"x", 3 * PAGE), PAGE)
    assert (found.covered, found.again, found.first_unsent()) == (0, 0, 0)
    assert found.kinds() == bytes((UNSENT,)) * 3
    assert found.count() == {"zero": 0, "normal": 0, "unsent": 3, "rewritten": 0}


def test_sent_again() -> None:
    """The last one counts."""
    found = PageMap(Block(b"x", 4 * PAGE), PAGE)
    found.mark(0, 3, False)
    found.mark(PAGE, 1, True)
    found.mark(2 * PAGE, 1, False)
    assert list(found.kinds()) == [NORMAL, ZERO | AGAIN, NORMAL | AGAIN, UNSENT]
    assert (found.covered, found.again, found.first_unsent()) == (3, 2, 3 * PAGE)
    assert [found.sent(number * PAGE) for number in range(4)] == [True, True, True, False]
    assert found.count() == {"zero": 1, "normal": 2, "unsent": 1, "rewritten": 2}


def test_a_size_that_is_no_multiple_of_a_page() -> None:
    found = PageMap(Block(b"x", 2 * PAGE + 1), PAGE)
    found.mark(0, 2, True)
    assert (found.pages, found.first_unsent()) == (3, 2 * PAGE)


def test_a_huge_block_costs_what_was_sent_of_it() -> None:
    """A forged list can say 8 EiB."""
    found = PageMap(Block(b"x", 1 << 63), PAGE)
    found.mark((1 << 62), 1, True)
    assert (found.covered, found.first_unsent(), found.sent(1 << 61)) == (1, 0, False)


@given(
    st.integers(1, 3 * CHUNK),
    st.lists(st.tuples(st.integers(0, 3 * CHUNK), st.integers(1, CHUNK + 9), st.booleans()), max_size=8),
)
def test_as_one_would_count_them(pages: int, marks: list[tuple[int, int, bool]]) -> None:
    """Against a plain list, over the edges of the chunks."""
    found, plain_list, again = PageMap(Block(b"x", pages * PAGE), PAGE), [UNSENT] * pages, 0
    for begin, length, is_zero in marks:
        at, stop = min(begin, pages - 1), min(pages, begin + length)
        if at >= stop:
            continue
        found.mark(at * PAGE, stop - at, is_zero)
        for number in range(at, stop):
            again += plain_list[number] != UNSENT
            plain_list[number] = (ZERO if is_zero else NORMAL) | (AGAIN if plain_list[number] else 0)
    assert found.kinds() == bytes(plain_list)
    assert (found.covered, found.again) == (pages - plain_list.count(UNSENT), again)
    assert found.first_unsent() == (plain_list.index(UNSENT) * PAGE if UNSENT in plain_list else None)
    normal, twice = (sum(kind & flag != 0 for kind in plain_list) for flag in (NORMAL, AGAIN))
    counts = {"zero": found.covered - normal, "normal": normal, "unsent": plain_list.count(UNSENT)}
    assert found.count() == {**counts, "rewritten": twice}
