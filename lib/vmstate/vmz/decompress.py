"""Bytes out of whatever a state may be wrapped in.

A compressed input has proven its end only where a frame (zstd) or a member (gzip, bzip2, xz) ends and the input ends
with it.  Nothing here takes a cut, a changed byte or something behind the end for a regular end, and nothing holds more
than a few blocks and one window, however large an input unpacks.
"""

import struct
from collections.abc import Callable
from typing import Any

from ..errors import Damaged
from ..io.descriptors import BLOCK, memory
from ..io.readers import Pushback, Reader, exactly, read_up_to
from . import file_format, zstd
from .reader import Unvmz
from .zstd import Unzstd

MAGICS = (
    ("state", b"QEVM"),
    ("vmz", struct.pack("<II3s", zstd.SKIPPABLE + file_format.HEAD, file_format.HEAD_FORM.size, b"VMZ")),
    ("zstd", zstd.FRAME.to_bytes(4, "little")),
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
    "vmz": "a .vmz",
    "state": "a plain state of a guest",
    "libvirt": "a save file of libvirt",
    "openpgp": "an OpenPGP message",
}
HINTS = {
    "state": "it is not compressed, use it as it is",
    "zstd": "unpack it with: vm-compress -d",
    "vmz": "unpack it with: vm-compress -d",
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
    """What an input is by its first bytes: a name in `MAGICS`, or None."""
    for name, magic in MAGICS:
        if first.startswith(magic):
            return name
    if len(first) >= 4 and int.from_bytes(first[:4], "little") & ~0xF == zstd.SKIPPABLE:
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
        "xz": (lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, zstd.WINDOW), b"\xfd7zXZ\0", (lzma.LZMAError,)),
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

    Undoes .vmz, zstd, gzip, bzip2, xz and libvirt's save file; Damaged for anything else that is no state.
    """
    kind = recognise(first)
    whole = Pushback(first, source)
    if kind == "libvirt":
        return _libvirt(whole)
    if kind in ("state", "vmz", "zstd", "gzip", "bzip2", "xz"):
        return _content(kind, whole, 0)
    if not first:
        raise Damaged("the input is empty")
    raise Damaged(f"no state of a guest: found {words_for(first)} at offset 0", *hints_for(first))


def _content(kind: str, source: Reader, offset: int) -> Reader:
    if kind == "state":
        return source
    if kind == "vmz":
        return Unvmz(source, offset)
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
