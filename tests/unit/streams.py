"""The small real states of tests/streams, unpacked."""

import functools
from pathlib import Path

import zstandard

FOLDER = Path(__file__).resolve().parent.parent / "streams"
NAMES = ("q35-7.2", "q35-10.0")


@functools.cache
def state(name: str) -> bytes:
    packed = (FOLDER / f"{name}.zst").read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)
