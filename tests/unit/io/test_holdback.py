"""The newest bytes wait, wherever they do."""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.io.descriptors import BLOCK, write_all
from vmstate.io.holdback import Pipes, Place, Ring, hold

PLACES: dict[str, Callable[[int], Place]] = {"pipes": Pipes, "ring": lambda size: Ring(size + BLOCK)}


@pytest.fixture(params=PLACES)
def make(request: pytest.FixtureRequest) -> Callable[[int], Place]:
    return PLACES[request.param]


@given(st.lists(st.binary(min_size=1, max_size=40)), st.integers(8, 64), st.integers(0, 7))
def test_a_ring_gives_what_came(pieces: list[bytes], size: int, keep: int) -> None:
    ring, data = Ring(size), b"".join(pieces)
    (ours, theirs), (back, out) = os.pipe(), os.pipe()
    try:
        left = b""
        for piece in pieces:
            os.write(theirs, piece)
            have = ring.came + len(piece)
            while ring.came < have:
                assert ring.take(ours)
                ring.drain(out, keep)
                left += os.read(back, 4096) if ring.left > len(left) else b""
                assert left == data[: max(0, ring.came - keep)]
                assert ring.left == len(left)
    finally:
        for fd in (ours, theirs, back, out):
            os.close(fd)


@pytest.mark.parametrize("size", [0, 1, 4095, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("keep", [1, 4096, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("piece", [4096, 70_001])
@pytest.mark.parametrize("appended", [False, True])
def test_the_newest_are_kept_back(
    make: Callable[[int], Place], tmp_path: Path, size: int, keep: int, piece: int, appended: bool
) -> None:
    data, path, place = os.urandom(size), tmp_path / "out", make(keep)
    with path.open("ab" if appended else "wb", buffering=0) as file:
        for kept in fed(place, data, piece):
            place.drain(file.fileno(), keep)
            assert path.stat().st_size == place.left
            assert min(keep, kept) <= kept - place.left <= keep + BLOCK
        place.drain(file.fileno())
    assert path.read_bytes() == data
    assert (place.came, place.left) == (size, size)
    place.close()


def fed(place: Place, data: bytes, piece: int) -> Iterator[int]:
    """Gives what has come to it, again and again, until all has."""
    ours, theirs = os.pipe()

    def feed() -> None:
        for at in range(0, len(data), piece):
            write_all(theirs, data[at : at + piece])
        os.close(theirs)

    feeder = threading.Thread(target=feed)
    feeder.start()
    while place.take(ours):
        yield place.came
    feeder.join()
    os.close(ours)


def test_single_bytes_take_more_pipes(tmp_path: Path) -> None:
    """A pipe has room for 256 pieces, however small."""
    place, data, path = Pipes(BLOCK), os.urandom(2000), tmp_path / "out"
    for byte in data:
        ours, theirs = os.pipe()
        os.write(theirs, bytes((byte,)))
        os.close(theirs)
        assert place.take(ours) == 1
        os.close(ours)
    with path.open("wb") as file:
        place.drain(file.fileno())
    assert path.read_bytes() == data
    place.close()


def test_a_reader_that_went_away(make: Callable[[int], Place]) -> None:
    place = make(4096)
    for _ in fed(place, bytes(10_000), 4096):
        pass
    back, out = os.pipe()
    os.close(back)
    with pytest.raises(BrokenPipeError):
        place.drain(out)
    os.close(out)


def test_a_full_sink_that_does_not_block(make: Callable[[int], Place], tmp_path: Path) -> None:
    data, place = os.urandom(BLOCK), make(BLOCK)
    for _ in fed(place, data, 4096):
        pass
    back, out = os.pipe()
    os.set_blocking(out, False)
    found = bytearray()

    def read() -> None:
        while piece := os.read(back, 4096):
            found.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    place.drain(out)
    os.close(out)
    reader.join()
    os.close(back)
    assert found == data


def test_in_memory_where_there_can_be_no_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(hold(BLOCK), Pipes)
    before = len(os.listdir("/proc/self/fd"))

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert isinstance(hold(BLOCK), Ring)
    assert len(os.listdir("/proc/self/fd")) == before
