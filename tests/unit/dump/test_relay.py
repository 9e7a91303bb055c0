"""QEMU's bytes to a sink, whatever the pieces in which they come."""

import os
import random
import socket
import threading
import time
from pathlib import Path

import pytest
from vmstate.dump.relay import Outgoing
from vmstate.errors import CannotDo
from vmstate.qemu.channel import QemuChannel

from unit.qemu.fake_qemu import FakeQemu
from unit.streams import state


@pytest.mark.parametrize("name", ["pc-7.2", "q35-10.0"])
@pytest.mark.parametrize("sink", ["pipe", "file"])
@pytest.mark.parametrize("most", [700, 5000, 60_000, 1 << 30])
def test_all_of_it_comes_through(name: str, sink: str, most: int, tmp_path: Path) -> None:
    """The sender is slower than we are, or faster."""
    data, chance = state(name), random.Random(most)
    qemu, ours = socket.socketpair()
    path, found = tmp_path / "out", bytearray()
    with path.open("wb") as file:
        reading, writing = os.pipe() if sink == "pipe" else (-1, file.fileno())

        def send() -> None:
            at = 0
            while at < len(data):
                size = chance.randint(1, most)
                qemu.sendall(data[at : at + size])
                at += size
                time.sleep(chance.choice((0, 0, 0.0005)))

        def collect() -> None:
            while piece := os.read(reading, 1 << 16):
                found.extend(piece)

        threads = [threading.Thread(target=work) for work in ([send, collect] if sink == "pipe" else [send])]
        for thread in threads:
            thread.start()
        outgoing = Outgoing(QemuChannel("none.qmp", ours), writing)
        saved = outgoing.run()
        if sink == "pipe":
            os.close(writing)
        for thread in threads:
            thread.join(20)
    whole = bytes(found) if sink == "pipe" else path.read_bytes()
    assert whole == data
    assert (outgoing.sent, saved.size) == (len(data), len(data))
    qemu.close()
    ours.close()


@pytest.mark.parametrize("sink", ["pipe", "file"])
@pytest.mark.parametrize("whole", [False, True])
def test_qemu_gives_up_and_leaves_its_channel_open(
    qemu: FakeQemu, path: str, tmp_path: Path, sink: str, whole: bool
) -> None:
    """After some of the state, or after all of it but its end."""
    data = state("pc-7.2")
    qemu.migration = "failed"
    theirs, ours = socket.socketpair()
    with theirs, ours, (tmp_path / "out").open("wb") as file:
        reading, writing = os.pipe() if sink == "pipe" else (-1, file.fileno())
        threading.Thread(target=theirs.sendall, args=(data[:-1] if whole else data[:5000],), daemon=True).start()
        if sink == "pipe":
            threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reading, 1 << 16), b"")]).start()
        with pytest.raises(CannotDo, match="QEMU gave up after"):
            Outgoing(QemuChannel(path, ours), writing).run()
        if sink == "pipe":
            os.close(writing)
