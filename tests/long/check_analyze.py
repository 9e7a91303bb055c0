"""Our decoding of device sections beside that of QEMU's own scripts/analyze-migration.py.

    .venv/bin/pytest -s tests/long/check_analyze.py

The script comes from Debian's source package of QEMU 10.0, by the archive that apt of this system uses, once, to
.cache/analyze.  Not among the tests of `make check`, since it needs the network and 40 MB.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest
from unit.stream.test_devices import ALL, devices, encoded
from unit.streams import state
from vmstate.stream import device_values
from vmstate.stream.device_values import Device, Field, Struct

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "analyze"
SUITE = "trixie"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Without lengths of their own in the stream, and read by the script in ways of its own.
NOT_OURS = ("ram", "configuration")


@pytest.fixture(scope="session")
def script() -> Path:
    path = CACHE / "analyze-migration.py"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            fetch(Path(folder), path)
    return path


def fetch(folder: Path, path: Path) -> None:
    show = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    archives = sorted({line for line in output(*show).splitlines() if "security" not in line})
    if not archives:
        pytest.skip("apt knows no archive of Debian")
    sources, key = folder / "sources.list", f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    sources.write_text(f"deb-src {key}{archives[0]} {SUITE} main\n")
    (folder / "lists" / "partial").mkdir(parents=True)
    settings = {"Etc::sourcelist": sources, "Etc::sourceparts": "-", "State::lists": folder / "lists", "Cache": folder}
    apt = ["apt-get", "-q", *(word for key, value in settings.items() for word in ("-o", f"Dir::{key}={value}"))]
    output(*apt, "update")
    output(*apt, "source", "--download-only", "qemu", cwd=folder)
    (archive,) = folder.glob("qemu_*.orig.tar.xz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r|xz") as tar:
        member = next(member for member in tar if member.name.endswith("/scripts/analyze-migration.py"))
        whole = tar.extractfile(member)
        assert whole
        path.write_bytes(whole.read())


def readable(data: bytes) -> bytes:
    """The script knows subsections of the configuration only where the description has them, as of QEMU 10.0."""
    page_bits = b"\5\x1econfiguration/target-page-bits\0\0\0\1"
    at = data.find(page_bits, 0, 1000)
    if at < 0 or b'"configuration"' in data[data.rfind(b"\0") :]:
        return data
    return data[:at] + data[at + len(page_bits) + 4 :]


def output(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


class Comparison:
    """Counts fields; one of the lists has those that differ, as text."""

    def __init__(self, device: Device) -> None:
        self.device, self.same, self.different = device, 0, list[str]()

    def struct(self, ours: Struct, theirs: Any, path: str) -> None:
        names = [field.name for field in ours.fields] + [part.name for part in ours.subsections]
        if not isinstance(theirs, dict) or list(theirs) != names:
            self.different.append(f"{path}: {names} and {str(theirs)[:200]}")
            return
        for field in ours.fields:
            self.field(field, theirs[field.name], f"{path}.{field.name}")
        for part in ours.subsections:
            self.struct(part, theirs[part.name], f"{path}.{part.name}")

    def field(self, ours: Field, theirs: Any, path: str) -> None:
        if isinstance(theirs, list) and isinstance(ours.value, list):
            self.array(ours, theirs, path)
        elif isinstance(theirs, dict) and isinstance(ours.value, Struct):
            self.struct(ours.value, theirs, path)
        else:
            self.note(self.alike(ours, theirs), path, ours.value, theirs)

    def array(self, ours: Field, theirs: list[Any], path: str) -> None:
        if len(theirs) != len(ours.value):
            self.note(False, path, len(ours.value), len(theirs))
        elif any(isinstance(value, Struct) for value in ours.value):
            for i, one in enumerate(theirs):
                self.field(device_values._element(ours, i), one, f"{path}[{i}]")
        else:
            width = ours.size // len(theirs)
            parts = [Field("", ours.type, ours.offset + i * width, width, value) for i, value in enumerate(ours.value)]
            wrong = [i for i, part in enumerate(parts) if not self.alike(part, theirs[i])]
            self.note(not wrong, path, [ours.value[i] for i in wrong[:3]], [theirs[i] for i in wrong[:3]])

    def alike(self, ours: Field, theirs: Any) -> bool:
        """The script has true and false; numbers as 0x00ff or 0xff (-1); all that it does not know as 00 ff."""
        if isinstance(theirs, bool):
            return theirs is ours.value
        if theirs == "nullptr":
            return ours.value is None
        if isinstance(theirs, str) and theirs.startswith("0x"):
            bits, _, signed = theirs.partition(" (")
            number = int(signed.rstrip(")")) if signed else int(bits, 16)
            return type(ours.value) is int and number == ours.value
        raw = self.device.raw[ours.offset : ours.offset + ours.size]
        return theirs == raw.hex(" ") == encoded(ours.value, ours.type, ours.size).hex(" ")

    def note(self, same: bool, path: str, ours: Any, theirs: Any) -> None:
        if same:
            self.same += 1
        else:
            self.different.append(f"{path}: {str(ours)[:200]} and {str(theirs)[:200]}")


@pytest.mark.parametrize("name", ALL)
def test_as_qemu_reads_it(name: str, script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = devices(name)
    (tmp_path / "state").write_bytes(readable(state(name)))
    command = [sys.executable, str(script), "-f", str(tmp_path / "state"), "-d", "state"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]
        pytest.skip(f"{name}: the script fails: {reason[1][:200] if len(reason) > 1 else reason}")
    read = [(key.rsplit(" (", 1)[0], value) for key, value in json.loads(done.stdout).items()]
    # Sections before RAM are not in our list.
    theirs = [(key, value) for key, value in read if key not in NOT_OURS][-len(ours) :]
    assert [key for key, _ in theirs] == [device.name for device in ours]
    different, same, whole = [], 0, 0
    for device, (_, value) in zip(ours, theirs, strict=True):
        comparison = Comparison(device)
        assert device.root
        comparison.struct(device.root, value, device.name)
        different += comparison.different
        same += comparison.same
        whole += not comparison.different
    with capsys.disabled():
        print(f"\n{name}: {whole} of {len(ours)} devices and {same} fields agree, {len(different)} fields do not")
        print("\n".join(different))
    assert not different
