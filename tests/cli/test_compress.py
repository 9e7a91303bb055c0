"""vm-compress as a command, beside the programs that it must get on with."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Done, run, shell

# Most of what is packed here is no state.
COMMAND = (sys.executable, str(ROOT / "bin" / "vm-compress"), "--any")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
BLOCK = 1 << 20
MEMORY = 256 << 20


def compress(*options: str | Path, **kwargs: Any) -> Done:
    return run(*COMMAND, *options, env=ENVIRONMENT, **kwargs)


def some(length: int) -> bytes:
    """Neither random nor empty, as memory is."""
    return (os.urandom(1000) + bytes(3000)) * (length // 4000) + os.urandom(length % 4000)


def peak(command: str, folder: Path) -> tuple[int, int]:
    """Exit status of a shell's last command, and the most memory in bytes that any of its commands used."""
    script = f"import resource, subprocess, sys\nstatus = subprocess.call(['bash', '-c', {command!r}], timeout=120)\n"
    script += "print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    status, kibibytes = run(sys.executable, "-c", script, cwd=folder, timeout=150, env=ENVIRONMENT).text.split()
    return int(status), int(kibibytes) << 10


@pytest.mark.parametrize("options", [(), ("-1",), ("-9",), ("-T", "1"), ("-T0",), ("--level=12", "--threads", "3")])
def test_zstd_reads_it(options: tuple[str, ...], work: Path) -> None:
    for length in (1, 65536, 131071, 131072, 131073, BLOCK - 1, BLOCK, BLOCK + 1, 20 * BLOCK + 7):
        (work / "plain").write_bytes(some(length))
        assert compress(*options, "-o", "packed", "plain", cwd=work) == Done(0, b"", "")
        assert run("zstd", "-qt", "packed", cwd=work).status == 0
        assert shell("zstd -dcq packed | cmp - plain", work) == Done(0, b"", "")
        assert compress("-d", "packed", cwd=work).out == (work / "plain").read_bytes()


@pytest.mark.parametrize(
    "pack",
    [
        "zstd -1",
        "zstd -19",
        "zstd -3 --long=27",
        "zstd --no-check",
        "zstd -T2 -B512K",
        "zstd -1 -T2 --rsyncable",
        "zstd --stream-size=5000001",
    ],
)
def test_it_reads_what_zstd_has_packed(pack: str, work: Path) -> None:
    content = some(5_000_001)
    (work / "plain").write_bytes(content)
    packed = run("bash", "-c", f"{pack} -qc < plain; {pack} -qc plain", cwd=work).out
    assert compress("-d", input=packed).out == content * 2
    for cut in (1, 3, 4, 5, 9, len(packed) // 2, len(packed) - 1):
        done = compress("-d", input=packed[:cut])
        assert done.status == 3 or cut == len(packed) // 2
        assert content.startswith(done.out[: len(content)])


def test_pieces_as_slow_pipes_give_them(work: Path) -> None:
    (work / "plain").write_bytes(some(300_000))
    script = "dd if=plain bs=777 status=none | {0} | dd bs=1 status=none | {0} -d | cmp - plain"
    line = script.format(" ".join(COMMAND))
    assert shell(line, work, env=ENVIRONMENT) == Done(0, b"", "")


def test_a_cut_at_every_byte(work: Path) -> None:
    whole = compress(input=b"QEVM" + bytes(100)).out
    assert len(whole) < 400
    for cut in range(1, len(whole)):
        done = compress("-d", input=whole[:cut])
        assert (done.status, done.err.startswith(f"vm-compress: error: truncated at offset {cut}, ")) == (3, True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the input is empty"),
        (b"QEVM" + bytes(40), "found a plain state of a guest at offset 0\nvm-compress: hint: it is not compressed"),
        (b"\x1f\x8b\x08" + bytes(40), "found a gzip file at offset 0\nvm-compress: hint: unpack it with: gzip -dc"),
        (b"BZh91AY" + bytes(40), "found a bzip2 file"),
        (b"\xfd7zXZ\0" + bytes(40), "found a xz file"),
        (b"\x85\1\x8c\3" + bytes(40), "found an OpenPGP message at offset 0\nvm-compress: hint: decrypt it with"),
        (b"nothing known" + bytes(40), "found b'nothing '"),
    ],
)
def test_what_is_no_zstd_file(data: bytes, words: str) -> None:
    done = compress("-d", input=data)
    assert (done.status, done.out) == (3, b"")
    assert words in done.err


def test_damage_far_inside(work: Path) -> None:
    content = some(20 * BLOCK)
    packed = compress(input=content).out
    for at in range(6, len(packed), len(packed) // 25):
        changed = bytearray(packed)
        changed[at] ^= 0x10
        done = compress("-d", input=bytes(changed))
        assert done.status == 3, at
        assert re.match("vm-compress: error: (corrupt|truncated|junk|end record|a .vmz of|no table|table)", done.err)
    done = compress("-d", input=packed + b"junk")
    assert (done.status, done.out) == (3, content[: len(done.out)])
    assert f"junk behind the seek table, at offset {len(packed)}: expected the end, found b'junk'" in done.err


def test_an_empty_input_leaves_nothing(work: Path) -> None:
    assert compress("-o", "f", cwd=work).status == 3
    assert compress("-d", "-o", "f", cwd=work).status == 3
    assert list(work.iterdir()) == []
    assert compress().out == b""


def test_a_damaged_input_leaves_the_old_output(work: Path) -> None:
    packed = compress(input=some(BLOCK)).out
    (work / "f").write_bytes(b"old")
    (work / "cut").write_bytes(packed[:-1])
    assert compress("-d", "-o", "f", "cut", cwd=work).status == 3
    assert (work / "f").read_bytes() == b"old"
    assert len(list(work.iterdir())) == 2


@pytest.mark.parametrize(
    "options",
    [
        ("--level", "0"),
        ("--level", "20"),
        ("--level", "-1"),
        ("--level", "three"),
        ("--level", "²"),
        ("-T", "-1"),
        ("-T", "257"),
        ("-T", "two"),
        ("-3", "--level", "3"),
        ("-3", "-4"),
        ("-19",),
        ("-d", "-3"),
        ("-d", "--level", "3"),
        ("-d", "--test"),
        ("--test",),
        ("--list",),
        ("--list", "-T", "2"),
        ("-v", "-q"),
        ("-0",),
        ("a", "b"),
    ],
)
def test_wrong_usage_is_settled_first(options: tuple[str, ...], work: Path) -> None:
    done = compress("-o", "f", *options, cwd=work)
    assert (done.status, done.out, list(work.iterdir())) == (2, b"", []), done.err


def test_what_cannot_be_read(work: Path) -> None:
    for options in ((), ("-d",)):
        done = compress(*options, ".", cwd=work)
        assert done.status == 1
        assert "Is a directory" in done.err


def test_a_connection_that_breaks(work: Path) -> None:
    """What came before must not look whole."""
    with broken_connection(some(3 * BLOCK)) as source:
        done = compress(stdin=source)
    assert done.status == 1
    assert "Connection reset" in done.err
    assert compress("-d", input=done.out).status == 3


def broken_connection(data: bytes) -> socket.socket:
    """A TCP connection that gives `data` and is then reset."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs = server.accept()[0]

    def give() -> None:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.sendall(data)
        time.sleep(0.7)
        theirs.close()

    threading.Thread(target=give, daemon=True).start()
    return ours


def test_a_writer_that_is_killed(work: Path) -> None:
    """Whoever is killed in the middle leaves a cut, and the next one sees it."""
    (work / "plain").write_bytes(some(8 * BLOCK))
    script = "(head -c 5000000 plain; sleep 60) | {0} > f & sleep 1; kill -9 $!; {0} -d f > g"
    done = shell(script.format(" ".join(COMMAND)), work, env=ENVIRONMENT)
    assert done.status == 3
    assert "truncated" in done.err or "empty" in done.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_takes_the_half_result_away(number: int, work: Path) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen([*COMMAND, "-o", "f"], cwd=work, stdin=reading, env=ENVIRONMENT, stderr=subprocess.PIPE)
    try:
        os.write(writing, b"QEVM")
        deadline = time.monotonic() + 20
        while not list(work.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(work.iterdir())
        time.sleep(0.2)
        process.send_signal(number)
        assert process.communicate(timeout=20)[1] == b""
    finally:
        process.kill()
        process.wait(10)
        os.close(reading)
        os.close(writing)
    assert process.returncode == -number
    assert list(work.iterdir()) == []


def test_words_and_objects(work: Path) -> None:
    (work / "f").write_bytes(bytes(3 * BLOCK))
    assert re.fullmatch(
        r"vm-compress: note: 3\.0 MiB in, \d\.\d KiB out, \d+\.\d\d:1\n", compress("-v", "-o", "g", "f", cwd=work).err
    )
    assert "3.0 MiB out" in compress("-d", "-v", "g", cwd=work).err
    assert json.loads(compress("--json", "-v", "f", cwd=work).err)["type"] == "note"
    (line,) = compress("--json", "-d", "f", cwd=work).err.splitlines()
    assert (json.loads(line)["status"], json.loads(line)["type"]) == (3, "error")


def test_standard_output_that_is_a_file(work: Path) -> None:
    (work / "f").write_bytes(some(BLOCK))
    assert shell(f"{' '.join(COMMAND)} < f > g", work, env=ENVIRONMENT).status == 0
    assert (work / "f").read_bytes() == compress("-d", "g", cwd=work).out
    # Behind what is there already: two files, of which each has its own end.
    assert shell(f"{' '.join(COMMAND)} < f >> g", work, env=ENVIRONMENT).status == 0
    done = compress("-d", "-", cwd=work, stdin=(work / "g").open("rb"))
    assert done.status == 3
    assert "junk behind the seek table" in done.err
    assert run("zstd", "-dqc", "g", cwd=work).out == (work / "f").read_bytes() * 2


def test_a_bomb_takes_little_memory(work: Path) -> None:
    assert shell("head -c 3G /dev/zero | zstd -qc -19 --long=27 -T2 > bomb", work).status == 0
    assert (work / "bomb").stat().st_size < 500_000
    status, most = peak(f"{' '.join(COMMAND)} -d bomb | tail -c 1 | cmp -n 1 - /dev/zero", work)
    assert status == 0
    assert most < MEMORY


def test_a_large_window_is_refused_at_once(work: Path) -> None:
    (work / "f").write_bytes(some(200 * BLOCK))
    assert shell("zstd -q -1 --long=28 -c < f > g", work).status == 0
    status, most = peak(f"{' '.join(COMMAND)} -d g > h", work)
    assert (status, (work / "h").stat().st_size) == (3, 0)
    assert most < 64 << 20
    assert "wants a window of 256 MiB, more than 128 MiB\n" in compress("-d", "g", cwd=work).err
    assert shell("zstd -q -1 --long=27 -c < f > g", work).status == 0
    status, most = peak(f"{' '.join(COMMAND)} -d g | cmp - f", work)
    assert status == 0
    assert most < MEMORY


@pytest.mark.parametrize("options", ["", "-T 64", "-5 -T 64", "-9 -T 64"])
def test_packing_takes_little_memory(options: str, work: Path) -> None:
    piece = some(4 * BLOCK)
    with (work / "f").open("wb") as file:
        for _ in range(40):
            file.write(piece)
            file.write(os.urandom(500_000))
    status, most = peak(f"{' '.join(COMMAND)} {options} f > g", work)
    assert status == 0
    assert most < MEMORY
