"""What became of each page of a RAM block in a stream: never sent, zero, normal; sent again.

One byte a page, in chunks that exist only where a page was sent, so that a block costs what was sent of it and not what
a list of blocks says of its size.
"""

from .records import Block

UNSENT, ZERO, NORMAL, AGAIN = 0, 1, 2, 4
CHUNK = 1 << 11
# What a page becomes that is sent (again) as zero or normal
_BECOMES = {value: bytes((value,)) + bytes((value | AGAIN,)) * 255 for value in (ZERO, NORMAL)}


class PageMap:
    """The pages of `block`; `covered` counts those that were sent, `again` those records that sent a page once more."""

    def __init__(self, block: Block, page: int) -> None:
        self.block = block
        self.page = page
        self.pages = -(-block.size // page)
        self.covered = 0
        self.again = 0
        self._chunks: dict[int, bytearray] = {}

    @property
    def held(self) -> int:
        """Bytes of memory, about."""
        return len(self._chunks) * CHUNK

    def mark(self, address: int, count: int, zero: bool) -> None:
        """`count` pages from `address` on are in the stream now."""
        becomes = _BECOMES[ZERO if zero else NORMAL]
        at, end = address // self.page, address // self.page + count
        while at < end:
            number, begin = divmod(at, CHUNK)
            stop = min(CHUNK, begin + end - at)
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._chunks[number] = bytearray(CHUNK)
            fresh = chunk.count(0, begin, stop)
            self.covered += fresh
            self.again += stop - begin - fresh
            chunk[begin:stop] = chunk[begin:stop].translate(becomes)
            at += stop - begin

    def sent(self, address: int) -> bool:
        """Whether the page at `address` has been sent."""
        number, at = divmod(address // self.page, CHUNK)
        return number in self._chunks and self._chunks[number][at] != UNSENT

    def first_unsent(self) -> int | None:
        """The address of the first page that was not sent."""
        for number in range(-(-self.pages // CHUNK)):
            chunk = self._chunks.get(number)
            at = 0 if chunk is None else chunk.find(0)
            if at >= 0 and number * CHUNK + at < self.pages:
                return (number * CHUNK + at) * self.page
        return None

    def kinds(self, first: int = 0, count: int | None = None) -> bytes:
        """A byte for each page from `first` on, at most `count`: UNSENT, ZERO or NORMAL, with AGAIN where it was sent
        more than once."""
        empty = bytes(CHUNK)
        end = self.pages if count is None else min(self.pages, first + count)
        numbers = range(first // CHUNK, -(-end // CHUNK))
        found = b"".join(bytes(self._chunks.get(number, empty)) for number in numbers)
        return found[first % CHUNK :][: end - first]

    def count(self) -> dict[str, int]:
        """Pages by what they are at the end of the stream; rewritten: those of them that were sent more than once."""
        normal = sum(chunk.count(NORMAL) + chunk.count(NORMAL | AGAIN) for chunk in self._chunks.values())
        again = sum(chunk.count(ZERO | AGAIN) + chunk.count(NORMAL | AGAIN) for chunk in self._chunks.values())
        values = {"zero": self.covered - normal, "normal": normal}
        return {**values, "unsent": self.pages - self.covered, "rewritten": again}
