"""A guest that was loaded and is let run, by what a scripted QEMU does then."""

import pytest
from vmstate.errors import InDoubt
from vmstate.qemu.incoming import Waiting
from vmstate.qemu.monitor import Monitor
from vmstate.qemu.settings import prepare

from unit.qemu.fake_qemu import FakeQemu


def loaded(path: str, qemu: FakeQemu) -> Waiting:
    waiting = Waiting(path)
    with Monitor(path) as monitor:
        prepare(monitor, ("late-block-activate",), {"announce-rounds": 1}, waiting.saved)
    qemu.run, qemu.migration = "paused", "completed"
    return waiting


def test_it_runs_before_its_settings_are_put_back(qemu: FakeQemu, path: str) -> None:
    before = qemu.settings()
    waiting = loaded(path, qemu)
    qemu.heard.clear()
    assert waiting.settle(True) == "running"
    assert qemu.heard.index("cont") < qemu.heard.index("migrate-set-parameters")
    assert (qemu.settings()[1] | {"announce-rounds": 5}, qemu.run) == (before[1], "running")
    assert not any(qemu.capabilities.values())


@pytest.mark.parametrize("step", range(4, 12))
def test_one_that_ends_behind_its_first_step_has_run(qemu: FakeQemu, path: str, step: int) -> None:
    """It is loaded and has run: whoever is told else could have another one run."""
    waiting = loaded(path, qemu)
    qemu.heard.clear()
    # Its `cont`, and the look whether it runs, come first.
    qemu.dies_in = step + 1
    assert waiting.settle(True) == "running"
    assert "cont" in qemu.heard


def test_one_that_does_not_run_is_in_doubt(qemu: FakeQemu, path: str) -> None:
    waiting = loaded(path, qemu)
    qemu.refuses = {"cont": 'Failed to get "write" lock'}
    with pytest.raises(InDoubt, match="is loaded, but the guest at .* stands paused: Failed to get"):
        waiting.settle(True)


def test_one_that_is_to_stay_paused(qemu: FakeQemu, path: str) -> None:
    before = qemu.settings()
    waiting = loaded(path, qemu)
    qemu.heard.clear()
    assert waiting.settle(False) == "paused"
    assert "cont" not in qemu.heard
    assert (qemu.settings(), qemu.objects) == (before, {})
