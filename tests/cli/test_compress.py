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
from unit.packed import HARMLESS, Damage, frames
from unit.streams import BAD, state

# Most of what is packed here is no state.
COMMAND = (sys.executable, str(ROOT / "bin" / "vm-compress"), "--any")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "lib")}
BLOCK = 1 << 20
MEMORY = 256 << 20


def compress(*options: str | Path, **kwargs: Any) -> Done:
    return run(*COMMAND, *options, env=ENVIRONMENT, **kwargs)


def state_compress(*options: str | Path, **kwargs: Any) -> Done:
    """Of states alone."""
    return run(*COMMAND[:-1], *options, env=ENVIRONMENT, **kwargs)


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


def test_a_cut(work: Path) -> None:
    """One at every byte is tried in unit/vmz/test_file_format.py."""
    whole = compress(input=b"QEVM" + bytes(100)).out
    assert len(whole) < 400
    for cut in (1, 7, len(whole) // 2, len(whole) - 1):
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
    assert shell("head -c 1G /dev/zero | zstd -qc -1 --long=27 > bomb", work).status == 0
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


# States


@pytest.mark.parametrize("name", ["q35-10.0", "live-7.2"])
def test_a_state(name: str, work: Path) -> None:
    content = state(name)
    (work / "s").write_bytes(content)
    for options in ((), ("-5",), ("-T", "1"), ("--level=12",)):
        assert state_compress(*options, "-o", "s.vmz", "s", cwd=work) == Done(0, b"", "")
        whole = (work / "s.vmz").read_bytes()
        for back in ({"input": whole}, {"stdin": (work / "s.vmz").open("rb")}):
            done = state_compress("-d", **back)
            assert (done.status, done.out, done.err) == (0, content, "")
        assert state_compress("-d", "--any", "s.vmz", cwd=work).out == content
        assert state_compress("--test", "s.vmz", cwd=work) == Done(0, b"", "")
        assert state_compress("--test", input=whole) == Done(0, b"", "")
    assert f"{len(content) / 1024:.1f} KiB out" in state_compress("--test", "-v", input=whole).err


@pytest.mark.parametrize("name", BAD)
def test_no_whole_state(name: str, work: Path) -> None:
    """It is refused, and what has come out is no file to any of us."""
    (work / "s").write_bytes(state(name))
    done = state_compress("s", cwd=work)
    assert done.status == 3
    (work / "f").write_bytes(done.out)
    for command in ("vm-compress -d", "vm-compress --test --any", "vm-compress --list", "vm-verify", "vm-inspect"):
        for line in (f"{command} f", f"cat f | {command}"):
            assert shell(line, work).status == 3, line
    assert state_compress("-o", "named", "s", cwd=work).status == 3
    assert not (work / "named").exists()
    assert state_compress("--any", "-o", "named", "s", cwd=work).status == 0
    # Packed all the same, it is still no whole state to who wants one.
    for command in ("vm-compress -d", "vm-compress --test", "vm-verify", "cat named | vm-compress -d"):
        line = command if "named" in command else f"{command} named"
        assert shell(line, work).status == 3, line
    assert state_compress("-d", "--any", "named", cwd=work).out == state(name)


def test_other_bytes_need_to_be_asked_for(work: Path) -> None:
    (work / "f").write_bytes(b"no state" * 1000)
    done = state_compress("f", cwd=work)
    assert (done.status, done.out) == (3, b"")
    assert "hint: with --any other bytes than those of a state are taken" in done.err
    packed = compress("f", cwd=work).out
    done = state_compress("-d", input=packed)
    assert (done.status, done.out) == (3, b"")
    assert "hint: with --any " in done.err
    assert state_compress("--test", input=packed).status == 3
    assert compress("--test", input=packed) == Done(0, b"", "")


def test_a_foreign_file_is_judged(work: Path) -> None:
    """Of a zstd file the content is judged as a state, unless it may be any bytes."""
    content = state("pc-7.2")
    (work / "s").write_bytes(content)
    packed = run("zstd", "-qc", "s", cwd=work).out
    for options in (("-d",), ("-d", "--any")):
        assert state_compress(*options, input=packed) == Done(0, content, "")
    assert state_compress("--test", input=packed) == Done(0, b"", "")
    (work / "s").write_bytes(content[:-1])
    cut = run("zstd", "-qc", "s", cwd=work).out
    done = state_compress("-d", input=cut)
    assert (done.status, done.out) == (3, b"")
    assert "truncated at offset" in done.err
    assert compress("-d", input=cut) == Done(0, content[:-1], "")
    assert state_compress("--test", input=cut).status == 3


def test_damaged_states(work: Path) -> None:
    """tests/long/check_vmz.py has more of them, and larger ones."""
    damage = Damage(state_compress(input=state("q35-7.2")).out)
    changes = [*damage.flips(30), *damage.flips_between(20), *damage.cuts(50)][:100]
    assert len(changes) == 100

    def judge(which: int) -> None:
        for number, change in list(enumerate(changes))[which::2]:
            path = work / f"f{which}"
            path.write_bytes(change.data)
            options, source = (("-d", path), {}) if number % 4 < 2 else (("-d",), {"input": change.data})
            done = state_compress(*options, **source)
            if done.status == 0 and int(change.what.split()[1].rstrip(",")) in HARMLESS:
                assert done.out == damage.content, change.what
                continue
            if done.status != 3 or len(done.out) > damage.mark or not damage.content.startswith(done.out):
                wrong.append(change.what)

    wrong: list[str] = []
    threads = [threading.Thread(target=judge, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
        assert not thread.is_alive()
    assert not wrong


# What a file says


def listed(data: bytes, work: Path) -> dict[str, Any]:
    """The same from a file and from a pipe."""
    (work / "f").write_bytes(data)
    by_name, by_pipe = (
        state_compress("--list", "--json", **source) for source in ({"stdin": (work / "f").open("rb")}, {"input": data})
    )
    assert (by_name.status, by_name.err) == (0, "")
    assert by_pipe == by_name
    assert state_compress("--list", "--json", "f", cwd=work) == by_name
    found: dict[str, Any] = json.loads(by_name.out)
    assert (found["type"], found["status"], found["vmstate"]) == ("list", 0, 1)
    return found


def test_a_list_of_a_state(work: Path) -> None:
    content = state("live-10.0")
    packed = state_compress(input=content).out
    found = listed(packed, work)
    assert (found["machine"], found["content"], found["packed"]) == ("pc-i440fx-10.0", len(content), len(packed))
    assert found["runstate"] == "running"
    assert found["frames"] == sum(frame.number is None for frame in frames(packed))
    assert (found["groups"], found["ratio"]) == (1, round(len(content) / len(packed), 3))
    assert found["ram"] >= 2 << 20
    assert 0 < found["index"] < 5000
    assert found["runs"] > 5
    text = state_compress("--list", "f", cwd=work).text
    assert "holds    a state of a pc-i440fx-10.0 that was running\n" in text
    assert f"({len(content):,} bytes)\n" in text
    assert re.search(r"^index    [\d.]+ \w+, [\d.]+ % of [\d.]+ MiB of RAM; \d+ runs of pages$", text, re.MULTILINE)
    assert state_compress("--list", input=packed).text == text


def test_a_list_of_other_bytes(work: Path) -> None:
    packed = compress(input=some(9 * BLOCK)).out
    found = listed(packed, work)
    assert [found[name] for name in ("machine", "runstate", "index", "ram", "runs")] == [None] * 5
    assert (found["content"], found["groups"]) == (9 * BLOCK, len([f for f in frames(packed) if f.number == 7]))
    text = state_compress("--list", "f", cwd=work).text
    assert text.startswith("holds    bytes that were not judged (--any)\n")
    assert "index" not in text


def test_a_list_of_what_is_no_vmz(work: Path) -> None:
    (work / "s").write_bytes(state("pc-7.2"))
    assert shell("zstd -qf s; gzip -c s > s.gz", work).status == 0
    for name, words, hint in (
        ("s.zst", "no .vmz: found a zstd file", "hint: zstd -l tells of zstd files"),
        ("s", "no .vmz: found a plain state of a guest", ""),
        ("s.gz", "no .vmz: found a gzip file", ""),
    ):
        for line in (f"vm-compress --list {name}", f"cat {name} | vm-compress --list"):
            done = shell(line, work)
            assert (done.status, done.out) == (1, b""), done.err
            assert words in done.err
            assert hint in done.err


def test_a_list_of_a_damaged_one(work: Path) -> None:
    whole = state_compress(input=state("pc-7.2")).out
    for data in (b"", whole[:-1], whole[: frames(whole)[-2].at], whole + b"x", whole + whole):
        (work / "f").write_bytes(data)
        for line in ("vm-compress --list f", "cat f | vm-compress --list"):
            done = shell(line, work)
            assert (done.status, done.out) == (3, b""), done.err


def many_pages(path: Path, count: int) -> None:
    """A state of hundreds of megabytes: the first page is sent `count` times."""
    content = state("pc-7.2")
    end = b"\0\0\0\0\0\0\0\x10"
    at = content.index(end + b"\x7e") + 13
    number = content[at - 4 : at]
    bodies = [b"\0\0\0\0\0\0\0\x08\6pc.ram" + some(4096) for _ in range(1000)]
    with path.open("wb") as file:
        file.write(content[:at] + b"\2" + number)
        for _ in range(count // 1000):
            file.write(b"".join(bodies))
        file.write(end + b"\x7e" + number + content[at:])


@pytest.mark.parametrize("options", ["", "-9 -T 64"])
def test_a_large_state_takes_little_memory(options: str, work: Path) -> None:
    """In both directions, with its index; and from a file and a pipe."""
    many_pages(work / "s", 75_000)
    assert (work / "s").stat().st_size > MEMORY
    command = " ".join(COMMAND[:-1])
    for line in (
        f"{command} {options} s > f",
        f"cat s | {command} {options} > f",
        f"{command} -d f | cmp - s",
        f"cat f | {command} -T 64 -d | cmp - s",
        f"{command} --test f",
    ):
        status, most = peak(line, work)
        assert (status, most < MEMORY) == (0, True), (line, most)
    found = json.loads(state_compress("--list", "--json", "f", cwd=work).out)
    assert found["index"] < 5000
