"""The bodies of RAM sections, as records and back (migration/ram.c: ram_save_setup, ram_save_page, ram_load_precopy).

A record begins with a word, the page's offset in its block with flags below the page size.  Records that differ only in
their offset lie at a fixed stride, so whole runs of them are taken at once; nothing here looks at a page by itself.
"""

import sys
from array import array
from collections.abc import Iterator
from itertools import compress, repeat
from operator import ne, sub

from ..errors import Damaged
from ..io.window import Window
from . import constants
from .records import Block, Blocks, EndOfBody, Packed, Pages, Record

# Records looked at first for a run; each time all of them belong to it, four times as many.
AHEAD = 8
# zlib's worst for a page
PACKED_LIMIT = 2
LEAST_HUGE, MOST_HUGE = 8 << 10, 1 << 40
ELSEWHERE = "the pages of this state are not in this stream (multifd, mapped-ram or RDMA)"
HINT = "save it without these: vm-dump does"


class Ram:
    """What is known of RAM while a stream is read: its blocks, the block of the last record, the size of a page."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self.page = 1 << constants.PAGE_BITS
        self.advised = False
        self.addresses = False
        self.blocks: dict[bytes, Block] = {}
        self._block: Block | None = None

    def body(self, beginning: bool) -> Iterator[Record]:
        """The records of one section up to its EndOfBody; `beginning`: of the section's START."""
        mask = self.page - 1
        if beginning:
            yield self._list(mask)
        while True:
            offset = self._window.offset
            word = self._u64("a record of RAM")
            flags = word & mask
            kind = flags & ~constants.RAM_SAVE_FLAG_CONTINUE
            if kind in (constants.RAM_SAVE_FLAG_PAGE, constants.RAM_SAVE_FLAG_ZERO):
                yield self._pages(offset, word, kind)
            elif word == constants.RAM_SAVE_FLAG_EOS:
                self._window.take(8)
                yield EndOfBody(offset=offset)
                return
            elif kind in (constants.RAM_SAVE_FLAG_XBZRLE, constants.RAM_SAVE_FLAG_COMPRESS_PAGE):
                yield self._packed(offset, word, kind)
            elif kind in (constants.RAM_SAVE_FLAG_MULTIFD_FLUSH, constants.RAM_SAVE_FLAG_HOOK):
                raise Damaged(f"{ELSEWHERE}: flag {kind:#x} at offset {offset}", HINT)
            else:
                raise Damaged(f"no record of RAM at offset {offset}: found {word:#018x}")

    def _list(self, mask: int) -> Blocks:
        offset = self._window.offset
        word = self._u64("the list of RAM blocks")
        if word & mask != constants.RAM_SAVE_FLAG_MEM_SIZE:
            raise Damaged(f"no list of RAM blocks at offset {offset}: found {word:#x}")
        self._window.take(8)
        left = total = word & ~mask
        while left:
            at = self._window.offset
            block = self._listed()
            left -= block.size
            if left < 0 or not block.size or not block.name or block.name in self.blocks:
                text = f"{block.text!r} of {block.size} bytes does not fit the total, or is there twice"
                raise Damaged(f"list of RAM blocks at offset {at}: {text}")
            self.blocks[block.name] = block
        return Blocks(total, tuple(self.blocks.values()), offset=offset)

    def _listed(self) -> Block:
        what = "the list of RAM blocks"
        name = self._name(0, what)
        size = self._u64(what, 1 + len(name))
        end = 1 + len(name) + 8
        page_size = address = None
        # Only where it is not the usual one; what else could follow has another first byte, or is the end.
        if self.advised and LEAST_HUGE <= (found := self._u64(what, end)) <= MOST_HUGE:
            page_size, end = found, end + 8
        if self.addresses:
            address, end = self._u64(what, end), end + 8
        self._window.take(end)
        return Block(name, size, page_size, address)

    def _pages(self, offset: int, word: int, kind: int) -> Pages:
        zero = kind == constants.RAM_SAVE_FLAG_ZERO
        named, block, head = self._block_of(offset, word)
        stride = 8 + (1 if zero else self.page)
        self._bytes(head + stride - 8, "a page of RAM")
        view = self._window.have()
        flags = kind | constants.RAM_SAVE_FLAG_CONTINUE
        first = word & -self.page
        begin = head + stride - 8
        words = _following(view[begin:], stride, flags)
        runs = _runs(first, words, self.page, flags)
        for start, pages in runs:
            self._check(offset, block, start, pages)
        raw = view[: begin + len(words) * stride]
        if zero and bytes(raw)[head::stride].strip(b"\0"):
            raise Damaged(f"a page at offset {offset} or behind it is of one byte that is not zero")
        self._window.take(len(raw))
        return Pages(block, zero, named, runs, self.page, raw, offset=offset)

    def _packed(self, offset: int, word: int, flag: int) -> Packed:
        named, block, head = self._block_of(offset, word)
        address = word & -self.page
        self._check(offset, block, address, 1)
        if flag == constants.RAM_SAVE_FLAG_XBZRLE:
            found = self._bytes(head + 3, "a delta of a page")
            coding, size = found[head], int.from_bytes(found[head + 1 :], "big")
            if coding != constants.ENCODING_FLAG_XBZRLE or size > self.page:
                raise Damaged(f"delta of a page at offset {offset}: found encoding {coding}, {size} bytes")
            head += 3
        else:
            size = int.from_bytes(self._bytes(head + 4, "a packed page")[head:], "big")
            if size > PACKED_LIMIT * self.page:
                raise Damaged(f"packed page at offset {offset}: found {size} bytes")
            head += 4
        data = bytes(self._bytes(head + size, "a packed page")[head:])
        self._window.take(head + size)
        return Packed(block, flag, named, address, data, self.page, offset=offset)

    def _block_of(self, offset: int, word: int) -> tuple[bool, Block, int]:
        """Whether the record has its block's name, the block, and the size of word and name."""
        if word & constants.RAM_SAVE_FLAG_CONTINUE:
            if self._block is None:
                raise Damaged(f"page at offset {offset} continues a block, but there was none before it")
            return False, self._block, 8
        name = self._name(8, "the name of a RAM block")
        block = self.blocks.get(name)
        if block is None:
            raise Damaged(f"page at offset {offset} of an unknown RAM block {name!r}")
        self._block = block
        return True, block, 9 + len(name)

    def _check(self, offset: int, block: Block, address: int, pages: int) -> None:
        if address + (pages - 1) * self.page >= block.size:
            where = f"{address + (pages - 1) * self.page:#x} of RAM block {block.text!r}, which has {block.size:#x}"
            raise Damaged(f"page outside its block at offset {offset} or behind it: found {where}")

    def _bytes(self, count: int, what: str) -> memoryview:
        found = self._window.need(count)
        if found is None:
            raise Damaged(f"truncated at offset {self._window.came}, in {what}")
        return found

    def _u64(self, what: str, at: int = 0) -> int:
        return int.from_bytes(self._bytes(at + 8, what)[at:], "big")

    def _name(self, at: int, what: str) -> bytes:
        size = self._bytes(at + 1, what)[at]
        return bytes(self._bytes(at + 1 + size, what)[at + 1 :])


def _following(view: memoryview, stride: int, flags: int) -> "array[int]":
    """The words of the records with these flags at the start of `view`, as far as they are whole."""
    most, low = len(view) // stride, bytes((flags & 0xFF,))
    packed = bytearray()
    count, step = 0, AHEAD
    while count < most:
        end = min(most, count + step)
        found = _words(view[count * stride : end * stride], stride, end - count)
        kinds = found[7::8]
        same = len(kinds) - len(kinds.lstrip(low))
        packed += found[: 8 * same]
        count += same
        if same < len(kinds):
            break
        step *= 4
    words = array("Q", bytes(packed))
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _words(view: memoryview, stride: int, count: int) -> bytes:
    """The first eight bytes of each of `count` records."""
    if not stride % 8:
        # Each page is touched once; its words come as they are, whatever the order of this machine's bytes.
        return view.cast("Q")[:: stride // 8].tobytes()
    packed, data = bytearray(8 * count), bytes(view)
    for byte in range(8):
        packed[byte::8] = data[byte::stride]
    return bytes(packed)


def _runs(first: int, words: "array[int]", page: int, flags: int) -> tuple[tuple[int, int], ...]:
    """Address of the first and number of pages, of each run of neighbours; `first` is the address before `words`."""
    count = len(words)
    if not count:
        return ((first, 1),)
    start = first + page + flags
    if start + count * page < 1 << 64 and words == array("Q", range(start, start + count * page, page)):
        return ((first, count + 1),)
    steps = [words[0] - first - flags, *map(sub, words[1:], words)]
    # Where a run begins, among all pages
    begins = [0, *compress(range(1, count + 1), map(ne, steps, repeat(page)))]
    runs = []
    for begin, end in zip(begins, [*begins[1:], count + 1], strict=True):
        address = words[begin - 1] - flags if begin else first
        if address % page:
            raise Damaged(f"no record of RAM behind the page at {first:#x}: found {words[begin - 1]:#018x}")
        runs.append((address, end - begin))
    return tuple(runs)
