"""What is measured on: two guests, their states as files, and QEMU's own ways as the peer.

The Linux guest has about 350 MB of RAM that is not zero: random data, and programs, libraries and texts of this system,
in which there is something to compress; `idle` and `dirtying` are the same, and count fast.  `cache` is full of such
files, `database` of the pages of an SQLite database whose rows are random; `half-N` has N GiB, half of them full of
files.  `metal` has no system; nearly all of its RAM is random data.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import DEADLINE, pipeline
from vm import Guest, Qmp, default_qemu, image
from vmstate.io.descriptors import HOLD
from vmstate.stream.description import End, validate_end

MIB = 1 << 20
# In memory, so that no disk is measured; where there is no room, wherever temporary files go.
MEMORY = Path("/dev/shm")
ROOM = 9 << 30
CONTENT = ("/usr/bin", "/usr/lib", "/usr/share")


class Events(Qmp):
    """A connection on which one can wait for an event."""

    def wait_for(self, name: str, **wanted: Any) -> float:
        """QEMU's own time of the first event of that name, with that data, since this was last asked; in seconds."""
        give_up = time.monotonic() + DEADLINE
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name and wanted.items() <= event.get("data", {}).items():
                    return float(event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6)
            self.events.append(self._receive(give_up))


class Lab:
    """The guests and files of one run, made when first asked for; all gone at its end."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.rounds = 1 if quick else 5
        self._guests: dict[str, Guest] = {}
        self._states: dict[str, Path] = {}
        roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM
        self.folder = Path(tempfile.mkdtemp(prefix="vm-", dir=MEMORY if roomy else None))
        self.in_memory = roomy

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self._guests.values():
            guest.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    # guests

    def options(self, kind: str) -> dict[str, Any]:
        if kind == "metal":
            return {"kind": "metal", "mem": 96 if self.quick else 2560}
        if kind == "linux":
            block = 16 if self.quick else 96
            initrd = ["-initrd", str(self._initrd(block))]
            return {"kind": "linux", "mem": 256 if self.quick else 2048, "append": f"block={block}", "extra": initrd}
        if kind in ("idle", "dirtying"):
            return self._ticking(self.options("linux"), " dirty=32" if kind == "dirtying" else "")
        if kind.startswith("half-"):
            gib = int(kind.partition("-")[2])
            size, mem = (32, 128 * gib) if self.quick else (256, 1024 * gib)
            words = f"block=16 tick=0.01 copies={(mem // 2 - 64) // size - 1}"
            return self._reading(self._disk("files", size), mem, words)
        size, mem = (48, 256) if self.quick else (1400, 2048)
        return self._reading(self._disk({"cache": "files", "database": "rows"}[kind], size), mem, "block=16")

    def _ticking(self, options: dict[str, Any], words: str) -> dict[str, Any]:
        """A guest that counts fast, with an image into which QEMU's `savevm` can save it."""
        image = self.folder / "savevm.qcow2"
        image.unlink(missing_ok=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1g"], check=True)
        drive = ["-drive", f"file={image},format=qcow2,if=none"]
        return {**options, "append": f"{options['append']} tick=0.02{words}", "extra": options["extra"] + drive}

    @staticmethod
    def _reading(disk: Path, mem: int, words: str) -> dict[str, Any]:
        """A guest that reads a disk as large as is to be in its memory."""
        drive = ["-drive", f"file={disk},format=raw,if=virtio,readonly=on"]
        return {"kind": "linux", "mem": mem, "append": f"{words} read=/dev/vda", "extra": drive}

    def _disk(self, what: str, mib: int) -> Path:
        path = self.folder / f"{what}-{mib}.img"
        if not path.exists():
            path.write_bytes(files(mib * MIB) if what == "files" else rows(mib * MIB, self.folder / "rows"))
        return path

    def size(self, kind: str) -> str:
        """How much of its RAM is not zero, in words."""
        linux, metal, full = ("100 MB", "80 MiB", "64 MiB") if self.quick else ("350 MB", "2.5 GiB", "1.5 GB")
        return {"linux": linux, "metal": metal}.get(kind, full)

    def guest(self, kind: str) -> Guest:
        """A guest that is up, and stands."""
        if kind not in self._guests:
            guest = self._guests[kind] = Guest(self.folder, kind, **self.options(kind))
            guest.start().wait_ready(120)
            guest.wait_count(5)
        self.stand(self._guests[kind])
        return self._guests[kind]

    def waiting(self, kind: str, name: str = "to") -> Guest:
        return Guest(self.folder, name, incoming="defer", **self.options(kind)).start()

    def drop(self, kind: str) -> None:
        if kind in self._guests:
            self._guests.pop(kind).end()

    @staticmethod
    def stand(guest: Guest) -> None:
        """Stopped, and ready to be dumped (again)."""
        if guest.wait_status("running", "paused", "postmigrate") == "postmigrate":
            guest.cmd("cont")
        guest.cmd("stop")

    def _initrd(self, mib: int) -> Path:
        """The test guest's, with one more file of `mib` MiB: this system's own files, each from a new page on."""
        path = self.folder / "initrd"
        if not path.exists():
            with path.open("wb") as out:
                out.write(cpio_header("content", mib * MIB))
                for folder in CONTENT:
                    out.write(content(folder, mib * MIB // len(CONTENT) + 1)[: 110 + 10 + mib * MIB - out.tell()])
                out.truncate(out.tell() + -out.tell() % 4)
                out.seek(0, os.SEEK_END)
                out.write(cpio_header("TRAILER!!!", 0))
                out.write(b"\0" * (-out.tell() % 512))
                out.write((image() / "initrd.gz").read_bytes())
        return path

    # states

    def state(self, kind: str) -> Path:
        """A state of that guest, saved while it ran."""
        if kind not in self._states:
            guest = self.guest(kind)
            guest.cmd("cont")
            path = self._states[kind] = self.folder / f"{kind}.state"
            pipeline(["vm-dump", "-q", guest.qmp], sink=path)
            judge_state(path)
        return self._states[kind]

    def packed(self, kind: str) -> Path:
        """The same, packed; the plain one is not kept."""
        path = self.folder / f"{kind}.vmz"
        if not path.exists():
            guest = self.guest(kind)
            guest.cmd("cont")
            pipeline(["vm-dump", "-q", guest.qmp], ["vm-compress"], sink=path)
            self.drop(kind)
        return path

    def forget(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


def cpio_header(name: str, size: int) -> bytes:
    """Of one file in an archive for the kernel (its Documentation/driver-api/early-userspace/buffer-format.rst)."""
    fields = (1, 0o100644, 1, 0, 0, 0, size, 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0"
    return header + b"\0" * (-len(header) % 4)


def content(folder: str, size: int) -> bytes:
    """`size` bytes of the files below `folder`, as a page cache would hold them."""
    data = bytearray()
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            if len(data) < size and os.path.isfile(path) and not os.path.islink(path) and os.access(path, os.R_OK):
                with open(path, "rb") as file:
                    data += file.read(size)
                data += b"\0" * (-len(data) % 4096)
        if len(data) >= size:
            break
    return bytes(data[:size].ljust(size, b"\0"))


def files(size: int) -> bytes:
    """`size` bytes of this system's files, again from the start where those are fewer."""
    data = bytearray()
    for folder in CONTENT:
        if len(data) < size:
            data += content(folder, size - len(data)).rstrip(b"\0")
            data += b"\0" * (-len(data) % 4096)
    return bytes((data * (size // len(data) + 1))[:size])


def rows(size: int, path: Path) -> bytes:
    """`size` bytes of an SQLite database: of 96 MiB at the most, again and again."""
    import random
    import sqlite3

    chance = random.Random(1)
    names = [chance.randbytes(5).hex() for _ in range(2000)]
    with contextlib.closing(sqlite3.connect(path)) as base:
        base.execute("pragma synchronous = off")
        base.execute(
            "create table entry (id integer primary key, account int, amount real, at text, who text, note blob)"
        )
        base.execute("create index by_account on entry (account)")
        while path.stat().st_size < min(size, 96 * MIB):
            made = (
                (
                    chance.randrange(1 << 30),
                    chance.random(),
                    f"2026-{chance.randrange(1, 13):02}-{chance.randrange(1, 29):02} "
                    f"{chance.randrange(24):02}:{chance.randrange(60):02}",
                    " ".join(chance.choices(names, k=3)),
                    chance.randbytes(chance.randrange(24)),
                )
                for _ in range(20000)
            )
            base.executemany("insert into entry (account, amount, at, who, note) values (?, ?, ?, ?, ?)", made)
            base.commit()
    data = path.read_bytes()
    path.unlink()
    return (data * (size // len(data) + 1))[:size]


# QEMU's own ways


def migrate(guest: Guest, command: str) -> float:
    """Seconds from QEMU's `migrate "exec:…"`, its bandwidth not limited, to its word that it has completed."""
    with Events(guest.path("test")) as monitor:
        monitor.timeout = DEADLINE
        monitor.cmd("migrate-set-parameters", **{"max-bandwidth": 0})
        tell(monitor, True)
        begun = time.perf_counter()
        monitor.cmd("migrate", uri=f"exec:{command}")
        monitor.wait_for("MIGRATION", status="completed")
        seconds = time.perf_counter() - begun
        tell(monitor, False)
    return seconds


def tell(monitor: Qmp, on: bool) -> None:
    """Have QEMU tell of its migration's progress."""
    monitor.cmd("migrate-set-capabilities", capabilities=[{"capability": "events", "state": on}])


def load(guest: Guest, state: Path) -> float:
    """Seconds from QEMU's own `migrate-incoming` to a running guest."""
    with Events(guest.path("test")) as monitor:
        begun = time.time()
        monitor.cmd("migrate-incoming", uri=f"exec:cat {shlex.quote(str(state))}")
        return monitor.wait_for("RESUME") - begun


def outcome(guest: Guest) -> dict[str, Any]:
    """What QEMU says of its last migration; RuntimeError unless it is completed."""
    info: dict[str, Any] = guest.cmd("query-migrate")
    if info["status"] != "completed":
        raise RuntimeError(f"the migration ended as {info}")
    return info


def judge_state(path: Path, decode: list[str] | None = None) -> tuple[int, End]:
    """Size and end of a state, once it has gone through `decode`; Damaged unless it is whole."""
    with path.open("rb") as file:
        if not decode:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - HOLD))
            return size, validate_end(file.read())
        child = subprocess.Popen(decode, stdin=file, stdout=subprocess.PIPE)
        assert child.stdout
        size, last = 0, b""
        while data := child.stdout.read(MIB):
            size, last = size + len(data), (last + data)[-2 * MIB :]
        if child.wait(60):
            raise RuntimeError(f"{decode!r} ended with {child.returncode}")
        return size, validate_end(last)


def versions() -> dict[str, str]:
    """Of the peers, by name."""
    names = {"qemu": default_qemu()[0], "gpg": "gpg", "gzip": "gzip", "zstd": "zstd", "lz4": "lz4"}
    return {name: version(command) for name, command in names.items() if shutil.which(command)}


def version(command: str) -> str:
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20)
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found else "?"
