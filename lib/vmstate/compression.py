"""Bytes into a zstd file and back, and out of whatever else a state may be wrapped in.  The home of zstandard.

A compressed input has proven its end only where a frame (zstd) or a member (gzip, bzip2, xz) ends and the input ends
with it.  Nothing here takes a cut, a changed byte or something behind the end for a regular end, and nothing holds more
than a few blocks and one window, however large an input unpacks.
"""

import os
import struct
from collections.abc import Callable, Generator
from typing import Any

from .errors import Damaged
from .octets import BLOCK, Pushback, Reader, blocks, exactly, memory, read_up_to, write_all

# Measured on guests' RAM: level 2 takes no longer than 1 for 1 % less, level 3 half as long again for 2 % less.
LEVEL = 2
# Every thread has a context and jobs of its own; all together they stay below what a filter may use.
MEMORY = 160 << 20
JOB = 8 << 20

# RFC 8878, 3.1: frames, and blocks in them
FRAME = 0xFD2FB528
SKIPPABLE = 0x184D2A50
RLE_BLOCK, RESERVED_BLOCK = 1, 3
BLOCK_LIMIT = 128 << 10
CONTENT_SIZE_FIELD = (0, 2, 4, 8)
DICTIONARY_FIELD = (0, 1, 2, 4)
# What `zstd -d` takes without being asked for more.
WINDOW = 128 << 20

MAGICS = (
    ("state", b"QEVM"),
    ("zstd", FRAME.to_bytes(4, "little")),
    ("gzip", b"\x1f\x8b"),
    ("bzip2", b"BZh"),
    ("xz", b"\xfd7zXZ\0"),
    ("lzop", b"\x89LZO\0\r\n\x1a\n"),
    ("libvirt", b"LibvirtQemudSave"),
    ("libvirt", b"LibvirtQemudPart"),
    ("openpgp", b"-----BEGIN PGP MESSAGE"),
)
# Enough for `recognise` to be sure.
FIRST = 22
NAMES = {
    "state": "a plain state of a guest",
    "libvirt": "a save file of libvirt",
    "openpgp": "an OpenPGP message",
}
HINTS = {
    "state": "it is not compressed, use it as it is",
    "zstd": "unpack it with: vm-compress -d",
    "gzip": "unpack it with: gzip -dc",
    "bzip2": "unpack it with: bzip2 -dc",
    "xz": "unpack it with: xz -dc",
    "lzop": "unpack it with: lzop -dc",
    "libvirt": "vm-restore reads it as it is",
    "openpgp": "decrypt it with: vm-encrypt -d",
}

# libvirt's src/qemu/qemu_saveimage.h: magic, version, data_len, was_running, format, cookieOffset, 14 unused words; in
# the order of bytes of the host that wrote it.
LIBVIRT_HEADER = 92
LIBVIRT_VERSION = 2
LIBVIRT_FORMATS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")


def recognise(first: bytes) -> str | None:
    """'state', 'zstd', 'gzip', 'bzip2', 'xz', 'lzop', 'libvirt' or 'openpgp' by an input's first bytes, or None."""
    for name, magic in MAGICS:
        if first.startswith(magic):
            return name
    if len(first) >= 4 and int.from_bytes(first[:4], "little") & ~0xF == SKIPPABLE:
        return "zstd"
    return "openpgp" if _session_key_packet(first) else None


def _session_key_packet(first: bytes) -> bool:
    """RFC 4880, 4.2: a message starts with a packet of tag 1 or 3, a version behind one or two bytes of length."""
    if len(first) < 4 or not first[0] & 0x80:
        return False
    if first[0] & 0x40:
        tag, at = first[0] & 0x3F, 2 if first[1] < 192 else 3
    else:
        tag, at = first[0] >> 2 & 0xF, 2 + (first[0] & 3)
    return (tag, first[at] if at <= 3 else 0) in ((1, 3), (1, 6), (3, 4), (3, 5), (3, 6))


def words_for(first: bytes) -> str:
    """What was found, in words."""
    kind = recognise(first)
    return NAMES.get(kind, f"a {kind} file") if kind else f"{first[:8]!r}"


def hints_for(first: bytes) -> tuple[str, ...]:
    kind = recognise(first)
    return (HINTS[kind],) if kind else ()


def compress(source: Reader, fd: int, level: int = LEVEL, threads: int = 0) -> int:
    """All of `source` as one zstd frame with its checksum; the number of bytes written.

    `threads` 0 stands for one a core.  Damaged where the input is empty.
    """
    packer = _compressor(level, threads or len(os.sched_getaffinity(0))).compressobj()
    written = came = 0
    for block in blocks(source):
        came += len(block)
        written += _write(fd, packer.compress(block))
    if not came:
        raise Damaged("the input is empty")
    return written + _write(fd, packer.flush())


def _compressor(level: int, threads: int) -> Any:
    import zstandard

    def parameters(threads: int, job: int) -> Any:
        return zstandard.ZstdCompressionParameters.from_level(
            level, threads=threads, job_size=job, write_checksum=True, write_content_size=False
        )

    # zstd's own choice of a job is four windows.  A thread has one at hand, its output, and the next one coming in.
    single = parameters(0, 0)
    job = min(JOB, 4 << single.window_log)
    each = single.estimated_compression_context_size() + 3 * job
    return zstandard.ZstdCompressor(compression_params=parameters(max(1, min(threads, MEMORY // each)), job))


def _write(fd: int, data: bytes) -> int:
    write_all(fd, data)
    return len(data)


def decompress(source: Reader, fd: int) -> int:
    """The content of a zstd file; the number of bytes written.  Damaged where the file is not proven whole."""
    written = 0
    for block in blocks(Unzstd(source)):
        write_all(fd, block)
        written += len(block)
    return written


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
            first = bytes(self._rest[:FIRST])
            return Damaged(f"no zstd file: found {words_for(first)} at offset {self._frame}", *hints_for(first))
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
            words = str(error).removeprefix("zstd decompress error: ")
            raise Damaged(f"corrupt frame at offset {self._frames.start}: {words}") from error


class _Inflate:
    """zlib with the face of bz2 and lzma."""

    def __init__(self) -> None:
        import zlib

        self._inside = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inside.eof

    @property
    def needs_input(self) -> bool:
        return not self._inside.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inside.unused_data

    def decompress(self, data: bytes, count: int) -> bytes:
        return self._inside.decompress(self._inside.unconsumed_tail + data, count)


def _unpacker(kind: str) -> tuple[Callable[[], Any], bytes, tuple[type[Exception], ...]]:
    """How to start a member, the magic it begins with, and how its library complains."""
    import bz2
    import lzma
    import zlib

    return {
        "gzip": (_Inflate, b"\x1f\x8b", (zlib.error,)),
        "bzip2": (bz2.BZ2Decompressor, b"BZh", (OSError, ValueError)),
        "xz": (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, WINDOW), b"\xfd7zXZ\0", (lzma.LZMAError,)),
    }[kind]


class Members:
    """The content of a gzip, bzip2 or xz file as a `Reader`; 0 only at its proven end."""

    # Larger pieces would be copied again and again while zlib fills small views from them.
    PIECE = 64 << 10

    def __init__(self, kind: str, source: Reader, offset: int = 0) -> None:
        self._kind = kind
        self._start, self._magic, self._errors = _unpacker(kind)
        self._source = source
        self._buffer = memory(self.PIECE)
        self._came = offset
        self._member: Any = self._start()

    def readinto(self, view: memoryview, /) -> int:
        while not self._member.eof or self._next():
            data = self._more() if self._member.needs_input else b""
            hungry = self._member.needs_input and not data
            content = self._step(data, min(len(view), BLOCK))
            if content:
                view[: len(content)] = content
                return len(content)
            if hungry and not self._member.eof:
                raise Damaged(f"truncated at offset {self._came}, in {self._kind} data")
        return 0

    def _step(self, data: bytes, count: int) -> bytes:
        try:
            return bytes(self._member.decompress(data, count))
        except self._errors as error:
            raise Damaged(f"corrupt {self._kind} data before offset {self._came}: {error}") from error

    def _more(self) -> bytes:
        count = self._source.readinto(self._buffer)
        self._came += count
        return bytes(self._buffer[:count])

    def _next(self) -> bool:
        """Start the member behind this one; False where the input ends here."""
        ahead = self._member.unused_data
        while len(ahead) < len(self._magic) and (more := self._more()):
            ahead += more
        if not ahead:
            return False
        if not ahead.startswith(self._magic):
            at = self._came - len(ahead)
            raise Damaged(f"junk behind the {self._kind} data, at offset {at}: expected the end, found {ahead[:8]!r}")
        self._source, self._came = Pushback(ahead, self._source), self._came - len(ahead)
        self._member = self._start()
        return True


def plain(source: Reader) -> Reader:
    """The plain state in `source`, as `unpacked` finds it."""
    return unpacked(source, read_up_to(source, FIRST))


def unpacked(source: Reader, first: bytes) -> Reader:
    """The plain state in `source`, whose `first` bytes (`FIRST` or all there are) have been read ahead.

    Undoes zstd, gzip, bzip2, xz and libvirt's save file; Damaged for anything else that is no state.
    """
    kind = recognise(first)
    whole = Pushback(first, source)
    if kind == "libvirt":
        return _libvirt(whole)
    if kind in ("state", "zstd", "gzip", "bzip2", "xz"):
        return _content(kind, whole, 0)
    if not first:
        raise Damaged("the input is empty")
    raise Damaged(f"no state of a guest: found {words_for(first)} at offset 0", *hints_for(first))


def _content(kind: str, source: Reader, offset: int) -> Reader:
    if kind == "state":
        return source
    return Unzstd(source, offset) if kind == "zstd" else Members(kind, source, offset)


def _libvirt(source: Reader) -> Reader:
    """What stands behind the header and the XML of a save file of libvirt."""
    head = exactly(source, LIBVIRT_HEADER, 0, "the header of libvirt's save file")
    if head.startswith(b"LibvirtQemudPart"):
        raise Damaged("incomplete save file: libvirt did not come to its end")
    order = "<" if struct.unpack_from("<I", head, 16)[0] <= LIBVIRT_VERSION else ">"
    version, length, _running, number = struct.unpack_from(f"{order}4I", head, 16)
    if version not in (1, LIBVIRT_VERSION):
        raise Damaged(f"unknown version of libvirt's save file at offset 16: expected 1 or 2, found {version}")
    kind = LIBVIRT_FORMATS[number] if number < len(LIBVIRT_FORMATS) else f"number {number}"
    if kind not in ("raw", "gzip", "bzip2", "xz", "zstd"):
        raise Damaged(f"save file of libvirt in a format that is not read here: {kind}", *_way_around(kind, length))
    for at in range(LIBVIRT_HEADER, LIBVIRT_HEADER + length, BLOCK):
        exactly(source, min(BLOCK, LIBVIRT_HEADER + length - at), at, "the XML of libvirt's save file")
    return _content("state" if kind == "raw" else kind, source, LIBVIRT_HEADER + length)


def _way_around(kind: str, length: int) -> tuple[str, ...]:
    if kind == "lzop":
        return (f"unpack it with: tail -c +{LIBVIRT_HEADER + length + 1} FILE | lzop -dc",)
    return ("let virsh restore it, and save it again in another format",)
