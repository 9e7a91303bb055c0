"""vm-encrypt and its keys, passphrases and signers, with a real gpg."""

import json
import os
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cli.test_encrypt import COMMAND, ME, PINENTRY, children, encrypt, environment, gpg, other_home
from conftest import ROOT, Done, run

SECRET = "correct horse"
FINGERPRINT = "0123456789ABCDEF0123456789ABCDEF01234567"


def fingerprint(name: str, *options: str) -> str:
    return re.findall(r"^fpr:+([0-9A-F]+):", gpg(*options, "--list-keys", "--with-colons", name).text, re.MULTILINE)[0]


def make(name: str, *how: str, at: str = "") -> None:
    faked = ["--faked-system-time", at] if at else []
    assert gpg(*faked, "--passphrase", "", "--quick-gen-key", name, *how).status == 0


@dataclass
class Ring:
    """Our home with keys of every kind, and a stranger's home, whose public key is in ours."""

    home: Path
    stranger: Path
    keys: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def ring() -> Iterator[Ring]:
    """A home of its own: these keys are in the way of nobody, and can be made again."""
    with other_home() as home, other_home() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("GNUPGHOME", str(home))
        make("me@example.org", "default", "default", "never")
        make("signs@example.org", "rsa2048", "sign", "never")
        make("twin one <twin1@example.org>", "future-default", "default", "never")
        make("twin two <twin2@example.org>", "future-default", "default", "never")
        make("some.me@example.org", "future-default", "default", "never")
        make("old@example.org", "future-default", "default", "seconds=86400", at="20200101T000000!")
        make("spent@example.org", "rsa2048", "cert", "never", at="20200101T000000!")
        spent = fingerprint("spent@example.org")
        added = ("--quick-add-key", spent, "rsa2048", "encr", "seconds=86400")
        assert gpg("--faked-system-time", "20200101T000000!", "--passphrase", "", *added).status == 0
        make("revoked@example.org", "future-default", "default", "never")
        revoke("revoked@example.org", home)
        its = ("--homedir", str(folder), "--passphrase", "")
        assert gpg(*its, "--quick-gen-key", "stranger@example.org", "future-default", "default", "never").status == 0
        assert gpg("--import", input=gpg(*its, "--export").out).status == 0
        mine = gpg("--export", "=me@example.org").out
        assert gpg("--homedir", str(folder), "--import", input=mine).status == 0
        yield Ring(home, folder)


def revoke(name: str, home: Path) -> None:
    certificate = home / "openpgp-revocs.d" / f"{fingerprint(name)}.rev"
    assert gpg("--import", input=certificate.read_bytes().replace(b":-----BEGIN", b"-----BEGIN")).status == 0


# Whom it is for


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody@example.org", "there is no such key"),
        ("", "there is no such key"),
        ("--armor", "there is no such key"),
        ("old@example.org", "the key has expired"),
        ("spent@example.org", "for encryption, the key has expired"),
        ("revoked@example.org", "the key is revoked"),
        ("signs@example.org", "the key is not for encryption"),
        ("twin", "the name fits 2 keys"),
        ("stranger@example.org", "the key is not trusted"),
        (FINGERPRINT, "there is no such key"),
    ],
)
def test_a_key_that_is_refused_before_anything_is_read(name: str, words: str, ring: Ring, work: Path) -> None:
    (work / "f").write_bytes(b"content")
    with (work / "f").open("rb") as source:
        done = encrypt("-o", "g", *ME, "-r", name, stdin=source, cwd=work)
        assert os.lseek(source.fileno(), 0, os.SEEK_CUR) == 0, "the input was touched"
    assert (done.status, done.out) == (1, b"")
    assert f"cannot encrypt for '{name}': {words}\n" in done.err
    assert not (work / "g").exists()


def test_an_ambiguous_name_lists_what_it_fits(ring: Ring) -> None:
    done = encrypt("-r", "twin", input=b"x")
    for one in ("twin1@example.org", "twin2@example.org"):
        assert f"{fingerprint(one)} (twin" in done.err
        assert encrypt("-r", one, input=b"x").status == 0


def test_an_address_is_not_a_part_of_another_one(ring: Ring) -> None:
    """me@example.org fits some.me@example.org, too."""
    done = encrypt(*ME, input=b"x")
    assert done.status == 0
    assert run(*COMMAND, "-d", input=done.out, env={**environment(), "GNUPGHOME": str(ring.stranger)}).status == 3
    assert encrypt("-d", input=done.out).out == b"x"


def test_a_fingerprint_needs_no_trust_but_a_good_key(ring: Ring) -> None:
    its = fingerprint("stranger@example.org")
    subkey = re.findall(r"^sub:.*\nfpr:+([0-9A-F]+):", gpg("--list-keys", "--with-colons", its).text, re.MULTILINE)[0]
    for name in (its.lower(), f"0x{its}", " ".join(re.findall("....", its)), f"{subkey}!"):
        done = encrypt("-r", name, input=b"x")
        assert done.status == 0, done.err
        opened = encrypt("-d", input=done.out, env={**environment(), "GNUPGHOME": str(ring.stranger)})
        assert opened.out == b"x"
    for name in (its[-16:], f"0x{its[-8:]}"):
        assert "the key is not trusted" in encrypt("-r", name, input=b"x").err
    for name in ("old@example.org", "revoked@example.org", "signs@example.org"):
        assert encrypt("-r", fingerprint(name), input=b"x").status == 1
    # A fingerprint vouches for no other key.
    assert "the key is not trusted" in encrypt("-r", its, "-r", "stranger@example.org", input=b"x").err


def test_trust_models_decide_as_with_gpg(ring: Ring) -> None:
    for model in ("pgp", "classic", "tofu", "tofu+pgp", "direct", "always", "auto"):
        theirs = gpg("--trust-model", model, "-r", "stranger@example.org", "-e", input=b"x")
        ours = encrypt("--trust", model, "-r", "stranger@example.org", input=b"x")
        assert (ours.status == 0) == (theirs.status == 0), model
    (ring.home / "gpg.conf").write_text("trust-model always\n")
    try:
        assert encrypt("-r", "stranger@example.org", input=b"x").status == 0
        assert encrypt("-r", "stranger@example.org", "--trust", "pgp", input=b"x").status == 1
    finally:
        (ring.home / "gpg.conf").unlink()


def test_home(ring: Ring, work: Path) -> None:
    nowhere = {**environment(), "GNUPGHOME": str(work)}
    done = encrypt("--home", str(ring.home), *ME, input=b"x", env=nowhere)
    assert encrypt("-d", "--home", str(ring.home), input=done.out, env=nowhere) == Done(0, b"x", "")
    done = encrypt("--home", "no", *ME, input=b"x", cwd=work)
    assert (done.status, done.out) == (1, b"")
    assert "no GnuPG home at no" in done.err


# Signed


def test_signed_and_asked_for(ring: Ring, work: Path) -> None:
    (work / "f").write_bytes(os.urandom(100_000))
    done = encrypt(*ME, "--sign", "signs@example.org", "-o", "g", "f", cwd=work)
    assert done == Done(0, b"", "")
    its, mine = fingerprint("signs@example.org"), fingerprint("=me@example.org")
    plain = (work / "f").read_bytes()
    assert gpg("-d", "g", cwd=work).out == plain
    for signers in ([its], [mine, its], [its, FINGERPRINT]):
        words = [word for name in signers for word in ("--signer", name)]
        assert encrypt("-d", *words, "g", cwd=work) == Done(0, plain, "")
    assert f"signed by {its}\n" in encrypt("-d", "-v", "g", cwd=work).err
    done = encrypt("-d", "--signer", mine, "-o", "h", "g", cwd=work)
    assert (done.status, done.out, (work / "h").exists()) == (3, b"", False)
    assert f"unknown signer: the message is signed by {its}, expected {mine}\n" in done.err


def test_not_signed(ring: Ring) -> None:
    mine = fingerprint("=me@example.org")
    for options in (ME, ("--symmetric", "--passphrase-file", "/proc/self/comm")):
        message = encrypt(*options, input=b"x").out
        back = options[1:] if options[0] == "--symmetric" else ()
        done = encrypt("-d", "--signer", mine, *back, input=message)
        assert (done.status, done.out) == (3, b"")
        assert f"unknown signer: the message is not signed, expected a signature of {mine}\n" in done.err


def test_a_signer_whose_key_is_not_there(ring: Ring) -> None:
    its = {**environment(), "GNUPGHOME": str(ring.stranger)}
    message = encrypt(*ME, "--trust", "always", "--sign", "stranger@example.org", input=b"x", env=its)
    assert message.status == 0, message.err
    stranger = fingerprint("stranger@example.org")
    assert encrypt("-d", "--signer", stranger, input=message.out) == Done(0, b"x", "")
    kept = gpg("--export", stranger).out
    gpg("--yes", "--delete-keys", stranger)
    try:
        for options in ((), ("--signer", fingerprint("=me@example.org"))):
            done = encrypt("-d", *options, input=message.out)
            assert (done.status, done.out) == (3, b"")
            assert f"unknown signer: the message is signed by {stranger}, whose key is not there" in done.err
        done = encrypt("-d", "--signer", stranger, input=message.out)
        assert (done.status, done.out) == (1, b"")
        assert f"no signature of {stranger} can be accepted: there is no such key" in done.err
    finally:
        gpg("--import", input=kept)


@pytest.mark.parametrize("state", ["expired", "revoked"])
def test_a_signer_whose_key_is_no_longer_good(state: str, ring: Ring) -> None:
    name = f"{state}.later@example.org"
    make(name, "future-default", "default", "never")
    later = fingerprint(name)
    message = encrypt(*ME, "--sign", later, input=b"x").out
    assert encrypt("-d", "--signer", later, input=message).status == 0
    {"expired": expire, "revoked": revoke}[state](name, ring.home)
    done = encrypt("-d", "--signer", later, "--signer", fingerprint("=me@example.org"), input=message)
    assert (done.status, done.out) == (3, b""), done.err
    assert f"signer not accepted: the key {later} is {state}\n" in done.err
    done = encrypt("-d", "--signer", later, input=message)
    assert (done.status, done.out) == (1, b"")
    assert f"no signature of {later} can be accepted" in done.err
    done = encrypt("-d", input=message)
    assert (done.status, done.out) == (0, b"x")
    assert f"warning: the signature of {later} proves nothing: the key is {state}\n" in done.err


def expire(name: str, _home: Path) -> None:
    assert gpg("--quick-set-expire", fingerprint(name), "seconds=1").status == 0
    time.sleep(2)


def test_a_signed_message_that_was_changed_or_cut(ring: Ring) -> None:
    message = encrypt(*ME, "--sign", "me@example.org", input=os.urandom(100_000)).out
    signer = ("--signer", fingerprint("=me@example.org"))
    for at in (600, 50_000, len(message) - 600, len(message) - 1):
        changed = bytearray(message)
        changed[at] ^= 8
        for options in ((), signer):
            done = encrypt("-d", *options, input=bytes(changed))
            assert (done.status, done.out) == (3, b"")
            assert "the message is forged" in done.err
    for end in (50_000, len(message) - 600, len(message) - 1):
        done = encrypt("-d", *signer, input=message[:end])
        assert (done.status, done.out) == (3, b"")
        assert "the message is cut" in done.err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody@example.org", "there is no such secret key"),
        ("stranger@example.org", "there is no such secret key"),
        ("old@example.org", "the key has expired"),
        ("revoked@example.org", "the key is revoked"),
        ("twin", "the name fits 2 keys"),
        ("spent@example.org", "the key is not for signing"),
    ],
)
def test_a_key_that_cannot_sign(name: str, words: str, ring: Ring, work: Path) -> None:
    (work / "f").write_bytes(b"content")
    with (work / "f").open("rb") as source:
        done = encrypt("-o", "g", *ME, "--sign", name, stdin=source, cwd=work)
        assert os.lseek(source.fileno(), 0, os.SEEK_CUR) == 0
    assert (done.status, done.out) == (1, b"")
    assert f"cannot sign as '{name}': {words}\n" in done.err
    assert not (work / "g").exists()


# Passphrases


@pytest.fixture
def secret(work: Path) -> Path:
    (work / "pass").write_text(f"{SECRET}\nnot this line\n")
    return work / "pass"


def test_with_a_passphrase_there_and_back(ring: Ring, secret: Path, work: Path) -> None:
    plain = os.urandom(200_000)
    its = ("--passphrase-file", str(secret))
    message = encrypt("--symmetric", *its, input=plain)
    assert (message.status, message.err) == (0, "")
    assert encrypt("-d", *its, input=message.out) == Done(0, plain, "")
    loopback = ("--pinentry-mode", "loopback", *its)
    assert gpg("-d", *loopback, input=message.out).out == plain
    assert encrypt("-d", *its, input=gpg("-c", *loopback, input=plain).out).out == plain
    # From a descriptor, which may be standard input itself; from the credential of a service.
    with secret.open("rb") as source:
        words = ("--passphrase-fd", str(source.fileno()))
        assert encrypt("-d", *words, input=message.out, pass_fds=(source.fileno(),)).out == plain
    assert encrypt("-d", "--passphrase-fd", "0", input=SECRET.encode() + b"\n" + message.out).out == plain
    secret.rename(work / "vmstate.passphrase")
    service = {**environment(), "CREDENTIALS_DIRECTORY": str(work)}
    assert encrypt("-d", input=message.out, env=service).out == plain
    again = encrypt("--symmetric", input=plain, env=service)
    assert encrypt("-d", input=again.out, env=service) == Done(0, plain, "")


def test_a_key_or_a_passphrase(ring: Ring, secret: Path) -> None:
    message = encrypt("--symmetric", "--passphrase-file", str(secret), *ME, input=b"x").out
    assert encrypt("-d", input=message).out == b"x"
    its = {**environment(), "GNUPGHOME": str(ring.stranger)}
    assert encrypt("-d", "--passphrase-file", str(secret), input=message, env=its).out == b"x"
    done = encrypt("-d", "--passphrase-file", "/proc/self/comm", input=message, env=its)
    assert (done.status, done.out) == (3, b"")
    assert "wrong passphrase for this message, and there is no secret key of " in done.err
    # With the key a passphrase that is of no use does not matter; and a change is no matter of the passphrase.
    for options in ((), ("--passphrase-file", "/proc/self/comm")):
        assert encrypt("-d", *options, input=message) == Done(0, b"x", "")
        done = encrypt("-d", *options, input=message[:-1] + bytes([message[-1] ^ 1]))
        assert (done.status, done.out) == (3, b"")
        assert "the message is forged" in done.err


def test_a_locked_key_or_a_passphrase(ring: Ring, secret: Path, work: Path) -> None:
    """What is given is tried for both."""
    with other_home() as folder:
        (work / "its").write_text("its")
        made = ("--homedir", str(folder), "--pinentry-mode", "loopback", "--passphrase", "its")
        assert gpg(*made, "--quick-gen-key", "it", "default", "default", "never").status == 0
        env = {**environment(), "GNUPGHOME": str(folder)}
        message = encrypt("--symmetric", "--passphrase-file", str(secret), "-r", "it", input=b"x", env=env).out
        for path, status in ((secret, 0), ("/proc/self/comm", 3), (work / "its", 0)):
            run("gpgconf", "--homedir", folder, "--kill", "all")
            done = encrypt("-d", "--passphrase-file", str(path), input=message, env=env)
            assert done.status == status, done.err
            assert done.out == (b"" if status else b"x")
            assert ("wrong passphrase for this message\n" in done.err) == bool(status)


def test_a_message_for_somebody_unnamed(ring: Ring) -> None:
    """Every secret key is tried: none fits, or it is mine."""
    for name, status in (("stranger@example.org", 3), ("=me@example.org", 0)):
        message = gpg("--throw-keyids", "--trust-model", "always", "-z", "0", "-r", name, "-e", input=b"x").out
        done = encrypt("-d", input=message)
        assert (done.status, done.out) == (status, b"" if status else b"x"), done.err
        assert ("wrong key: no secret key for this message" in done.err) == bool(status)


def test_a_wrong_passphrase_is_known_before_any_output(ring: Ring, secret: Path, work: Path) -> None:
    message = encrypt("--symmetric", "--passphrase-file", str(secret), input=os.urandom(20 << 20)).out
    done = encrypt("-d", "--passphrase-file", "/proc/self/comm", "-o", "g", input=message, cwd=work)
    assert (done.status, done.out) == (3, b"")
    assert "error: wrong passphrase for this message\n" in done.err
    assert not (work / "g").exists()


def test_a_passphrase_that_cannot_be_had(ring: Ring, work: Path) -> None:
    (work / "empty").write_text("\nsecond\n")
    for options, words in (
        (("--passphrase-file", "no"), "cannot read the passphrase in no: No such file or directory"),
        (("--passphrase-file", "empty"), "the passphrase in empty is empty"),
        (("--passphrase-fd", "77"), "cannot read the passphrase in descriptor 77: Bad file descriptor"),
        (("--passphrase-fd", "3"), "cannot read the passphrase in descriptor 3: Bad file descriptor"),
    ):
        done = encrypt("--symmetric", *options, "-o", "g", "empty", cwd=work)
        assert (done.status, done.out) == (1, b"")
        assert words in done.err
        assert not (work / "g").exists()


@pytest.mark.parametrize("answer", ["right", "none"])
def test_the_agent_asks(answer: str, ring: Ring, work: Path) -> None:
    with other_home() as folder:
        script = PINENTRY.format(answer="right", folder=folder)
        (folder / "pinentry").write_text(script if answer == "right" else "#!/bin/sh\nexit 1\n")
        (folder / "pinentry").chmod(0o755)
        (folder / "gpg-agent.conf").write_text(f"pinentry-program {folder}/pinentry\n")
        its = {**environment(), "GNUPGHOME": str(folder)}
        (work / "pass").write_text("right")
        given = encrypt("--symmetric", "--passphrase-file", "pass", input=b"x", cwd=work, env=its).out
        done, back = encrypt("--symmetric", input=b"x", env=its), encrypt("-d", input=given, env=its)
        if answer == "right":
            assert (folder / "asked").exists()
            assert encrypt("-d", "--passphrase-file", "pass", input=done.out, cwd=work, env=its).out == b"x"
            assert back == Done(0, b"x", "")
            return
        for failed in (done, back):
            assert (failed.status, failed.out) == (1, b"")
            assert "--passphrase-fd" in failed.err or "gpg failed" in failed.err


def test_a_locked_key_signs_with_the_passphrase_or_not_at_all(work: Path) -> None:
    with other_home() as folder:
        made = ("--homedir", str(folder), "--pinentry-mode", "loopback", "--passphrase", SECRET)
        assert gpg(*made, "--quick-gen-key", "it", "future-default", "default", "never").status == 0
        run("gpgconf", "--homedir", folder, "--kill", "all")
        for name, words in (("right", SECRET), ("wrong", "wrong")):
            (work / name).write_text(words)
        its = {"env": {**environment(), "GNUPGHOME": str(folder)}, "cwd": work}
        done = encrypt("-r", "it", "--sign", "it", "--passphrase-file", "wrong", "-o", "g", input=b"x", **its)
        assert (done.status, (work / "g").exists()) == (1, False)
        assert "cannot sign: gpg says " in done.err
        assert "Bad passphrase" in done.err
        message = encrypt("-r", "it", "--sign", "it", "--passphrase-file", "right", input=b"x", **its)
        assert message.status == 0, message.err
        run("gpgconf", "--homedir", folder, "--kill", "all")
        done = encrypt("-d", "--passphrase-file", "wrong", input=message.out, **its)
        assert (done.status, done.out) == (1, b"")
        assert "the secret key could not be used" in done.err
        assert encrypt("-d", "--passphrase-file", "right", input=message.out, **its) == Done(0, b"x", "")


@pytest.mark.root
@pytest.mark.parametrize("direction", ["encrypt", "decrypt"])
def test_the_passphrase_is_nowhere_to_be_seen(direction: str, ring: Ring, secret: Path) -> None:
    its = ("--passphrase-file", str(secret))
    data = os.urandom(300_000)
    options = ("--symmetric", *its)
    if direction == "decrypt":
        options, data = ("-d", *its), encrypt("--symmetric", *its, input=data).out
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    process = subprocess.Popen(
        [*COMMAND, "-v", *options],
        stdin=-1,
        stdout=subprocess.DEVNULL,
        stderr=-1,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (limit, limit)),
    )
    try:
        assert process.stdin
        process.stdin.write(data[:200_000])
        process.stdin.flush()
        deadline = time.monotonic() + 20
        while not (found := [pid for pid in children(process.pid) if is_gpg(pid)]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for pid in (process.pid, *found):
            for name in ("cmdline", "environ"):
                assert SECRET.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()
            assert re.search(r"^Max core file size +0 +0", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)
        process.stdin.write(data[200_000:])
        _, words = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == 0
    assert SECRET.encode() not in words


def is_gpg(pid: int) -> bool:
    """The one at work, not one that is asked for its version or a key."""
    try:
        return b"\0--passphrase-fd\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# What a message is


def test_the_best_protection_and_never_none(ring: Ring, secret: Path) -> None:
    its = ("--passphrase-file", str(secret))
    for options in (ME, ("--symmetric", *its)):
        told = json.loads(encrypt("--list", "--json", input=encrypt(*options, input=b"x").out).out)
        assert told["integrity"] in ("MDC", "AEAD")
        (ring.home / "gpg.conf").write_text("rfc2440\ncipher-algo 3DES\n")
        try:
            done = encrypt(*options, input=os.urandom(3 << 20))
        finally:
            (ring.home / "gpg.conf").unlink()
        if done.status == 0:
            # gpg 2.4 takes OCB all the same where it is asked for it.
            assert options[0] == "--symmetric"
            assert json.loads(encrypt("--list", "--json", input=done.out).out)["integrity"] == "AEAD"
        else:
            assert done.status == 1
            assert "gpg would not protect the message against changes" in done.err
            assert gpg("-d", "--pinentry-mode", "loopback", *its, input=done.out).status != 0
        (ring.home / "gpg.conf").write_text(
            "personal-cipher-preferences 3DES\ns2k-cipher-algo 3DES\ncipher-algo 3DES\n"
        )
        try:
            done = encrypt(*options, input=b"x")
        finally:
            (ring.home / "gpg.conf").unlink()
        said = gpg("--status-fd", "2", "--pinentry-mode", "loopback", *its, "-d", input=done.out).err
        assert re.search(r"DECRYPTION_INFO \d 9 ", said), said


def test_list_needs_no_key_and_no_gpg(ring: Ring, secret: Path, work: Path) -> None:
    options = ("--symmetric", "--passphrase-file", str(secret), *ME, "-r", fingerprint("stranger@example.org"))
    options = (*options, "--sign", "signs@example.org")
    message = encrypt(*options, input=os.urandom(100_000)).out
    (work / "m").write_bytes(message)
    env = {**environment(), "PATH": str(work), "GNUPGHOME": str(work)}
    keys = [found for name in ("=me@example.org", "stranger@example.org") for found in subkeys(name)]
    told = json.loads(encrypt("--list", "--json", "m", cwd=work, env=env).out)
    assert [key["id"] for key in told["keys"]] == keys
    assert (told["passphrases"], told["cipher"], told["integrity"], told["signed"]) == (1, None, "MDC", None)
    assert told["size"] == len(message) > told["encrypted"] > 100_000
    text = encrypt("--list", "-", input=message, env=env).text
    assert text.count("key         ") == 2
    assert f"key         {keys[0]}, {kind_of('=me@example.org')}\n" in text
    assert "passphrase  AES256\n" in text
    assert "integrity   MDC (SEIPD version 1)\n" in text
    assert f"size        {len(message):,} bytes, " in text
    assert encrypt("--list", "-o", "told", "m", cwd=work, env=env) == Done(0, b"", "")
    assert (work / "told").read_text() == text
    assert encrypt("--list", "--json", "-o", "told", "m", cwd=work, env=env) == Done(0, b"", "")
    assert json.loads((work / "told").read_text()) == told
    for wrong in (message[:-1], message + b"x", b"", b"QEVM" + message, message[:100]):
        done = encrypt("--list", input=wrong, env=env)
        assert (done.status, done.out) == (3, b"")


def subkeys(name: str) -> list[str]:
    listed = gpg("--list-keys", "--with-colons", name).text
    return re.findall(r"^sub:(?:[^:]*:){3}([^:]*):", listed, re.MULTILINE)


def kind_of(name: str) -> str:
    """What gpg makes of the kind `default`: RSA, and ECDH from 2.3 on."""
    listed = gpg("--list-keys", "--with-colons", name).text
    return {"1": "RSA", "18": "ECDH"}[re.findall(r"^sub:(?:[^:]*:){2}([^:]*):", listed, re.MULTILINE)[0]]


def test_help_comes_at_once() -> None:
    script = f"import sys; sys.argv = ['x', '--help']; exec(open({str(ROOT / 'bin' / 'vm-encrypt')!r}).read())"
    done = run(*COMMAND[:1], "-X", "importtime", "-c", script, env=environment())
    assert "gnupg" not in done.err
    assert done.status == 0
