"""The server of pages over a socket pair, with a small reader in the place of QEMU."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vm import until
from vmstate.errors import CannotDo, Damaged
from vmstate.restore.page_order import Place
from vmstate.restore.page_server import Lost, PageServer
from vmstate.restore.postcopy import LOADED, PAGE, Opening, ReturnPath, have_of, opening_of
from vmstate.stream import constants
from vmstate.stream.page_map import NORMAL
from vmstate.stream.reader import StateReader
from vmstate.stream.records import Pages
from vmstate.vmz.state_file import RawFile, StateFile
from vmstate.vmz.vmz_file import VmzFile

from unit.streams import Pieces, state

DEADLINE = 20
# A made one, with pages enough that it matters what comes first
BIG = "big"
VRAM = b"0000:00:01.0/vga.vram"
NAMES = [BIG, "q35-7.2", "live-7.2", "live-10.0", "virtio-mem-10.0", "virt-aarch64-7.2"]


@functools.cache
def big() -> bytes:
    """A state that ends with 1500 pages more, in two blocks, those of one of them out of order."""
    content = state("q35-7.2")
    end_of_body = constants.U64.pack(constants.RAM_SAVE_FLAG_EOS)
    at = content.index(end_of_body + b"\x7e") + 8
    last = content.rindex(end_of_body + content[at : at + 5])
    chance = random.Random(1)
    body = []
    for name, pages in ((VRAM, range(1200)), (b"pc.ram", chance.sample(range(300), 300))):
        for page in pages:
            word = constants.U64.pack(page * PAGE | constants.RAM_SAVE_FLAG_PAGE)
            body.append(word + bytes((len(name),)) + name + chance.randbytes(PAGE))
    return content[:last] + b"".join(body) + content[last:]


def content_of(name: str) -> bytes:
    return big() if name == BIG else state(name)


@functools.cache
def last_copies(name: str) -> dict[Place, bytes]:
    return copies_in(content_of(name))


def with_content(name: str) -> list[Place]:
    return [place for place, content in last_copies(name).items() if content]


def copies_in(data: bytes) -> dict[Place, bytes]:
    """The content of each page that a state has, as it was last; of those that are zero: empty."""
    found: dict[Place, bytes] = {}
    for record in StateReader(Pieces(data)):
        if not isinstance(record, Pages):
            continue
        addresses = [first + PAGE * at for first, count in record.runs for at in range(count)]
        for number, address in enumerate(addresses):
            at = record.first + number * record.stride
            content = b"" if record.zero else bytes(record.raw[at : at + PAGE])
            found[record.block.name, address // PAGE] = content
    return found


def asked_for(name: bytes, number: int) -> bytes:
    what = constants.U64.pack(number * PAGE) + constants.U32.pack(PAGE) + bytes((len(name),)) + name
    return constants.U16.pack(constants.MIG_RP_MSG_REQ_PAGES_ID) + constants.U16.pack(len(what)) + what


class Reader:
    """QEMU's side: what comes is read in a thread of its own; `pages` in the order in which they came."""

    def __init__(self, end: socket.socket, skip: int, opening: Opening) -> None:
        self._end = end
        self._file = end.makefile("rb")
        self._skip = skip
        self._closing = opening.closing()
        self._block = b""
        self.pages: list[tuple[Place, bytes]] = []
        self.error: BaseException | None = None
        # Its devices are loaded when they have come.
        self.loads = True
        self.came = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self._take(self._skip)
            if self.loads:
                self.loaded()
            while self._record():
                pass
            self._end.sendall(constants.SHUT.pack(constants.MIG_RP_MSG_SHUT, 4, 0))
        except BaseException as error:  # noqa: BLE001 - for the test
            self.error = error

    def loaded(self) -> None:
        self._end.sendall(constants.SHUT.pack(constants.MIG_RP_MSG_PONG, 4, LOADED))

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise EOFError
        return data

    def _record(self) -> bool:
        word = int.from_bytes(self._take(8), "big")
        flags = word & 0xFFF
        if flags == constants.RAM_SAVE_FLAG_EOS:
            assert self._take(len(self._closing) - 8) == self._closing[8:]
            return False
        if not flags & constants.RAM_SAVE_FLAG_CONTINUE:
            self._block = self._take(self._take(1)[0])
        kind = flags & ~constants.RAM_SAVE_FLAG_CONTINUE
        assert kind in (constants.RAM_SAVE_FLAG_ZERO, constants.RAM_SAVE_FLAG_PAGE)
        content = self._take(PAGE) if kind == constants.RAM_SAVE_FLAG_PAGE else b""
        assert content or self._take(1) == b"\0"
        with self.came:
            self.pages.append(((self._block, word // PAGE), content))
            self.came.notify_all()
        return True

    def ask(self, name: bytes, number: int) -> None:
        self._end.sendall(asked_for(name, number))

    def wait(self, count: int) -> None:
        with self.came:
            assert self.came.wait_for(lambda: len(self.pages) >= count or self.error, DEADLINE)

    def over(self) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error


class Serving:
    """A server in a thread, and its reader."""

    def __init__(self, file: StateFile, **kwargs: Any) -> None:
        self.opening = opening_of(file)
        self.ours, theirs = socket.socketpair()
        # As little as possible, so that it is the server that decides what comes next.
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.theirs = theirs
        self.first = self.opening.stream()
        self.reader = Reader(theirs, len(self.first), self.opening)
        self.server = PageServer(file, self.opening, self.ours.fileno(), self.ours.fileno(), **kwargs)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.server.run(self.first)
        except BaseException as error:  # noqa: BLE001 - for the test
            self.error = error

    def start(self) -> None:
        self._thread.start()

    def over(self) -> None:
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        if self.error:
            raise self.error


Serve = Callable[..., Serving]


@pytest.fixture
def serve() -> Iterator[Serve]:
    made: list[Serving] = []

    def serving(file: StateFile, **kwargs: Any) -> Serving:
        made.append(Serving(file, **kwargs))
        return made[-1]

    yield serving
    for one in made:
        for end in (one.ours, one.theirs):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


Open = Callable[..., StateFile]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """A state of tests/streams as a file, plain or packed."""
    files = []

    def open_it(name: str, kind: str = "vmz", change: Callable[[bytearray], None] = lambda data: None) -> StateFile:
        path = tmp_path / "s"
        path.write_bytes(content_of(name))
        if kind == "vmz":
            packed = subprocess.run(["vm-compress", "-q", path], capture_output=True, check=True, timeout=60).stdout
            path.write_bytes(packed)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        files.append(os.open(path, os.O_RDONLY))
        return VmzFile(files[-1]) if kind == "vmz" else RawFile(files[-1])

    yield open_it
    for fd in files:
        os.close(fd)


@pytest.mark.parametrize("kind", ["vmz", "raw"])
@pytest.mark.parametrize("name", NAMES)
def test_every_page_once_and_as_it_was_last(name: str, kind: str, opened: Open, serve: Serve) -> None:
    wanted = {place: content for place, content in last_copies(name).items() if content}
    serving = serve(opened(name, kind))
    serving.start()
    serving.reader.start()
    serving.reader.over()
    serving.over()
    found = serving.reader.pages
    assert len(found) == len(dict(found))
    assert dict(found) == wanted
    assert (serving.server.tally.sent, serving.server.tally.asked) == (len(wanted), 0)


@pytest.mark.parametrize("seed", range(5))
def test_with_requests_at_any_moment(seed: int, opened: Open, serve: Serve) -> None:
    """Of pages that are on their way, that have come, that are zero or were never sent, and twice the same."""
    chance = random.Random(seed)
    name = chance.choice(NAMES[:3])
    last = last_copies(name)
    serving = serve(opened(name))
    blocks = serving.opening.blocks
    serving.start()
    serving.reader.start()
    asked: set[Place] = set()
    least = len(with_content(name))
    # The server is not through before the reader has said that it has everything, which comes last.
    for number in range(1, 60):
        # More come only where it was asked before it had sent all of these.
        serving.reader.wait(min(number, least))
        block = chance.choice(list(blocks))
        page = chance.randrange(blocks[block] // PAGE)
        with contextlib.suppress(OSError):
            serving.reader.ask(block, page)
        asked.add((block, page))
    serving.reader.over()
    serving.over()
    found = serving.reader.pages
    assert len(found) == len(dict(found))
    assert {place for place, content in last.items() if content} <= set(dict(found))
    for place, content in found:
        assert content == last.get(place, b"")
        assert content or place in asked


def test_what_is_asked_for_comes_before_the_rest(opened: Open, serve: Serve) -> None:
    """Behind what is on its way already: the chunk that was begun, and what lies in the socket."""
    serving = serve(opened(BIG))
    content = with_content(BIG)
    assert len(content) > 120
    serving.start()
    serving.reader.start()
    serving.reader.wait(1)
    there = len(serving.reader.pages)
    came = {place for place, _ in serving.reader.pages}
    wanted = [place for place in reversed(content) if place not in came][0]
    serving.reader.ask(*wanted)
    serving.reader.over()
    at = [place for place, _ in serving.reader.pages].index(wanted)
    assert at <= there + 48


def test_before_it_has_read_anything(opened: Open, serve: Serve) -> None:
    """Asked for at once: these are first, in their order."""
    serving = serve(opened(BIG))
    content = with_content(BIG)
    wanted = [content[-1], content[50], content[0]]
    for place in wanted:
        serving.reader.ask(*place)
    serving.start()
    serving.reader.start()
    serving.reader.over()
    serving.over()
    assert [place for place, _ in serving.reader.pages[:40] if place in wanted] == wanted
    tally = serving.server.tally
    assert tally.order == wanted
    assert len(tally.waited) == len(tally.when) == tally.asked == 3
    assert tally.values()["asked"] == 3


def test_what_is_to_be_fetched_first(opened: Open, serve: Serve) -> None:
    """Also where the list names what this state does not have."""
    content = with_content(BIG)
    wanted = [content[90], content[3], content[60]]
    strange = [(b"no-such-block", 1), (b"pc.ram", 1 << 40), content[90]]
    serving = serve(opened(BIG), first=[*strange[:2], *wanted, strange[2]])
    serving.start()
    serving.reader.start()
    serving.reader.over()
    serving.over()
    assert [place for place, _ in serving.reader.pages[:3]] == wanted
    assert len(serving.reader.pages) == len(content)


def test_on_demand(opened: Open, serve: Serve) -> None:
    """Nothing but what is asked for, until it is told to send the rest."""
    last = last_copies(BIG)
    content = with_content(BIG)
    serving = serve(opened(BIG), on_demand=True)
    serving.start()
    serving.reader.start()
    for number, place in enumerate([content[5], content[70]]):
        serving.reader.ask(*place)
        serving.reader.wait(number + 1)
    assert [place for place, _ in serving.reader.pages] == [content[5], content[70]]
    serving.reader.came.acquire()
    try:
        assert not serving.reader.came.wait_for(lambda: len(serving.reader.pages) > 2, 0.3)
    finally:
        serving.reader.came.release()
    serving.server.finish_up()
    serving.reader.over()
    serving.over()
    assert dict(serving.reader.pages) == {place: last[place] for place in content}
    assert len(serving.reader.pages) == len(content)


def test_pages_that_it_has_already(opened: Open, serve: Serve) -> None:
    """Taken up again: every other page is there."""
    last = last_copies("live-7.2")
    file = opened("live-7.2")
    opening = opening_of(file)
    bitmaps = {name: bytes(0x55 for _ in range(-(-size // PAGE // 64) * 8)) for name, size in opening.blocks.items()}
    serving = serve(file)
    # It has asked for one of them, and begun to ask for another, before it was served.
    early, late = [place for place in with_content("live-7.2") if place[1] % 2][-2:]
    path = ReturnPath()
    request = asked_for(*late)
    assert list(path.feed(request[:7])) == []
    serving.theirs.sendall(request[7:])
    serving.server.take_up(have_of(opening, bitmaps), path, list(ReturnPath().feed(asked_for(*early))))
    serving.start()
    serving.reader.start()
    serving.reader.over()
    serving.over()
    wanted = {place: content for place, content in last.items() if content and place[1] % 2}
    assert wanted
    assert dict(serving.reader.pages) == wanted
    assert [place for place, _ in serving.reader.pages[:2]] == [early, late]
    assert len(serving.reader.pages) == len(wanted)


def test_bitmaps_to_bytes() -> None:
    """The lowest bit is the first page; QEMU sends whole words, and they may be cut."""
    opening = Opening(b"", b"", b"", b"", 2, {b"a": 11 * PAGE, b"b": 3 * PAGE, b"c": 0}, False)
    have = have_of(opening, {b"a": b"\x01\x06" + bytes(6), b"b": b"", b"c": bytes(8)})
    assert {name: bytes(pages) for name, pages in have.items()} == {
        b"a": bytes([1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
        b"b": bytes(3),
        b"c": b"",
    }


# What goes wrong


def in_the_middle(data: bytearray) -> None:
    """Of the frames, which lie between the head and the end record."""
    data[len(data) // 2] ^= 1


def test_a_damaged_frame_that_is_asked_for(opened: Open, serve: Serve) -> None:
    last = last_copies(BIG)
    content = with_content(BIG)
    serving = serve(opened(BIG, change=in_the_middle), on_demand=True)
    serving.start()
    serving.reader.start()
    # One of each frame.
    for place in content[::20]:
        serving.reader.ask(*place)
    with pytest.raises(Damaged, match=r"0x[0-9a-f]+ to 0x[0-9a-f]+ of RAM block '.*' cannot be read: .*at offset"):
        serving.over()
    # To close it would throw away what was asked since, and be an error for the reader.
    serving.ours.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        serving.reader.over()
    for place, data in serving.reader.pages:
        assert data == last[place]


def test_a_damaged_frame_of_the_rest(opened: Open, serve: Serve) -> None:
    """What can be read is served on until it is told to give up, and never a wrong page."""
    last = last_copies(BIG)
    serving = serve(opened(BIG, change=in_the_middle))
    serving.start()
    serving.reader.start()

    def damage() -> Damaged | None:
        return serving.server.damage

    # It ends no thread, so it is waited for by looking.
    until(damage, DEADLINE, "the damage is found")
    came = {place for place, _ in serving.reader.pages}
    absent = next(place for place in last if place not in came and not last[place])
    serving.reader.ask(*absent)
    with serving.reader.came:
        assert serving.reader.came.wait_for(lambda: serving.reader.pages[-1][0] == absent, DEADLINE)
    serving.server.give_up()
    serving.over()
    assert "cannot be read" in str(damage())
    for place, data in serving.reader.pages:
        assert data == last[place]


def test_a_file_that_shrinks(opened: Open, serve: Serve, tmp_path: Path) -> None:
    serving = serve(opened(BIG, "raw"))
    os.truncate(tmp_path / "s", 3_000_000)
    serving.start()
    serving.reader.start()
    until(lambda: serving.server.damage, DEADLINE, "the damage is found")
    assert "the file has become shorter" in str(serving.server.damage)
    serving.server.give_up()
    serving.over()


@pytest.mark.parametrize("name", [b"pc.ram", b"nothing"])
def test_a_request_for_what_is_not_there(name: bytes, opened: Open, serve: Serve) -> None:
    serving = serve(opened(BIG))
    serving.reader.ask(name, 1 << 40)
    serving.start()
    serving.reader.start()
    with pytest.raises(CannotDo, match="QEMU asks for 4096 bytes at 0x10000000000000 of"):
        serving.over()


def test_qemu_goes_away(opened: Open, serve: Serve) -> None:
    serving = serve(opened(BIG))
    serving.start()
    serving.theirs.recv(100)
    serving.theirs.shutdown(socket.SHUT_RDWR)
    serving.theirs.close()
    with pytest.raises(Lost):
        serving.over()


def test_qemu_ends_it_as_failed(opened: Open, serve: Serve) -> None:
    serving = serve(opened(BIG), on_demand=True)
    serving.theirs.sendall(constants.SHUT.pack(constants.MIG_RP_MSG_SHUT, 4, 1))
    serving.start()
    serving.reader.start()
    with pytest.raises(Lost, match="ended with status 1"):
        serving.over()


def test_its_end_waits_until_the_devices_are_loaded(opened: Open, serve: Serve) -> None:
    """A device may need a page of zeros, which nobody sends unless it is asked for, nor anybody behind the end."""
    file = opened("microvm-10.0")
    serving = serve(file)
    serving.reader.loads = False
    serving.start()
    serving.reader.start()
    content = sorted(set(with_content("microvm-10.0")))
    serving.reader.wait(len(content))
    name, block = next(iter(file.blocks.items()))
    number = next(number for number in range(block.pages) if not block.find(number)[0] & NORMAL)
    serving.reader.ask(name, number)
    serving.reader.wait(len(content) + 1)
    assert serving.reader.pages[-1] == ((name, number), b"")
    serving.reader.loaded()
    serving.over()
    serving.reader.over()
