"""Words and numbers that people read and give."""

import json

import pytest
from vmstate.errors import CannotDo, Damaged, InDoubt, Misfit, VmstateError, WrongUsage
from vmstate.qemu.incoming import refusal
from vmstate.qemu.launch import check_arguments, monitor_path
from vmstate.report import Report, rate_value, size_words, time_words


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("1", 1), ("200m", 200 << 20), ("1G", 1 << 30), ("1.5k", 1536), ("2T", 2 << 40), ("512K", 512 << 10)],
)
def test_rates(text: str, value: int) -> None:
    assert rate_value(text) == value


@pytest.mark.parametrize("text", ["", "m", "-1", "1mb", "1 m", "1e9", "0x10", "1..5", "٣", "1.5.2g", "k1", "."])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="is no rate"):
        rate_value(text)


def test_sizes_and_times() -> None:
    assert [size_words(n) for n in (0, 1023, 1024, 1536, 3 << 30)] == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "3.0 GiB"]
    assert [time_words(t) for t in (0.25, 3.21, 250)] == ["250 ms", "3.2 s", "4 min 10 s"]


def test_each_error_knows_its_status() -> None:
    known = {CannotDo: 1, WrongUsage: 2, Damaged: 3, Misfit: 4, InDoubt: 5}
    assert {kind: kind("x").status for kind in known} == known


def test_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    Report("vm-x").error(CannotDo("it broke", "mend it"))
    assert capsys.readouterr().err == "vm-x: error: it broke\nvm-x: hint: mend it\n"
    Report("vm-x", as_json=True).error(Damaged("bad", "look"))
    said = json.loads(capsys.readouterr().err)
    assert said == {"vmstate": 1, "type": "error", "command": "vm-x", "status": 3, "message": "bad", "hints": ["look"]}
    Report("vm-x", quiet=True).hint("psst")
    Report("vm-x").note("only with -v")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "whole", "kind"),
    [
        ("Machine type received is 'pc' and local is 'q35'", False, Misfit),
        ('qemu: Unknown ramblock "x", cannot accept migration', False, Misfit),
        ("Unknown savevm section or instance '0000:00:04.0/virtio-blk' 0", True, Misfit),
        ("error while loading state section id 2(ram)", False, Damaged),
        ("something new", True, Misfit),
        ("", False, Damaged),
    ],
)
def test_what_qemu_says_is_understood(words: str, whole: bool, kind: type[VmstateError]) -> None:
    error = refusal(words, whole)
    assert type(error) is kind
    assert words.strip() in str(error)


def test_arguments_of_qemu() -> None:
    assert monitor_path(["q", "-qmp", "unix:/a/b.qmp,server=on,wait=off", "-qmp", "unix:c"]) == "/a/b.qmp"
    assert monitor_path(["q", "-qmp", "tcp:x:1"]) is None
    assert monitor_path([]) is None
    check_arguments(["-serial", "file:x", "-chardev", "socket,path=stdio", "-m", "1"])
    check_arguments([])
    for wrong in (
        ["-nographic"],
        ["--nographic"],
        ["-serial", "stdio"],
        ["-chardev", "stdio,id=x"],
        ["-display", "curses"],
    ):
        with pytest.raises(WrongUsage):
            check_arguments(wrong)
