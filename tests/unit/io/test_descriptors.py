"""Descriptors, the held output, and named files that appear whole or not at all."""

import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmstate.errors import CannotDo, WrongUsage
from vmstate.io import descriptors
from vmstate.io.descriptors import unread, write_all, write_pieces
from vmstate.io.output import Output, WriteBack, wait_until_read
from vmstate.io.readers import FdReader, Pushback, read_up_to

from unit.streams import Pieces


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(1, 50))
def test_pushback_then_the_rest(data: bytes, cut: int, step: int) -> None:
    source = Pushback(data[:cut], Pieces(data[cut:], step))
    assert read_up_to(source, 1000) == data
    assert read_up_to(source, 1000) == b""


def test_write_all_into_a_non_blocking_pipe() -> None:
    """ssh and shells make the pipe non-blocking for all who share it."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    data = os.urandom(1 << 20)
    taken: list[bytes] = []
    reader = threading.Thread(target=lambda: taken.append(read_up_to(FdReader(ours), len(data))))
    reader.start()
    write_all(theirs, data)
    reader.join(20)
    assert taken == [data]


def test_write_pieces_into_a_non_blocking_pipe() -> None:
    """It takes a part of them, ends within one of them, or takes none at all."""
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    pieces: list[bytes | memoryview] = [b"", os.urandom(3), memoryview(os.urandom(100_000)), b"", os.urandom(200_000)]
    taken: list[bytes] = []
    reader = threading.Thread(target=lambda: taken.append(read_up_to(FdReader(ours), 2 * 300_003)))
    reader.start()
    for _ in range(2):
        write_pieces(theirs, pieces)
    reader.join(20)
    assert taken == [b"".join(pieces) * 2]


def test_the_disk_begins_with_whole_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, offset, count, _advice: asked.append((offset, count)))
    page = os.sysconf("SC_PAGE_SIZE")
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"x" * page)
        write_back = WriteBack(file.fileno())
        for count in (page // 2, page, 0, 3 * page):
            file.write(b"x" * count)
            write_back.begin()
    assert asked == [(page, page), (2 * page, 3 * page)]


def test_a_pipe_has_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    for fd in os.pipe():
        WriteBack(fd).begin()


def test_reading_from_a_non_blocking_pipe() -> None:
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    threading.Timer(0.05, lambda: (os.write(theirs, b"late"), os.close(theirs))).start()
    assert read_up_to(FdReader(ours), 10) == b"late"


@pytest.mark.parametrize("make", ["pipe", "socket"])
def test_wait_until_read(make: str) -> None:
    if make == "pipe":
        ours, theirs = os.pipe()
    else:
        pair = socket.socketpair()
        ours, theirs = pair[0].detach(), pair[1].detach()
    os.write(theirs, b"x" * 5000)
    assert unread(theirs) > 0
    waited = threading.Event()
    waiter = threading.Thread(target=lambda: (wait_until_read(theirs), waited.set()))
    waiter.start()
    assert not waited.wait(0.1)
    os.read(ours, 5000)
    waiter.join(10)
    assert waited.is_set()
    os.write(theirs, b"y")
    os.close(ours)
    with pytest.raises(BrokenPipeError):
        wait_until_read(theirs)


def test_a_named_output_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "s"
    output = Output(str(path))
    write_all(output.fd, b"whole")
    assert not path.exists()
    output.settle()
    assert path.read_bytes() == b"whole"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_named_output_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"old")
    path.chmod(0o640)
    output = Output(str(path))
    write_all(output.fd, b"new")
    output.abandon()
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
    output = Output(str(path))
    write_all(output.fd, b"new")
    output.settle()
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_named_output_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    output = Output(str(tmp_path / "link"))
    write_all(output.fd, b"x")
    output.settle()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"x"


def test_input_and_output_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"data")
    (tmp_path / "other").hardlink_to(path)
    for name in ("s", "./s", "other"):
        with (tmp_path / "s").open("rb") as file, pytest.raises(WrongUsage, match="the same file"):
            Output(str(tmp_path / name)).refuse_as_input(file.fileno())
    assert path.read_bytes() == b"data"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(CannotDo, match="cannot create .*No such file"):
        Output(str(tmp_path / "no/such/folder"))


def test_kinds(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        assert descriptors.kind(file.fileno()) == "file"
    ours, theirs = os.pipe()
    assert descriptors.kind(ours) == "pipe"
    assert descriptors.kind(os.open("/dev/null", os.O_RDONLY)) == "other"
    master, slave = os.openpty()
    assert descriptors.kind(slave) == "terminal"
    assert descriptors.kind(socket.socketpair()[0].detach()) == "socket"
