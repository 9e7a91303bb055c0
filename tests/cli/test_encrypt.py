"""vm-encrypt as a command: gpg on the other side, and every way in which a message or a run of it can be cut."""

import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Done, run, shell

COMMAND = (sys.executable, str(ROOT / "bin" / "vm-encrypt"))
LINE = " ".join(COMMAND)
ME = ("-r", "me@example.org")
BLOCK = 1 << 20
HOLD = 16 << 20


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "lib")}


def encrypt(*options: str | Path, **kwargs: Any) -> Done:
    return run(*COMMAND, *options, env=kwargs.pop("env", environment()), **kwargs)


def gpg(*options: str, **kwargs: Any) -> Done:
    return run("gpg", "--batch", "-q", *options, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def home(gnupg: Path) -> Path:
    return gnupg


@pytest.fixture(scope="module")
def stranger(gnupg: Path) -> Iterator[Path]:
    """Somebody else's home; his public key is known in ours, and not signed."""
    with other_home() as folder:
        made = gpg("--homedir", str(folder), "--passphrase", "", "--quick-gen-key", "foreign@example.org", "default")
        assert made.status == 0, made.err
        public = gpg("--homedir", str(folder), "--export", "foreign@example.org").out
        assert gpg("--import", input=public).status == 0
        yield folder
        # Made anew for a test that is run once more: a name that fits two keys is refused.
        listed = gpg("--with-colons", "--list-keys", "foreign@example.org").text
        gpg("--yes", "--delete-keys", *re.findall(r"(?m)^fpr:+([0-9A-F]{40}):", listed)[:1])


class other_home:  # noqa: N801
    """A GnuPG home that goes away with its agent."""

    def __enter__(self) -> Path:
        self.folder = Path(tempfile.mkdtemp(prefix="gpg-"))
        return self.folder

    def __exit__(self, *_exc: object) -> None:
        run("gpgconf", "--homedir", self.folder, "--kill", "all")
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(300_000)


@pytest.fixture(scope="module")
def message(gnupg: Path, content: bytes) -> bytes:
    return encrypt(*ME, input=content).out


@pytest.mark.parametrize("length", [1, 2, 8191, 8192, 65536, BLOCK - 1, BLOCK, BLOCK + 1, HOLD, HOLD + BLOCK + 1])
def test_there_and_back(length: int, work: Path) -> None:
    plain = os.urandom(length)
    (work / "f").write_bytes(plain)
    assert encrypt(*ME, "-o", "g", "f", cwd=work) == Done(0, b"", "")
    assert stat.S_IMODE((work / "g").stat().st_mode) == 0o600
    # As a file, through a pipe, and by gpg itself.
    assert encrypt("-d", "g", cwd=work).out == plain
    assert shell(f"cat f | {LINE} -r me@example.org | cat | {LINE} -d | cmp - f", work, env=environment()).status == 0
    assert gpg("-d", "g", cwd=work).out == plain
    assert len((work / "g").read_bytes()) < length * 1.01 + 1000, "gpg has not packed it, nor wrapped it in text"


@pytest.mark.parametrize(
    "options", ["", "-z 0", "--cipher-algo AES", "-z 0 --throw-keyids", "-s", "--personal-digest SHA512"]
)
def test_it_reads_what_gpg_has_encrypted(options: str, work: Path) -> None:
    (work / "f").write_bytes(os.urandom(200_000))
    for line in (
        f"gpg --batch -q {options} -r me@example.org -e",
        f"gpg --batch -q {options} -r me@example.org -o g -e f",
    ):
        script = line + (" < f > g" if " -o " not in line else "; true")
        (work / "g").unlink(missing_ok=True)
        assert shell(script, work).status == 0
        assert encrypt("-d", "g", cwd=work) == Done(0, (work / "f").read_bytes(), "")


def test_who_writes_and_reads_alike() -> None:
    """One program on both sides, which never waits for the one while the other could go on."""
    plain = os.urandom(40 * BLOCK)
    done = encrypt(*ME, input=plain)
    assert encrypt("-d", input=done.out).out == plain


def test_sockets_and_descriptors_that_do_not_block(content: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    threading.Thread(target=lambda: (time.sleep(0.3), ours.sendall(content), ours.close()), daemon=True).start()
    done = encrypt(*ME, stdin=theirs)
    theirs.close()
    assert gpg("-d", input=done.out).out == content
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = subprocess.Popen([*COMMAND, *ME], stdin=subprocess.PIPE, stdout=writing, env=environment())
    os.close(writing)
    assert process.stdin
    threading.Thread(target=lambda: (process.stdin.write(content), process.stdin.close()), daemon=True).start()
    time.sleep(0.5)
    with open(reading, "rb") as source:
        written = source.read()
    assert process.wait(20) == 0
    assert encrypt("-d", input=written).out == content


# Keys


def test_any_of_two_keys_decrypts(stranger: Path, content: bytes) -> None:
    done = encrypt("--trust", "always", *ME, "--recipient", "foreign@example.org", input=content)
    assert done.status == 0
    for folder in (os.environ["GNUPGHOME"], str(stranger)):
        assert encrypt("-d", input=done.out, env={**environment(), "GNUPGHOME": folder}) == Done(0, content, "")


@pytest.mark.parametrize(
    ("keys", "words", "hint"),
    [
        (["nobody@example.org"], "cannot encrypt for 'nobody@example.org': there is no such key", "gpg --list-keys"),
        (["me@example.org", "nobody"], "cannot encrypt for 'nobody': there is no such key", "gpg --list-keys"),
        (["0123456789ABCDEF"], "there is no such key", "gpg --list-keys"),
        (["foreign@example.org"], "the key is not trusted", "gpg --lsign-key"),
    ],
)
def test_keys_that_are_refused(keys: list[str], words: str, hint: str, work: Path, stranger: Path) -> None:
    (work / "f").write_bytes(b"content")
    with (work / "f").open("rb") as source:
        done = encrypt("-o", "g", *(word for key in keys for word in ("-r", key)), cwd=work, stdin=source)
        assert os.lseek(source.fileno(), 0, os.SEEK_CUR) == 0, "the input was touched"
    assert done.status == 1
    assert words in done.err
    assert hint in done.err
    assert not (work / "g").exists()


def test_a_key_that_has_expired(content: bytes) -> None:
    made = gpg("--passphrase", "", "--quick-gen-key", "old@example.org", "default", "default", "seconds=1")
    assert made.status == 0
    time.sleep(2)
    done = encrypt("-r", "old@example.org", input=content)
    assert (done.status, done.out) == (1, b"")
    assert "cannot encrypt for 'old@example.org': the key has expired" in done.err


def test_no_secret_key(message: bytes, stranger: Path) -> None:
    done = encrypt("-d", input=message, env={**environment(), "GNUPGHOME": str(stranger)})
    assert (done.status, done.out) == (3, b"")
    listed = gpg("--list-keys", "--with-colons", "me@example.org").text
    (key,) = re.findall(r"^sub:(?:[^:]*:){3}([^:]*):", listed, re.MULTILINE)
    assert f"wrong key: no secret key for this message, which is encrypted for {key}\n" in done.err
    assert "gpg --list-secret-keys" in done.err


PINENTRY = """#!/bin/bash
echo OK
while read -r word rest; do
    [ "$word" = GETPIN ] && {{ echo "D {answer}"; echo asked >> {folder}/asked; }}
    echo OK
    [ "$word" = BYE ] && exit
done
"""


@pytest.mark.parametrize("answer", ["right", "wrong"])
def test_the_agent_asks_for_a_passphrase(answer: str, content: bytes) -> None:
    with other_home() as folder:
        made = gpg(
            "--homedir", str(folder), "--passphrase", "right", "--pinentry-mode", "loopback", "--quick-gen-key", "it"
        )
        assert made.status == 0, made.err
        run("gpgconf", "--homedir", folder, "--kill", "all")
        (folder / "pinentry").write_text(PINENTRY.format(answer=answer, folder=folder))
        (folder / "pinentry").chmod(0o755)
        (folder / "gpg-agent.conf").write_text(f"pinentry-program {folder}/pinentry\n")
        its = {**environment(), "GNUPGHOME": str(folder)}
        locked = encrypt("-r", "it", input=content, env=its)
        assert locked.status == 0, locked.err
        assert not (folder / "asked").exists()
        done = encrypt("-d", input=locked.out, env=its)
        assert (folder / "asked").exists()
        if answer == "right":
            assert done == Done(0, content, "")
        else:
            assert (done.status, done.out) == (1, b"")
            assert (
                "the secret key could not be used: gpg says 'public key decryption failed: Bad passphrase'" in done.err
            )


def test_no_gpg(work: Path) -> None:
    done = encrypt(*ME, input=b"x", env={**environment(), "PATH": str(work)})
    assert done.status == 1
    assert "gpg cannot be run" in done.err
    assert "package gnupg" in done.err


# Messages that must not be believed


def judged(message: bytes, words: str = "") -> Done:
    done = encrypt("-d", input=message)
    assert (done.status, done.out) == (3, b""), done.err
    assert words in done.err
    return done


def test_a_cut_message(message: bytes) -> None:
    cuts = {1, 2, 3, 4, 10, 399, 400, 420, 8192, 9000, *range(100, len(message), len(message) // 12)}
    for cut in sorted({*cuts, len(message) - 23, len(message) - 22, len(message) - 2, len(message) - 1}):
        judged(message[:cut])


def test_a_changed_message(message: bytes, content: bytes) -> None:
    """In its head a change can make it another's, or mean nothing; behind it every one is found."""
    for at in (0, 1, 2, 3, 4, 8, 12, 13, 14, 20, 60, 390):
        changed = bytearray(message)
        changed[at] ^= 1
        done = encrypt("-d", input=bytes(changed))
        assert done.status in (1, 3) or done == Done(0, content, "")
    for at in (*range(500, len(message), len(message) // 10), len(message) - 22, len(message) - 1):
        changed = bytearray(message)
        changed[at] ^= 1
        judged(bytes(changed))


@pytest.mark.parametrize("junk", [b"\0", b"junk\n", bytes(100_000), b"\xd2" * 100])
def test_something_behind_the_message(junk: bytes, message: bytes, content: bytes, work: Path) -> None:
    judged(message + junk)
    (work / "f").write_bytes(content)
    assert gpg("-z", "0", *ME, "-o", "g", "-e", "f", cwd=work).status == 0
    judged((work / "g").read_bytes() + junk, "behind")


def test_more_than_one_message(message: bytes, content: bytes, work: Path) -> None:
    (work / "f").write_bytes(content)
    assert gpg("-z", "0", *ME, "-o", "g", "-e", "f", cwd=work).status == 0
    whole = (work / "g").read_bytes()
    literal = gpg("-z", "0", "--store", input=content).out
    for pieces in (message * 2, whole * 2, whole + message, whole + literal, literal + whole):
        judged(pieces)


def test_what_is_no_encrypted_message(content: bytes) -> None:
    judged(b"", "the input is empty")
    judged(b"QEVM" + content, "no OpenPGP message: found b'QEVM' at offset 0")
    judged(b"\xfd7zXZ\0" + content, "no OpenPGP message")
    judged(gpg("-z", "0", "-s", input=content).out, "the message is not encrypted")
    judged(gpg("--store", input=content).out, "the message is not encrypted")
    armoured = gpg("--armor", *ME, "-e", input=content).out
    assert "gpg --dearmor" in judged(armoured, "armoured").err
    assert encrypt("-d", input=run("gpg", "--dearmor", input=armoured).out).out == content


def test_a_message_without_integrity(content: bytes, home: Path) -> None:
    made = gpg("--rfc2440", "--disable-mdc", "-z", "0", "--cipher-algo", "3DES", *ME, "-e", input=content)
    if "mdc_method" in gpg("--list-packets", input=made.out).text:
        pytest.skip("this gpg makes no message without integrity protection")
    assert encrypt("-d", input=made.out).status == 3
    # Also where gpg has been told to let it pass.
    (home / "gpg.conf").write_text("ignore-mdc-error\n")
    try:
        judged(made.out, "the message has no integrity protection")
    finally:
        (home / "gpg.conf").unlink()


def test_settings_of_gpg_do_not_matter(content: bytes, home: Path) -> None:
    (home / "gpg.conf").write_text("armor\ncompress-level 9\nverbose\n")
    try:
        done = encrypt(*ME, input=content)
        assert done.out[0] & 0x80
        assert encrypt("-d", input=done.out) == Done(0, content, "")
    finally:
        (home / "gpg.conf").unlink()


def test_a_forged_message_never_comes_out_whole() -> None:
    plain = os.urandom(20 * BLOCK)
    forged = bytearray(encrypt(*ME, input=plain).out)
    forged[-1] ^= 1
    for wrong in (bytes(forged), bytes(forged[: 19 * BLOCK]), bytes(forged) + b"junk"):
        done = encrypt("-d", input=wrong)
        assert done.status == 3
        assert plain.startswith(done.out)
        assert len(done.out) <= 20 * BLOCK - HOLD
    assert encrypt("-d", input=bytes(forged[:-1]) + bytes([forged[-1] ^ 1])).out == plain


def test_a_damaged_message_leaves_the_old_output(message: bytes, work: Path) -> None:
    (work / "f").write_bytes(b"old")
    (work / "g").write_bytes(message[:-1])
    assert encrypt("-d", "-o", "f", "g", cwd=work).status == 3
    assert (work / "f").read_bytes() == b"old"
    assert len(list(work.iterdir())) == 2


# An end of the input that is not its end


def test_an_empty_input(work: Path) -> None:
    for options in (ME, ("-d",)):
        done = encrypt(*options, "-o", "f", cwd=work)
        assert (done.status, done.out) == (3, b"")
        assert "the input is empty" in done.err
    assert list(work.iterdir()) == []
    assert encrypt(*ME).out == b""


def no_message(data: bytes) -> bool:
    return gpg("-d", input=data).status != 0


def test_a_connection_that_breaks() -> None:
    """gpg would take the read error for the end, and make a message of what came before."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs = server.accept()[0]

    def give() -> None:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.sendall(os.urandom(3 * BLOCK))
        time.sleep(0.7)
        theirs.close()

    threading.Thread(target=give, daemon=True).start()
    with ours:
        done = encrypt(*ME, stdin=ours)
    assert done.status == 1
    assert "Connection reset" in done.err
    assert len(done.out) > BLOCK
    assert no_message(done.out)


def test_a_folder() -> None:
    for options in (ME, ("-d",)):
        done = encrypt(*options, "/")
        assert (done.status, done.out) == (1, b"")
        assert "Is a directory" in done.err


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gpg(pid: int) -> bool:
    """At work, not asked for its version or a key; it may be run by another name (tests/qemu10)."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"--status-fd" in words and words[0] != b"setpriv"


def at_work(options: tuple[str, ...], data: bytes, folder: Path) -> tuple[subprocess.Popen[bytes], int, int]:
    """A run that has taken `data` and waits for more; its gpg, and where more could be written."""
    reading, writing = os.pipe()
    process = subprocess.Popen([*COMMAND, *options], cwd=folder, stdin=reading, stdout=-1, stderr=-1, env=environment())
    os.close(reading)
    for at in range(0, len(data), 65536):
        os.write(writing, data[at : at + 65536])
        if process.stdout and select.select([process.stdout], [], [], 0)[0] and "-o" not in options:
            break
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [pid for pid in children(process.pid) if is_gpg(pid)]
        if found and struct.unpack("i", fionread(writing))[0] == 0:
            time.sleep(0.3)
            return process, found[0], writing
        time.sleep(0.02)
    raise AssertionError("gpg is not at work")


def fionread(fd: int) -> bytes:
    import fcntl
    import termios

    return bytes(fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("direction", ["encrypt", "decrypt"])
def test_a_signal(direction: str, number: int, work: Path, message: bytes) -> None:
    options, data = (ME, os.urandom(BLOCK)) if direction == "encrypt" else (("-d",), message[:-1000])
    process, child, writing = at_work((*options, "-o", "f"), data, work)
    try:
        assert len(list(work.iterdir())) == 1
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait(10)
        os.close(writing)
    assert (process.returncode, out, err) == (-number, b"", b"")
    assert gone(child)
    assert not (work / "f").exists()
    if number != signal.SIGKILL:
        assert list(work.iterdir()) == []


def test_a_kill_makes_no_message(work: Path) -> None:
    """Our death must not look to gpg like the end of its input."""
    process, child, writing = at_work(ME, os.urandom(BLOCK // 2), work)
    try:
        process.kill()
        assert process.stdout
        out = process.stdout.read()
    finally:
        process.wait(10)
        os.close(writing)
    assert gone(child)
    assert no_message(out)


def test_gpg_is_killed(work: Path) -> None:
    process, child, writing = at_work(ME, os.urandom(BLOCK // 2), work)
    try:
        os.kill(child, signal.SIGKILL)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait(10)
        os.close(writing)
    assert process.returncode == 1
    assert b"gpg failed" in err
    assert no_message(out)


def test_a_message_that_is_refused_before_its_end(message: bytes, stranger: Path, work: Path) -> None:
    """Whoever still writes must not keep us waiting."""
    (work / "f").write_bytes(b"\xff" * 100)
    started = time.monotonic()
    done = shell(f"(cat f; exec sleep 30) | {{ {LINE} -d; echo $?; kill -9 0; }}", work, env=environment())
    assert done.text == "3\n"
    assert time.monotonic() - started < 15


# Words


def test_words_and_objects(work: Path, content: bytes) -> None:
    (work / "f").write_bytes(content)
    done = encrypt(*ME, "-v", "-o", "g", "f", cwd=work)
    # By how much it is longer depends on the kind of the key.
    size = f"{(work / 'g').stat().st_size / 1024:.1f}"
    assert done.err == f"vm-encrypt: note: 293.0 KiB in, {size} KiB out\n"
    assert encrypt("-d", "-v", "g", cwd=work).err == f"vm-encrypt: note: {size} KiB in, 293.0 KiB out\n"
    (line,) = encrypt("--json", "-d", "f", cwd=work).err.splitlines()
    assert (json.loads(line)["status"], json.loads(line)["type"]) == (3, "error")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-d", *ME),
        ("-d", "--trust", "always"),
        ("-d", "--sign", "me@example.org"),
        ("-d", "--signer", "me@example.org"),
        ("-d", "--list"),
        ("-d", "--passphrase-fd", "x"),
        ("-d", "--passphrase-fd", "3", "--passphrase-file", "f"),
        ("--list", *ME),
        ("--list", "--passphrase-file", "f"),
        ("--symmetric", "--trust", "always"),
        (*ME, "a", "b"),
        (*ME, "-v", "-q"),
        (*ME, "--passphrase-file", "f"),
        (*ME, "--signer", "0" * 40),
        (*ME, "--trust", "me"),
        ("-r",),
        ("--sign", "me@example.org"),
    ],
)
def test_wrong_usage_is_settled_first(options: tuple[str, ...], work: Path) -> None:
    done = encrypt("-o", "f", *options, cwd=work)
    assert (done.status, done.out, list(work.iterdir())) == (2, b"", []), done.err


def test_little_memory(work: Path) -> None:
    (work / "f").write_bytes(os.urandom(100 * BLOCK))
    for line in (f"{LINE} -r me@example.org f > g", f"{LINE} -d g | cmp - f"):
        script = f"import resource, subprocess, sys\nstatus = subprocess.call(['bash', '-c', {line!r}], timeout=60)\n"
        script += "print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        status, kibibytes = run(sys.executable, "-c", script, cwd=work, env=environment()).text.split()
        assert status == "0"
        assert int(kibibytes) < 64 << 10


def test_no_plaintext_in_temporary_files(work: Path) -> None:
    """Neither in the folder for them nor in any file that one of the processes has open."""
    (work / "tmp").mkdir()
    its = {**environment(), "TMPDIR": str(work / "tmp")}
    plain = os.urandom(30 * BLOCK)
    message = encrypt(*ME, input=plain).out
    for options, data in ((ME, plain), (("-d",), message)):
        reading, writing = os.pipe()
        process = subprocess.Popen([*COMMAND, *options], stdin=reading, stdout=subprocess.DEVNULL, stderr=-1, env=its)
        os.close(reading)
        try:
            os.set_blocking(writing, False)
            seen = set()
            for at in range(0, len(data), 65536):
                push(writing, data[at : at + 65536])
                if at % BLOCK == 0:
                    seen |= written_files([process.pid, *children(process.pid)])
                    assert list((work / "tmp").iterdir()) == []
            os.close(writing)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait(10)
        assert seen == set()
        assert list((work / "tmp").iterdir()) == []


def push(fd: int, data: bytes) -> None:
    while data:
        select.select([], [fd], [], 20)
        data = data[os.write(fd, data) :]


def written_files(pids: list[int]) -> set[str]:
    """Regular files that the processes have open for writing, what gpg notes about keys left out."""
    found = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
            link = Path(f"/proc/{pid}/fd/{entry.name}")
            try:
                flags = int(re.findall(r"flags:\s+(\d+)", entry.read_text())[0], 8)
                if flags & os.O_ACCMODE and stat.S_ISREG(link.stat().st_mode):
                    found |= {os.readlink(link)} if link.resolve().parent != Path(os.environ["GNUPGHOME"]) else set()
            except FileNotFoundError:
                continue
    return found
