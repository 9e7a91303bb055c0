"""What is known of a state before a lazy restore begins."""

import subprocess
from pathlib import Path

import pytest
from vmstate.restore.lazy_state import lazy_state
from vmstate.stream.reader import StateReader
from vmstate.stream.records import Configuration

from unit.streams import Pieces, state

NAME = "q35-10.0"


def packed(path: Path) -> bytes:
    return subprocess.run(["vm-compress", "-q", path], capture_output=True, check=True, timeout=60).stdout


def test_its_head_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the whole state is read for its index; and it is the same state, plain or packed."""
    heads: list[StateReader] = []
    real = StateReader._configuration

    def configuration(reader: StateReader) -> Configuration:
        heads.append(reader)
        return real(reader)

    plain = tmp_path / "s"
    plain.write_bytes(state(NAME))
    (tmp_path / "s.vmz").write_bytes(packed(plain))
    monkeypatch.setattr(StateReader, "_configuration", configuration)
    found = []
    for path in (plain, tmp_path / "s.vmz"):
        with path.open("rb", buffering=0) as file:
            found.append(lazy_state(file.fileno()))
        assert len(heads) == len(found)
    assert found[0].identity == found[1].identity
    assert found[0].opening == found[1].opening
    assert found[0].state.description == found[1].state.description


def test_the_records_of_a_head(tmp_path: Path) -> None:
    """The first ones of the state, as far as RAM's list of blocks and the footer behind it."""
    (tmp_path / "s").write_bytes(state(NAME))
    with (tmp_path / "s").open("rb", buffering=0) as file:
        found = lazy_state(file.fileno()).file.head_records
    assert found == list(StateReader(Pieces(state(NAME))))[: len(found)]
    assert [type(record).__name__ for record in found[-3:]] == ["Blocks", "EndOfBody", "Footer"]
