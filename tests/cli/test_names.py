"""One name, many places: each command has its page, its completion and its mentions, and they all say the same."""

import os
import re
import shlex
import socket
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from conftest import ROOT, run

COMMANDS = sorted(path.name for path in (ROOT / "bin").glob("vm-*"))
PAGES = sorted((ROOT / "man").iterdir())
COMPLETION = ROOT / "completions" / "vmstate.bash"


def shown(page: Path) -> str:
    """A page as a reader sees it, without the line breaks and the indentation."""
    text = run("mandoc", "-T", "utf8", page).out
    plain = subprocess.run(["col", "-bx"], input=text, capture_output=True, check=True).stdout.decode()
    return plain.replace("‐", "-").replace("−", "-")


def section(page: Path, name: str) -> str:
    found = re.search(rf"^{name}\n(.*?)^(?=\S)", shown(page), re.DOTALL | re.MULTILINE)
    assert found, f"{page.name} has no section {name}"
    return found[1]


def page_of(command: str) -> Path:
    return ROOT / "man" / f"{command}.1"


def help_of(command: str) -> str:
    return run(command, "--help").text


def usage_of(command: str) -> str:
    return re.split(r"\n\s*\n", help_of(command).split("Usage:\n")[1])[0]


def options_in_help(command: str) -> set[str]:
    """All names of options: those in the list, and those in the usage."""
    listed = help_of(command).split("Options:\n")[1]
    names = [re.split(r"  +", line.strip())[0] for line in listed.splitlines() if re.match(r" +-", line)]
    return options_in(" ".join(names) + " " + usage_of(command))


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])(-[a-zA-Z0-9]|--[a-z][a-z-]+)(?![\w-])", text))


def test_every_command_has_a_page_and_every_page_a_command() -> None:
    of_none = ["vmstate-stream.5", "vmstate.7"]
    assert [page.name for page in PAGES] == [f"{command}.1" for command in COMMANDS] + of_none


def test_every_command_is_installed() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options"]["scripts"].split() == [f"bin/{command}" for command in COMMANDS]


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text().split("\n## The commands\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(vm-[a-z]+)` \|", text, re.MULTILINE) == sorted_as_in_use(COMMANDS)


def test_every_command_is_at_a_glance_in_vmstate_7() -> None:
    text = (ROOT / "man" / "vmstate.7").read_text()
    assert re.findall(r"^\.It Xr (vm-[a-z]+) 1$", text, re.MULTILINE) == sorted_as_in_use(COMMANDS)
    assert re.findall(r"^\.Xr (vm-[a-z]+) 1(?: ,)?$", text.split(".Sh SEE ALSO")[1], re.MULTILINE) == COMMANDS


def sorted_as_in_use(commands: list[str]) -> list[str]:
    """The order of the tables: along the pipelines."""
    first = ["vm-dump", "vm-restore", "vm-announce", "vm-compress", "vm-encrypt", "vm-status", "vm-migrate"]
    first += ["vm-cancel", "vm-speed", "vm-stop", "vm-cont"]
    return first + sorted(set(commands) - set(first))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_usage_is_the_synopsis(command: str) -> None:
    assert section(page_of(command), "SYNOPSIS").split() == usage_of(command).split()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_the_options_of_the_help(command: str) -> None:
    page = page_of(command)
    described = re.findall(r"^     (-\S.*)$", section(page, "OPTIONS"), re.MULTILINE)
    heads = " ".join(re.split(r"  +", line)[0] for line in described)
    # What is in the help as one of many, -1 to -9, may be described together.
    heads = re.sub(r"-1\b.*?-9\b", " ".join(f"-{n}" for n in range(1, 10)), heads)
    assert options_in(heads) == options_in_help(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_has_its_sections(command: str) -> None:
    page = page_of(command)
    heads = re.findall(r"^\.Sh (.*)$", page.read_text(), re.MULTILINE)
    wanted = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "EXAMPLES", "NOTES", "SEE ALSO"]
    assert [head for head in heads if head in wanted] == wanted
    assert set(heads) - set(wanted) <= {"ENVIRONMENT"}
    statuses = re.findall(r"^     (\d) ", section(page, "EXIT STATUS"), re.MULTILINE)
    assert statuses == list("012345")


def test_the_six_statuses_are_in_vmstate_7_and_in_the_readme() -> None:
    assert re.findall(r"^     (\d) ", section(ROOT / "man" / "vmstate.7", "EXIT STATUS"), re.MULTILINE) == list(
        "012345"
    )
    assert re.findall(r"^\| (\d) \|", (ROOT / "README.md").read_text(), re.MULTILINE) == list("012345")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_are_clean(page: Path) -> None:
    done = run("mandoc", "-T", "lint", "-W", "warning", page)
    assert (done.status, done.out) == (0, b"")
    style = [line for line in run("mandoc", "-T", "lint", page).text.splitlines() if "STYLE" in line]
    assert [line for line in style if "referenced manual not found" not in line] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_refers_to_exists(page: Path) -> None:
    referred = re.findall(r"^\.Xr (vm\S+) (\d)", page.read_text(), re.MULTILINE)
    assert referred
    for name, number in referred:
        assert (ROOT / "man" / f"{name}.{number}").exists()


# Completion


def completed(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    script = f"""
        . {shlex.quote(str(COMPLETION))}
        COMP_WORDS=({shlex.join(words)})
        COMP_CWORD={len(words) - 1}
        _vmstate
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = run("bash", "-c", script, cwd=folder)
    assert (done.status, done.err) == (0, "")
    return sorted(done.text.split())


def test_completion_is_there_for_every_command() -> None:
    done = run("bash", "-c", f". {shlex.quote(str(COMPLETION))}; complete -p")
    assert sorted(re.findall(r"-F _vmstate (\S+)$", done.text, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_completion_of_options(command: str, work: Path) -> None:
    wanted = options_in_help(command)
    offered = completed(work, command, "-")
    assert {name for name in offered if name.startswith("--")} == {name for name in wanted if name.startswith("--")}
    assert wanted >= set(offered)
    assert completed(work, command, "--ver") == ["--verbose", "--version"]


def test_completion_of_the_beginning_of_an_option(work: Path) -> None:
    assert completed(work, "vm-dump", "--a") == ["--after"]
    assert completed(work, "vm-dump", "--after", "") == ["paused", "quit", "running"]
    assert completed(work, "vm-dump", "--after", "r") == ["running"]


def test_completion_of_guests_and_files(work: Path, gnupg: Path) -> None:
    with socket.socket(socket.AF_UNIX) as guest:
        guest.bind(str(work / "a.qmp"))
    (work / "a.vmz").touch()
    assert completed(work, "vm-status", "a.q") == ["a.qmp"]
    assert completed(work, "vm-compress", "a.v") == ["a.vmz"]
    assert completed(work, "vm-compress", "-o", "a.v") == ["a.vmz"]
    assert completed(work, "vm-announce", "52:54:00:12:34:56", "l") == ["lo"]
    assert completed(work, "vm-encrypt", "-r", "me") == ["me@example.org"]


def test_the_version_is_the_one_of_the_changelog() -> None:
    version = run("vm-dump", "--version").text.split()[-1]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_file_names_a_place_of_one_machine() -> None:
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES, *(ROOT / "docs").iterdir()]:
        assert str(ROOT) not in path.read_text()
        assert os.fsencode("\t") not in path.read_bytes()
