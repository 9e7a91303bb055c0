"""What is printed, or cannot be, changes no status; where data would go to, or come from, must be open."""

import ast
import os
from pathlib import Path

import pytest
from conftest import ROOT, run, shell
from unit.streams import state

# With a guest that is not there: what is refused is refused before it is looked for.
ANSWERS = [
    "vm-status a.qmp",
    "vm-status --json a.qmp",
    "vm-inspect s",
    "vm-inspect --json s",
    "vm-inspect --device cpu s",
    "vm-compress --list s.vmz",
    "vm-encrypt --list s",
    "vm-dump -n a.qmp",
    "vm-migrate --dry-run a.qmp link:true",
    "vm-announce --list a.qmp",
    "vm-announce --check a.qmp",
]
STATES = [
    "vm-dump a.qmp",
    "vm-dump --snapshot a.qmp",
    "vm-dump -o - a.qmp",
    "vm-dump -o /dev/stdout a.qmp",
    "vm-dump -o /dev/fd/1 a.qmp",
    "vm-compress s",
    "vm-compress -d s.vmz",
    "vm-encrypt -r me@example.org s",
    "vm-encrypt -d s",
    "vm-verify --pass s",
    "vm-verify --pass -o /dev/stdout s",
    "vm-restore --receive a.qmp",
    "vm-restore --lazy --stdio s.vmz",
    "vm-migrate a.qmp fd:1",
]
INPUTS = [
    "vm-compress",
    "vm-compress -d -o x -",
    "vm-compress --list",
    "vm-encrypt -r me@example.org -o x",
    "vm-encrypt -d -o x",
    "vm-encrypt --list",
    "vm-verify",
    "vm-verify /dev/stdin",
    "vm-inspect",
    "vm-inspect --diff - s",
    "vm-restore a.qmp",
    "vm-restore --lazy a.qmp",
    "vm-restore --receive a.qmp",
    "vm-restore -- qemu-system-none",
    "vm-announce",
    "vm-migrate a.qmp fd:0",
]


@pytest.fixture
def states(work: Path) -> Path:
    (work / "s").write_bytes(state("pc-7.2"))
    assert run("vm-compress", "-o", "s.vmz", "s", cwd=work).status == 0
    return work


@pytest.mark.parametrize("line", ANSWERS + STATES)
def test_data_need_an_open_output(line: str, states: Path, gnupg: Path) -> None:
    before = sorted(os.listdir(states))
    done = shell(f"{line} >&-", states)
    assert done.status == 2
    assert "standard output is closed" in done.err
    assert "redirect it: > FILE, or | COMMAND" in done.err
    assert sorted(os.listdir(states)) == before


@pytest.mark.parametrize("line", INPUTS)
def test_data_need_an_open_input(line: str, states: Path, gnupg: Path) -> None:
    before = sorted(os.listdir(states))
    done = shell(f"{line} <&-", states)
    assert done.status == 2
    assert f"{line.split()[0]}: error: standard input is closed\n" in done.err
    assert sorted(os.listdir(states)) == before


@pytest.mark.parametrize("command", ["vm-verify", "vm-dump"])
def test_help_is_an_answer(command: str, work: Path) -> None:
    assert shell(f"{command} --help >&-", work).status == 2
    assert shell(f"{command} --version >&-", work).status == 2


@pytest.mark.parametrize(
    "line",
    [
        "vm-verify s",
        "vm-verify --json s",
        "vm-compress -v -o x s",
        "vm-encrypt -v -r me@example.org -o x s",
    ],
)
@pytest.mark.parametrize("where", [">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full 2>&1", "2>&1 | true"])
def test_words_that_go_nowhere(line: str, where: str, states: Path, gnupg: Path) -> None:
    done = shell(f"{line} {where}", states)
    assert done.status == 0, done.err
    assert "error" not in done.err


def test_no_file_gets_the_number_of_a_closed_one(states: Path) -> None:
    """What is said would be written into it."""
    assert shell("vm-compress -v -o x s <&- >&- 2>&-", states).status == 0
    assert (states / "x").read_bytes() == (states / "s.vmz").read_bytes()
    assert shell("vm-compress -v -d -o y x <&- >&- 2>&-", states).status == 0
    assert (states / "y").read_bytes() == (states / "s").read_bytes()


def test_a_name_that_is_no_text(work: Path) -> None:
    done = run("vm-status", b"\xff.qmp", cwd=work, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert (done.status, "internal" in done.err) == (1, False)


def test_nobody_prints_by_himself() -> None:
    """All that is said goes through `Report`, which knows whether it may fail."""
    own = {"lib/vmstate/report.py", "lib/vmstate/stdio.py", "lib/vmstate/cli/run.py", "lib/vmstate/cli/daemonize.py"}
    files = [*(ROOT / "bin").glob("vm-*"), *(ROOT / "lib/vmstate").rglob("*.py")]
    for path in files:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and name not in own:
                called = ast.unparse(node.func)
                assert called != "print", f"{name}:{node.lineno}"
                assert not called.startswith("sys.stdout."), f"{name}:{node.lineno}"
