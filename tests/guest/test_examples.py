"""Every command line of the README and of the manual pages is run as it stands there.

A block runs in a folder of its own.  It finds there what it names: a guest a.qmp that runs, a guest b.qmp that waits,
states of that guest in files, a bridge br0, and a host hostb, which is this one again, with b.qmp in /run as well.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import BIN, ROOT, Done, run
from vm import Guest, Qmp, until

pytestmark = [pytest.mark.guest, pytest.mark.root, pytest.mark.netns]


class Small(Guest):
    """The one whose command line stands in the examples: firmware that looks in vain for a system."""

    def __init__(self, folder: Path, name: str, incoming: str | None = None) -> None:
        card = ["-nic", "user,model=virtio-net-pci"]
        super().__init__(folder, name, accel="tcg", net=card, incoming=incoming, qemu="qemu-system-x86_64")

    def _kernel(self) -> list[str]:
        return []


def of_a_page(page: Path) -> list[str]:
    """The blocks of an mdoc page: of the examples, of the whole page where it has none."""
    text = page.read_text()
    if "\n.Sh EXAMPLES\n" in text:
        text = text.split("\n.Sh EXAMPLES\n")[1].split("\n.Sh ")[0]
    found = re.findall(r"^\.Bd -literal.*?\n(.*?)^\.Ed$|^\.Dl (.*?)$", text, re.DOTALL | re.MULTILINE)
    return [(block or line).replace(r"\e", "\\").replace(r"\-", "-").replace(r"\&", "") for block, line in found]


def of_the_readme() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def pages() -> dict[str, list[str]]:
    found = {page.name: of_a_page(page) for page in sorted((ROOT / "man").iterdir())}
    return {"README.md": of_the_readme(), **found}


def cases() -> list[object]:
    """One of each block or, where a block listens, of that block and the next one."""
    found = []
    for page, blocks in pages().items():
        rest = list(blocks)
        while rest:
            count = 2 if "nc -l" in rest[0] else 1
            lines, rest = rest[:count], rest[count:]
            marks = () if page == "README.md" else pytest.mark.more
            found.append(pytest.param(lines, id=f"{page}: {lines[-1].splitlines()[0][:60]}", marks=marks))
    return found


@pytest.mark.parametrize("page", pages())
def test_each_has_examples(page: str) -> None:
    assert pages()[page]


def test_the_readme_has_no_others() -> None:
    """What is not run as an example is one of the two that set up everything themselves, or an installation."""
    text = (ROOT / "README.md").read_text()
    rest = re.sub(r"^```sh\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.findall(r"^```\n(.*?)^```$", rest, re.DOTALL | re.MULTILINE):
        assert all(line.startswith("make ") for line in block.splitlines()), block


@dataclass
class World:
    """The folder in which a block is typed, and what it names."""

    folder: Path
    made: dict[str, Guest] = field(default_factory=dict)

    def furnish(self, blocks: list[str], states: Path) -> None:
        text = "\n".join(blocks)
        # Whoever saves a guest makes the file, all others find one.
        if "vm-dump" not in text and "(qemu)" not in text:
            for name in os.listdir(states):
                shutil.copy(states / name, self.folder)
        if "a.qmp" in text or "(qemu)" in text:
            self.made["a"] = Small(self.folder, "a").start()
        if "b.qmp" in text:
            self.made["b"] = Small(self.folder, "b", "defer").start()

    def type(self, block: str) -> Done:
        """In a shell, with a network and a file /etc/hosts of its own; lines for QEMU's monitor there."""
        if block.startswith("(qemu) "):
            return self._type_in_the_monitor(block)
        script = f". {self.folder}/setup\n{block}"
        return run("unshare", "--net", "--mount", "bash", "-o", "pipefail", "-c", script, cwd=self.folder)

    def type_both(self, blocks: list[str]) -> Done:
        """The first one listens in the background while the second is typed; both count."""
        first, second = blocks
        return self.type(f"( {first.strip()} ) & listens 4444\n{second} wait $!")

    def _type_in_the_monitor(self, block: str) -> Done:
        guest = self.made["a"]
        for line in block.splitlines():
            words = guest.cmd("human-monitor-command", **{"command-line": line.removeprefix("(qemu) ")})
            assert "Error" not in words
        until(lambda: guest.cmd("query-migrate").get("status") in ("completed", "failed"), 60, "the end of it")
        return Done(0 if guest.cmd("query-migrate")["status"] == "completed" else 1, b"", "")

    def end(self) -> None:
        for guest in self.made.values():
            guest.end()
        # What a block has started.
        for path in self.folder.glob("*.qmp"):
            if path.stem not in self.made:
                with Qmp(path) as monitor:
                    monitor.cmd("quit")


SETUP = """
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ln -s "$PWD/b.qmp" /run/b.qmp
ip link set lo up
ip link add br0 type bridge
ip link set br0 up
printf '127.0.0.1 localhost hostb\\n' > hosts
mount --bind hosts /etc/hosts
mount --bind ssh_config /etc/ssh/ssh_config
/usr/sbin/sshd -D -e -f sshd_config 2> sshd.log &
trap 'kill $sshd' EXIT
sshd=$!
disown
listens() {
    for i in {1..100}; do ! ss -ltn | grep -q ":$1" || return 0; sleep 0.1; done
    return 1
}
listens 22
"""


@pytest.fixture
def world(work: Path, gnupg: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # QEMU takes a path in its monitor for one in the folder where it was started.
    monkeypatch.chdir(work)
    (work / "setup").write_text(SETUP)
    (work / "ssh_config").write_text(f"IdentityFile {keys}/user\nUserKnownHostsFile {keys}/known\nBatchMode yes\n")
    (work / "sshd_config").write_text(
        f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        f"SetEnv PATH={BIN}:{os.environ['PATH']} GNUPGHOME={gnupg}\n"
        f'ForceCommand cd {work} && eval "$SSH_ORIGINAL_COMMAND"\n'
    )
    made = World(work)
    yield made
    made.end()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        assert run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name).status == 0
    (folder / "known").write_text(f"hostb {(folder / 'host.pub').read_text()}")
    return folder


@pytest.fixture(scope="module")
def saved(gnupg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of a guest that ran, and one of a guest that had been paused."""
    folder = tmp_path_factory.mktemp("saved")
    script = """
        vm-dump -q a.qmp > s.state && vm-cont a.qmp && vm-dump -q --stop a.qmp | gzip -c > STATEFILE.gz
        vm-compress -o s.vmz s.state && gzip -1 -c s.state > s.gz
        gzip -c -d STATEFILE.gz | vm-compress -o later.vmz
        for file in s.state s.vmz; do gpg -q -e -z 0 -r me@example.org -o $file.gpg $file; done
        mv s.state.gpg STATEFILE.gpg
        cp s.vmz state.vmz && cp s.vmz.gpg state.vmz.gpg
    """
    with Small(folder, "a").start():
        assert run("bash", "-o", "pipefail", "-e", "-c", script, cwd=folder).status == 0
    for path in folder.glob("a.*"):
        path.unlink()
    return folder


def arrives(text: str) -> bool:
    """Whether it brings a guest to b.qmp."""
    return bool(re.search(r"vm-restore|ssh://", text)) and not re.search(r"--dry-run|--recover", text)


@pytest.mark.parametrize("blocks", cases())
def test_as_written(blocks: list[str], world: World, saved: Path) -> None:
    world.furnish(blocks, saved)
    done = world.type_both(blocks) if len(blocks) == 2 else world.type(blocks[0])
    assert done.status == 0, done.err
    assert "error:" not in done.err
    assert "warning:" not in done.err
    text = "\n".join(blocks)
    for name in os.listdir(saved):
        assert (world.folder / name).exists() or not re.search(rf"\b{name}\b(?!\.)", text)
    if "vm-migrate -d" in text:
        world.made["b"].wait_status("running")
    stands = {name: guest.status() for name, guest in world.made.items()}
    if "b" in stands and arrives(text):
        assert stands["b"] == "running"
        assert list(stands.values()).count("running") == 1
