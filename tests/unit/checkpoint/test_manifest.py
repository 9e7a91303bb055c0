"""Manifests of checkpoints, and what is derived from names of images."""

import json
from pathlib import Path
from typing import Any

import pytest
from vmstate.checkpoint import manifest
from vmstate.checkpoint.disks import INTERNAL, OVERLAY, check_tag, stem
from vmstate.errors import CannotDo, Damaged, Misfit, WrongUsage
from vmstate.restore.used_states import UsedStates


def made(folder: Path, **changed: Any) -> manifest.Manifest:
    image = folder / "a.qcow2"
    image.write_bytes(b"x" * 10)
    stat = image.stat()
    disk = manifest.Entry("d", "n", "qcow2", 10, str(image), [], "", stat.st_size, stat.st_mtime)
    values: dict[str, Any] = {"tag": "t", "mode": OVERLAY, "identity": "0", "run": True, "machine": "q35"}
    return manifest.Manifest(**{**values, "qemu": "7.2.0", "command": [], "nics": [], "disks": [disk], **changed})


def test_there_and_back(tmp_path: Path) -> None:
    wrote = made(tmp_path)
    manifest.write(str(tmp_path / "m"), wrote)
    assert manifest.read(str(tmp_path / "m")) == wrote


def changed(tmp_path: Path, **values: Any) -> str:
    path = tmp_path / "m"
    text = {"kind": manifest.KIND, "version": manifest.VERSION, **made(tmp_path).values(), **values}
    path.write_text(json.dumps(text))
    return str(path)


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"kind": "x"}, Damaged, "field 'kind': expected 'vmstate manifest', found 'x'"),
        ({"version": 2}, CannotDo, "of version 2; this is known up to 1"),
        ({"mode": "x"}, Damaged, "field 'mode': expected 'overlay' or 'internal', found 'x'"),
        ({"tag": 1}, Damaged, "field 'tag': expected a text, found 1"),
        (
            {"disks": [{"device": "d"}]},
            Damaged,
            r"field 'disks\[0\].chain': expected absolute paths|field 'disks\[0\].node': expected a value",
        ),
        ({"disks": 1}, Damaged, "field 'disks': expected a list, found 1"),
        ({"run": "no"}, Damaged, "field 'run': expected true or false, found 'no'"),
        ({"command": [1]}, Damaged, "field 'command': expected a list of texts"),
        ({"nics": ["x"]}, Damaged, r"field 'nics\[0\]': expected an object, found 'x'"),
        ({"made": "x"}, Damaged, "field 'made': expected a number, found 'x'"),
        ({"state": 5}, Damaged, "field 'state': expected a text, found 5"),
        ({"more": 1}, Damaged, "field 'more': expected none of that name, found 1"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, values: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        manifest.read(changed(tmp_path, **values))


def test_bytes_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for data in (b"", b"\xff\xfe", b"[]", b"3"):
        path.write_bytes(data)
        with pytest.raises(Damaged):
            manifest.read(str(path))
    with pytest.raises(CannotDo):
        manifest.read(str(tmp_path / "none"))


def test_an_image_without_its_whole_path(tmp_path: Path) -> None:
    disk = made(tmp_path).disks[0]._asdict()
    with pytest.raises(Damaged, match=r"field 'disks\[0\].image': expected .*, found 'a.qcow2'"):
        manifest.read(changed(tmp_path, disks=[{**disk, "image": "a.qcow2"}]))


def test_an_image_that_was_written(tmp_path: Path) -> None:
    entry = made(tmp_path).disks[0]
    manifest.require_unwritten(entry, OVERLAY, False)
    Path(entry.image).write_bytes(b"y" * 11)
    for mode, discard in ((OVERLAY, False), (OVERLAY, True), (INTERNAL, False)):
        with pytest.raises(Misfit, match="was written since"):
            manifest.require_unwritten(entry, mode, discard)
    manifest.require_unwritten(entry, INTERNAL, True)
    Path(entry.image).unlink()
    with pytest.raises(CannotDo, match="cannot read the disk"):
        manifest.require_unwritten(entry, INTERNAL, True)


@pytest.mark.parametrize(
    ("chain", "found"),
    [
        (("/d/a.qcow2",), "/d/a"),
        (("/d/a.t2.qcow2", "/d/a.t1.qcow2", "/d/a.qcow2"), "/d/a"),
        (("/d/a.t1.qcow2", "/d/a.img", "/d/golden.qcow2"), "/d/a"),
        (("/d/vm.qcow2", "/golden/vm.qcow2"), "/d/vm"),
        (("/d/a.b.qcow2", "/d/c.qcow2"), "/d/a.b"),
    ],
)
def test_the_stem_of_an_image(chain: tuple[str, ...], found: str) -> None:
    assert stem(chain) == found


@pytest.mark.parametrize("tag", ["", "a/b", "-a", ".a", "a b", "a" * 101, "ä"])
def test_tags_that_are_none(tag: str) -> None:
    with pytest.raises(WrongUsage):
        check_tag(tag)


def test_a_state_of_which_a_guest_was_made(tmp_path: Path) -> None:
    used = UsedStates(str(tmp_path / "notes"))
    used.require_new("a")
    used.note("a")
    used.require_new("b")
    for refuse in (used.require_new, used.note):
        with pytest.raises(Misfit, match="was made of this state already"):
            refuse("a")
    used.note("b")
    assert [line.split()[0] for line in (tmp_path / "notes").read_text().splitlines()] == ["a", "b"]
    with pytest.raises(CannotDo, match="cannot write"):
        UsedStates(str(tmp_path / "no" / "notes")).note("a")
