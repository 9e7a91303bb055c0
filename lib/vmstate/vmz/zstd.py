"""zstd: frames there and back, and the proof that a file of them is whole.  The home of zstandard.

Nothing here takes a cut, a changed byte or something behind the end for a regular end, and nothing holds more than a
few blocks and one window, however large a file unpacks.
"""

import contextlib
import functools
import struct
from collections.abc import Callable, Generator

from ..errors import Damaged
from ..io.descriptors import BLOCK, memory
from ..io.readers import Reader

# RFC 8878, 3.1: frames, and blocks in them
FRAME = 0xFD2FB528
SKIPPABLE = 0x184D2A50
RLE_BLOCK, RESERVED_BLOCK = 1, 3
BLOCK_LIMIT = 128 << 10
CONTENT_SIZE_FIELD = (0, 2, 4, 8)
DICTIONARY_FIELD = (0, 1, 2, 4)
# What `zstd -d` takes without being asked for more.
WINDOW = 128 << 20
# Measured on guests' RAM in frames of 192 KiB: 0.2 to 0.7 % smaller than with what level 1 has for that size (hash_log
# 14) and 2 % slower; with min_match 5 it is 0.3 to 0.8 % smaller yet, but 4 to 6 % slower.
TUNED = {1: {"hash_log": 15, "min_match": 6}}


def packer(level: int, size: int) -> "tuple[Callable[[memoryview], bytes], int]":
    """What makes a frame, with its size and its checksum, of up to `size` bytes; and how much memory it needs.

    One for each thread: it cannot do two at once.
    """
    import zstandard

    _keep_memory()
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, source_size=size, write_checksum=True, write_content_size=True, **TUNED.get(level, {})
    )
    made = zstandard.ZstdCompressor(compression_params=parameters)
    return made.compress, parameters.estimated_compression_context_size()


def unpacker() -> Callable[[bytes | memoryview, int, int], bytes]:
    """What gives the content of one frame that has its size; of the file, the frame's offset is for messages.

    Damaged where it is not exactly one frame of so many bytes.  One for each thread.
    """
    import zstandard

    _keep_memory()
    made = zstandard.ZstdDecompressor(max_window_size=WINDOW)

    def unpack(frame: bytes | memoryview, size: int, offset: int) -> bytes:
        try:
            # What it says itself is believed only where it is what was expected: it could be any size.
            if content_size(frame) != size or not zstandard.get_frame_parameters(frame).has_checksum:
                raise Damaged(f"frame at offset {offset} is not of {size} bytes with a checksum, as was expected")
            return made.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Damaged(f"corrupt frame at offset {offset}: {_words(error)}") from error

    return unpack


@functools.cache
def _keep_memory() -> None:
    """Have the C library keep what is freed: measured, a third of the time went into getting pages anew."""
    import ctypes

    m_trim_threshold, m_mmap_threshold, much = -1, -3, 1 << 30
    with contextlib.suppress(OSError, AttributeError):
        for name in (m_trim_threshold, m_mmap_threshold):
            ctypes.CDLL(None).mallopt(name, much)


def content_size(frame: bytes | memoryview) -> int:
    """What a frame says of its content, in bytes; -1 where it says nothing."""
    import zstandard

    try:
        size = zstandard.get_frame_parameters(frame).content_size
    except zstandard.ZstdError:
        return -1
    return -1 if size >= zstandard.CONTENTSIZE_ERROR else size


def skippable(number: int, content: bytes) -> bytes:
    """A frame that zstd passes by (RFC 8878, 3.1.2); `number` 0 to 15."""
    return struct.pack("<II", SKIPPABLE + number, len(content)) + content


def _words(error: Exception) -> str:
    words = str(error)
    for head in ("zstd decompress error: ", "decompression error: "):
        words = words.removeprefix(head)
    return words


class Frames:
    """A zstd file on its way to the library, frame by frame, and the proof that it ends where a frame ends.

    The library takes a cut for an end, so the structure of the file is followed beside it.  `start` is the offset of
    the frame that `read` gave from last.
    """

    def __init__(self, source: Reader, offset: int = 0) -> None:
        self._source = source
        self._buffer = memory(BLOCK)
        self._rest = self._buffer[:0]
        self._seen = b""
        self._base = offset
        self._offset = offset
        self._frame = offset
        self._part = ""
        self.start = offset
        self._steps = self._file()
        self._need, self._shown = next(self._steps)

    def read(self, _size: int = -1) -> memoryview:
        """The next bytes, of one frame only; none at the proven end."""
        fresh = self._frame == self._offset
        self._refill(4 if fresh else 1)
        if not self._rest:
            self._prove_end()
            return self._rest
        if fresh and len(self._rest) < 4:
            raise self._stump(bytes(self._rest))
        self.start = self._frame
        count = self._follow()
        piece, self._rest = self._rest[:count], self._rest[count:]
        return piece

    def _refill(self, least: int) -> None:
        """At the start of a frame its whole magic must be at hand, or the library would judge a part of it."""
        have = len(self._rest)
        if have < least:
            self._buffer[:have] = bytes(self._rest)
            while have < least and (count := self._source.readinto(self._buffer[have:])):
                have += count
            self._rest = self._buffer[:have]

    def _follow(self) -> int:
        """Follow the structure to the end of the bytes at hand, or of the frame; how many bytes that is."""
        passed = 0
        while passed < len(self._rest):
            piece = self._rest[passed : passed + self._need]
            passed += len(piece)
            self._offset += len(piece)
            self._need -= len(piece)
            if self._shown:
                self._seen += piece
            if self._need:
                break
            seen, self._seen = self._seen, b""
            self._need, self._shown = self._steps.send(seen)
            if self._frame == self._offset:
                break
        return passed

    def _prove_end(self) -> None:
        if self._offset == self._base:
            raise Damaged("the input is empty")
        if self._frame != self._offset:
            raise Damaged(f"truncated at offset {self._offset}, in {self._part} of the frame at offset {self._frame}")

    def _stump(self, start: bytes) -> Damaged:
        """The input ends within the magic of a frame, or of something else."""
        skippable = start[0] & 0xF0 == SKIPPABLE & 0xF0 and (SKIPPABLE >> 8).to_bytes(3, "little").startswith(start[1:])
        if skippable or FRAME.to_bytes(4, "little").startswith(start):
            end = self._frame + len(start)
            return Damaged(f"truncated at offset {end}, in the magic of the frame at offset {self._frame}")
        return self._foreign(start)

    # What follows asks for bytes: (count, True) for those it wants to see, (count, False) for those to be passed by.
    def _file(self) -> Generator[tuple[int, bool], bytes, None]:
        while True:
            self._frame = self._offset
            self._part = "the magic"
            start = yield 4, True
            magic = int.from_bytes(start, "little")
            if magic & ~0xF == SKIPPABLE:
                self._part = "the skippable data"
                yield from _pass(int.from_bytes((yield 4, True), "little"))
            elif magic == FRAME:
                yield from self._zstd_frame()
            else:
                raise self._foreign(start)

    def _foreign(self, start: bytes) -> Damaged:
        if self._frame == self._base:
            return Damaged(f"no zstd file: found {start!r} at offset {self._frame}")
        return Damaged(f"junk behind the last frame, at offset {self._frame}: expected the end, found {start!r}")

    def _zstd_frame(self) -> Generator[tuple[int, bool], bytes, None]:
        self._part = "the header"
        descriptor = (yield 1, True)[0]
        single = descriptor >> 5 & 1
        content = CONTENT_SIZE_FIELD[descriptor >> 6] or single
        fields = yield (not single) + DICTIONARY_FIELD[descriptor & 3] + content or 1, True
        self._check_window(_window(fields, content, bool(single)))
        last = 0
        while not last:
            self._part = "the blocks"
            header = int.from_bytes((yield 3, True), "little")
            last, kind, size = header & 1, header >> 1 & 3, header >> 3
            if kind == RESERVED_BLOCK or size > BLOCK_LIMIT:
                raise Damaged(f"corrupt block header at offset {self._offset - 3}: found type {kind}, size {size}")
            yield from _pass(1 if kind == RLE_BLOCK else size)
        if descriptor & 4:
            self._part = "the checksum"
            yield from _pass(4)

    def _check_window(self, window: int) -> None:
        if window > WINDOW:
            wants = f"a window of {-(-window >> 20)} MiB, more than {WINDOW >> 20} MiB"
            hint = "unpack it with: zstd -d --long=31, which uses that much memory"
            raise Damaged(f"the frame at offset {self._frame} wants {wants}", hint)


def _pass(count: int) -> Generator[tuple[int, bool], bytes, None]:
    if count:
        yield count, False


def _window(fields: bytes, content: int, single: bool) -> int:
    """RFC 8878, 3.1.1.1.2: how much of its past a frame refers to."""
    if single:
        return int.from_bytes(fields[-content:], "little") + (256 if content == 2 else 0)
    base = 1 << (10 + (fields[0] >> 3))
    return base + (base >> 3) * (fields[0] & 7)


class Unzstd:
    """The content of a zstd file as a `Reader`; 0 only at its proven end."""

    def __init__(self, source: Reader, offset: int = 0) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._frames = Frames(source, offset)
        library = zstandard.ZstdDecompressor(max_window_size=WINDOW)
        self._content = library.stream_reader(self._frames, read_across_frames=True)  # type: ignore[arg-type]

    def readinto(self, view: memoryview, /) -> int:
        try:
            return self._content.readinto(view)
        except self._error as error:
            raise Damaged(f"corrupt frame at offset {self._frames.start}: {_words(error)}") from error
