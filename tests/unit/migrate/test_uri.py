"""Which ssh leads to the other side: what the user's own configuration says about ciphers comes first."""

import re
import subprocess

import pytest
from vmstate.migrate import uri

URI = "ssh://hostb:2222/run/b.qmp"


def ciphers(argv):
    """What ssh itself makes of such a command line."""
    at = argv.index("--")
    done = subprocess.run([*argv[:at], "-G", *argv[at:-1]], stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
    return re.search(rb"^ciphers (.*)$", done.stdout, re.MULTILINE)[1].decode().split(",")


@pytest.fixture
def argv(monkeypatch):
    def made(vm_ssh, aes=True):
        monkeypatch.setenv("VM_SSH", vm_ssh)
        monkeypatch.setattr(uri, "has_aes", lambda: aes)
        return uri.transport_of(URI).argv()

    return made


def test_the_quick_ones_come_first_where_nobody_has_chosen(argv, tmp_path):
    (tmp_path / "config").write_text("Host hostb\n  HostName 192.0.2.2\n")
    found = argv(f"ssh -F {tmp_path}/config")
    assert ciphers(found)[:2] == ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com"]
    assert "chacha20-poly1305@openssh.com" in ciphers(found)
    assert found[-3:] == ("--", "hostb", "vm-restore --receive /run/b.qmp")


@pytest.mark.parametrize("where", ["file", "option", "-c"])
def test_what_was_chosen_stays(argv, tmp_path, where):
    chosen = "chacha20-poly1305@openssh.com"
    (tmp_path / "config").write_text(f"Ciphers {chosen}\n" if where == "file" else "")
    more = {"file": "", "option": f" -o Ciphers={chosen}", "-c": f" -c {chosen}"}[where]
    assert ciphers(argv(f"ssh -F {tmp_path}/config{more}")) == [chosen]


def test_without_instructions_for_aes_ssh_chooses(argv, tmp_path):
    (tmp_path / "config").touch()
    assert not any("Ciphers" in word for word in argv(f"ssh -F {tmp_path}/config", aes=False))


def test_what_may_be_no_ssh_is_not_asked(argv, tmp_path):
    """Somebody's own script reaches a host when it is run, whatever its words are."""
    script = tmp_path / "reach"
    script.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/ran\n")
    script.chmod(0o755)
    assert not any("Ciphers" in word for word in argv(str(script)))
    assert not (tmp_path / "ran").exists()


def test_a_file_that_ssh_does_not_take(argv, tmp_path):
    """It says so itself when it is run."""
    (tmp_path / "config").write_text("Nonsense yes\n")
    assert not any("Ciphers" in word for word in argv(f"ssh -F {tmp_path}/config"))
