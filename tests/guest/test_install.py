"""`make install` into a folder of its own, and the whole job from there as an unprivileged user."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import LIVE, ROOT, Done, Guests, run

from guest.judge import went_on

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
NOBODY = pwd.getpwnam("nobody").pw_uid
KEY = "me@example.org"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An installation that every user of this system can run."""
    folder = Path("/opt") / f"vmstate-test-{os.getpid()}"
    done = run("make", "-C", ROOT, "install", f"PREFIX={folder}", timeout=200)
    assert done.status == 0, done.err
    yield folder
    shutil.rmtree(folder)


@dataclass
class User:
    """`sh` runs a pipeline as the user nobody, in a folder that is theirs, with the installed commands first."""

    folder: Path
    prefix: Path

    def sh(self, script: str, timeout: float = 90) -> Done:
        environment = {"PATH": f"{self.prefix}/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(self.folder)}
        environment |= {"LC_ALL": "C.UTF-8", "GNUPGHOME": str(self.folder / "gnupg")}
        identity = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
        command = [*identity, "bash", "-o", "pipefail", "-c", script]
        return run(*command, cwd=self.folder, env=environment, timeout=timeout)


@pytest.fixture
def user(work: Path, prefix: Path) -> Iterator[User]:
    os.chown(work, NOBODY, NOBODY)
    made = User(work, prefix)
    done = made.sh(f"mkdir -m 700 gnupg && gpg -q --batch --passphrase '' --quick-gen-key {KEY} default default never")
    assert done.status == 0, done.err
    yield made
    made.sh("gpgconf --kill all")


@pytest.mark.nobody
def test_the_whole_job_as_an_unprivileged_user(guests: Guests, user: User) -> None:
    for_user = {"user": NOBODY}
    source = guests.running("a", **for_user)
    assert "a.qmp: runs" in user.sh("vm-status a.qmp").text
    done = user.sh(f"vm-dump {LIVE} -q a.qmp | vm-compress | vm-encrypt -r {KEY} > s.vmz.gpg")
    assert (done.status, done.err) == (0, "")
    stood = source.count() or 0
    source.end()
    guest = guests.waiting("b", **for_user)
    done = user.sh("vm-encrypt -d s.vmz.gpg | vm-compress -d | vm-restore b.qmp | vm-announce")
    assert (done.status, done.err) == (0, "")
    went_on(stood, guest)
    assert Path(f"/proc/{guest.pid}").stat().st_uid == NOBODY
    done = user.sh(f"vm-dump {LIVE} b.qmp | true; vm-status b.qmp")
    assert "b.qmp: runs" in done.text


def test_what_is_installed(prefix: Path, user: User) -> None:
    commands = sorted(path.name for path in (ROOT / "bin").glob("vm-*"))
    assert sorted(path.name for path in (prefix / "bin").iterdir()) == commands
    for name in commands:
        done = user.sh(f"{name} --version")
        assert (done.status, done.err) == (0, ""), name
        assert (prefix / "share/man/man1" / f"{name}.1").is_file()
        assert (prefix / "share/bash-completion/completions" / name).is_file()
    for page in (ROOT / "man").iterdir():
        installed = prefix / f"share/man/man{page.suffix[1:]}" / page.name
        assert f".Nm {page.stem}" in installed.read_text()
        assert page.stem in run("man", "-P", "cat", installed).text.replace("‐", "-")


def test_nothing_in_the_systems_own_packages(prefix: Path) -> None:
    """What Debian lacks lies beside the library; the system's Python still does not know it."""
    found = subprocess.run(["/usr/bin/python3", "-I", "-c", "import vmstate"], capture_output=True, cwd="/")
    assert found.returncode != 0
    for package in ("docopt", "zstandard", "gnupg", "tqdm", "numpy", "xxhash"):
        lacks = subprocess.run(["/usr/bin/python3", "-I", "-c", f"import {package}"], capture_output=True, cwd="/")
        assert bool(list((prefix / "lib/vmstate").glob(f"{package}*"))) == (lacks.returncode != 0), package


def test_destdir_and_uninstall(work: Path) -> None:
    """A package is built below DESTDIR, and the installed commands look for their library below PREFIX alone."""
    into = [f"DESTDIR={work}/stage", "PREFIX=/usr"]
    done = run("make", "-C", ROOT, "install", *into, timeout=200)
    assert done.status == 0, done.err
    command = (work / "stage/usr/bin/vm-dump").read_text()
    assert "'/usr/lib/vmstate'" in command
    assert str(work) not in command
    assert run("make", "-C", ROOT, "uninstall", *into).status == 0
    left = [path for path in (work / "stage").rglob("*") if path.is_file()]
    assert left == []
