"""A guest whose memory comes later answers on its connections meanwhile."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from conftest import Guests
from guest.judge import went_on
from vm import until

from net.hosts import Client, Hosts, source_on_a, waiting_on_b

pytestmark = [pytest.mark.root, pytest.mark.guest]


def test_the_connection_lives(guests: Guests, two: Hosts) -> None:
    """Saved on one host, restored on the other: lazily, then on demand, and the rest at last."""
    source, there = source_on_a(guests, two), waiting_on_b(guests, two)
    client = Client(two)
    assert two.sh("A", "vm-dump -q a.qmp | vm-compress > s.vmz").status == 0
    count = source.count() or 0
    source.end()
    server = two.background("B", "vm-restore --lazy --on-demand b.qmp < s.vmz > lines && vm-announce < lines")
    until(lambda: there.status() == "running", 20, "it runs")
    client.lives()
    assert there.cmd("query-migrate")["status"] == "postcopy-active"
    found = subprocess.run(["pgrep", "-P", str(server.pid), "-f", "vm-restore"], capture_output=True, text=True)
    subprocess.run(["kill", f"-{signal.SIGTERM}", found.stdout.split()[0]], check=True)
    assert server.wait(30) == 0
    assert there.cmd("query-migrate")["status"] == "completed"
    client.lives()
    went_on(count, there)
    assert Path(two.folder, "lines").read_text().startswith("52:54:00:00:00:01 tap0")
