"""Two hosts, and a real sshd on the second."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BIN, run
from vm import until

from net.hosts import ADDRESS, Hosts, hosts


@pytest.fixture
def two(work: Path) -> Iterator[Hosts]:
    with hosts(work) as made:
        yield made


@pytest.fixture
def sshd(two: Hosts, work: Path) -> Iterator[Path]:
    """A real sshd on host B with keys of its own; gives the configuration for `ssh -F`."""
    for name in ("host", "user"):
        assert run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", work / name).status == 0
    (work / "user.pub").rename(work / "allowed")
    Path("/run/sshd").mkdir(exist_ok=True)
    (work / "sshd_config").write_text(
        f"Port 22\nHostKey {work}/host\nAuthorizedKeysFile {work}/allowed\nStrictModes no\nUsePAM no\nPidFile none\n"
        f"SetEnv PATH={BIN}:{os.environ['PATH']}\n"
    )
    (work / "ssh_config").write_text(
        f"Host hostb\n  HostName {ADDRESS['B']}\n  IdentityFile {work}/user\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {work}/known\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
    )
    daemon = two.background("B", f"exec /usr/sbin/sshd -D -e -f {work}/sshd_config > sshd.log 2>&1")
    until(lambda: ":22 " in two.sh("B", "ss -ltn").text, 20, "sshd listens")
    yield work / "ssh_config"
    assert daemon.poll() is None, (work / "sshd.log").read_text()
    subprocess.run(["pkill", "-f", f"{work}/sshd_config"], check=False)
