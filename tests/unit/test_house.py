"""The library keeps to the table of docs/hacking.md: who imports whom; no cycle, no long file, no long function."""

import ast
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

FILE_LINES, FUNCTION_LINES = 300, 40


class Import(NamedTuple):
    """`path`:`line` imports the module `target`, as vmstate.x.y; inner: inside a function."""

    path: str
    line: int
    target: str
    inner: bool


def sources(root: Path) -> dict[str, str]:
    """The text of each file of the library and of each command."""
    files = [*(root / "lib").rglob("*.py"), *(root / "bin").glob("vm-*")]
    return {str(path.relative_to(root)): path.read_text() for path in sorted(files)}


def module_of(path: str) -> str:
    return ".".join(Path(path).relative_to("lib").with_suffix("").parts).removesuffix(".__init__")


def walk(node: ast.AST, inner: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, and whether they are inside a function."""
    for part in ast.iter_child_nodes(node):
        yield part, inner
        yield from walk(part, inner or is_function(part))


def is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


@cache
def imports_of(path: str, text: str) -> list[Import]:
    """Every import of one file, wherever it stands; `target` may be a name in the module."""
    found = []
    for node, inner in walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [Import(path, node.lineno, alias.name, inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = Path(path).relative_to("lib").parts[: -node.level] if node.level else ()
            base = ".".join((*package, *([node.module] if node.module else [])))
            found += [Import(path, node.lineno, f"{base}.{alias.name}", inner) for alias in node.names]
    return found


def imports(texts: dict[str, str]) -> list[Import]:
    modules = {module_of(path) for path in texts if path.startswith("lib/")}
    found = [one for path, text in texts.items() for one in imports_of(path, text)]
    return [
        one if one.target in modules else one._replace(target=one.target.rpartition(".")[0])
        for one in found
        if one.target.split(".")[0] == "vmstate"
    ]


def table(root: Path) -> dict[str, set[str]]:
    """Each wing, and what it may import; what is behind a semicolon there is a remark."""
    rows = re.findall(r"^\| `([\w/*]+)` \|[^|]*\| ([^|]*) \|$", (root / "docs/hacking.md").read_text(), re.MULTILINE)
    wings = {name for name, _ in rows}
    found = {}
    for name, text in rows:
        named = set(re.findall(r"`(\w+)`", text.split(";")[0]))
        found[name] = wings - named - {name, "bin/*"} if text.startswith("everything but") else named
    return found


def wing_of(module: str) -> str | None:
    """None for the files at the root, which all may import."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else None


def unlisted(root: Path, found: list[Import]) -> Iterator[str]:
    allowed = table(root)
    for path, line, target, inner in found:
        here = "bin/*" if path.startswith("bin/") else wing_of(module_of(path))
        there = wing_of(target)
        if there is None or there == here:
            continue
        if here is None:
            yield f"{path}:{line}: a file at the root imports the wing {there}"
        elif here not in allowed:
            yield f"{path}:{line}: the table has no wing {here}"
        elif there not in allowed[here] and not (here == "bin/*" and inner and there in allowed):
            yield f"{path}:{line}: {here} imports {there}, which the table does not allow"


def cycles(edges: dict[str, set[str]]) -> Iterator[str]:
    done: set[str] = set()

    def follow(node: str, way: list[str]) -> Iterator[str]:
        if node in way:
            yield "a cycle: " + " -> ".join([*way[way.index(node) :], node])
        elif node not in done:
            for other in sorted(edges.get(node, ())):
                yield from follow(other, [*way, node])
            done.add(node)

    for node in sorted(edges):
        yield from follow(node, [])


def edges(found: list[Import]) -> dict[str, set[str]]:
    between: dict[str, set[str]] = {}
    for path, _, target, _ in found:
        # The version is in the package itself.
        if path.startswith("lib/") and target != "vmstate":
            between.setdefault(module_of(path), set()).add(target)
    return between


@cache
def functions(text: str) -> dict[str, int]:
    """The lines of each function, by its name with those around it."""
    found = {}

    def below(node: ast.AST, names: tuple[str, ...]) -> None:
        for part in ast.iter_child_nodes(node):
            inside = names
            if is_function(part) or isinstance(part, ast.ClassDef):
                inside = (*names, part.name)
            if is_function(part):
                found[".".join(inside)] = part.end_lineno - part.lineno + 1
            below(part, inside)

    below(ast.parse(text), ())
    return found


def too_long(lengths: dict[str, int], limit: int) -> Iterator[str]:
    for name, count in lengths.items():
        if count > limit:
            yield f"{name} has {count} lines: at most {limit}"


def faults(root: Path) -> list[str]:
    texts = sources(root)
    found = imports(texts)
    files = {path: len(text.splitlines()) for path, text in texts.items()}
    lines = {f"{path}:{name}": count for path, text in texts.items() for name, count in functions(text).items()}
    return [
        *unlisted(root, found),
        *cycles(edges(found)),
        *cycles(table(root)),
        *too_long(files, FILE_LINES),
        *too_long(lines, FUNCTION_LINES),
    ]


def test_the_house_is_as_its_table() -> None:
    wings = {path.parent.name for path in (ROOT / "lib/vmstate").glob("*/__init__.py")}
    assert set(table(ROOT)) == wings | {"bin/*"}
    assert faults(ROOT) == []


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    for folder in ("lib", "bin", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


def add(root: Path, path: str, text: str) -> None:
    with (root / path).open("a") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("lib/vmstate/qemu/status.py", "from ..stream import ram\n", "qemu imports stream"),
        ("lib/vmstate/qemu/status.py", "def f():\n    from ..vmz.writer import Writer\n", "qemu imports vmz"),
        ("lib/vmstate/dump/live.py", "import vmstate.restore.eager\n", "dump imports restore"),
        ("lib/vmstate/progress.py", "from .io import window\n", "a file at the root imports the wing io"),
        ("bin/vm-stop", "from vmstate.qemu import control\n", "bin/* imports qemu"),
        ("lib/vmstate/io/readers.py", "def f():\n    from . import output, pipeline\n", None),
        ("bin/vm-stop", "def f():\n    from vmstate.inspect import svg\n", None),
    ],
)
def test_an_import(house: Path, path: str, text: str, words: str | None) -> None:
    add(house, path, text)
    found = faults(house)
    assert len(found) == (words is not None)
    assert words is None or (f"{path}:" in found[0] and words in found[0])


@pytest.mark.parametrize("text", ["from .restless import g\n", "def f():\n    from . import restless\n"])
def test_a_cycle(house: Path, text: str) -> None:
    (house / "lib/vmstate/io/restless.py").write_text("from . import window\n\ng = 1\n")
    add(house, "lib/vmstate/io/window.py", text)
    (fault,) = faults(house)
    assert fault.startswith("a cycle: ")
    assert set(fault.removeprefix("a cycle: ").split(" -> ")) == {"vmstate.io.restless", "vmstate.io.window"}


def test_a_table_in_which_two_wings_need_each_other(house: Path) -> None:
    text = (house / "docs/hacking.md").read_text()
    (house / "docs/hacking.md").write_text(
        re.sub(r"^(\| `io` \|[^|]*\|) [^|]* \|$", r"\1 `stream` |", text, flags=re.M)
    )
    assert faults(house) == ["a cycle: io -> stream -> io"]


def test_a_wing_without_a_row(house: Path) -> None:
    (house / "lib/vmstate/attic").mkdir()
    add(house, "lib/vmstate/attic/box.py", "from ..io import window\n")
    assert faults(house) == ["lib/vmstate/attic/box.py:1: the table has no wing attic"]


def test_a_long_file(house: Path) -> None:
    add(house, "lib/vmstate/io/long.py", "x = 1\n" * FILE_LINES)
    assert faults(house) == []
    add(house, "lib/vmstate/io/long.py", "x = 1\n")
    assert faults(house) == [f"lib/vmstate/io/long.py has {FILE_LINES + 1} lines: at most {FILE_LINES}"]


@pytest.mark.parametrize("head", ["def f():\n", "async def f():\n", "class C:\n  def f(self):\n"])
def test_a_long_function(house: Path, head: str) -> None:
    add(house, "lib/vmstate/io/long.py", head + "    x = 1\n" * (FUNCTION_LINES - 1))
    assert faults(house) == []
    add(house, "lib/vmstate/io/long.py", "    x = 1\n")
    name = "C.f" if "class" in head else "f"
    words = f"lib/vmstate/io/long.py:{name} has {FUNCTION_LINES + 1} lines: at most {FUNCTION_LINES}"
    assert faults(house) == [words]
