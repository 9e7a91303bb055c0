"""Every step is undone, in reverse, whatever becomes of the others."""

import signal

import pytest
from vmstate.errors import CannotDo, GuestGone, InDoubt, Stopped
from vmstate.rollback import Rollback, Trouble
from vmstate.signals import release_signals, stop_on_signal


def fails(error: Exception) -> None:
    raise error


def test_steps_are_undone_in_reverse_and_once() -> None:
    done: list[str] = []
    rollback = Rollback("look there")
    for name in "abc":
        rollback.add(name, lambda name=name: done.append(name))
    error = CannotDo("no")
    assert rollback.run(error) is error
    assert rollback.run(error) is error
    assert done == ["c", "b", "a"]


def test_a_step_that_is_kept_stays() -> None:
    done: list[str] = []
    rollback = Rollback("look there")
    for name in "ab":
        rollback.add(name, lambda name=name: done.append(name))
    rollback.keep("b")
    assert rollback.names == ["a"]
    rollback.undo()
    assert done == ["a"]


@pytest.mark.parametrize("bad", "abc")
def test_none_is_left_out_over_another(bad: str) -> None:
    done: list[str] = []
    rollback = Rollback("look there")
    trouble = GuestGone("it is gone")
    for name in "abc":
        undo = (lambda error=trouble: fails(error)) if name == bad else (lambda name=name: done.append(name))
        rollback.add(name, undo)
    found = rollback.run(CannotDo("the first", "a hint"))
    assert done == [name for name in "cba" if name != bad]
    assert isinstance(found, InDoubt)
    assert str(found) == f"the first; and could not put back {bad}: it is gone"
    assert found.hints == ("look there", "a hint")
    assert rollback.trouble == [Trouble(bad, trouble)]


def test_a_part_of_it_waits() -> None:
    done: list[str] = []
    rollback = Rollback("look there")
    for name in "abc":
        rollback.add(name, lambda name=name: done.append(name))
    assert rollback.undo(until="b") == []
    assert (done, rollback.names) == (["c"], ["a", "b"])
    rollback.undo(until="x")
    assert done == ["c", "b", "a"]


def test_the_hints_of_trouble_are_told() -> None:
    rollback = Rollback("look there")
    rollback.add("it", lambda: fails(CannotDo("no", "or there")))
    found = rollback.run(CannotDo("the first", "a hint"))
    assert found.hints == ("look there", "or there", "a hint")


@pytest.mark.parametrize("trouble", [KeyError("x"), OSError(5, "I/O"), ValueError()])
def test_a_bug_in_a_step_is_trouble_as_well(trouble: Exception) -> None:
    rollback = Rollback("look there")
    rollback.add("it", lambda: fails(trouble))
    found = rollback.run(Stopped(15))
    assert isinstance(found, InDoubt)
    assert str(found).startswith("a signal came; and could not put back it: ")
    assert found.__cause__ is trouble


def test_a_signal_does_not_interrupt_it() -> None:
    rollback = Rollback("look there")
    done: list[str] = []
    rollback.add("it", lambda: done.append("it"))
    rollback.add("before", lambda: signal.raise_signal(signal.SIGTERM))
    rollback.undo()
    assert done == ["it"]
    signal.raise_signal(signal.SIGTERM)


def test_a_signal_waits_for_what_is_done_instead() -> None:
    signal.signal(signal.SIGTERM, stop_on_signal)
    rollback = Rollback("look there")
    done: list[str] = []
    rollback.add("it", lambda: done.append("it"))
    rollback.add("before", lambda: signal.raise_signal(signal.SIGTERM))
    error = CannotDo("not in this way")
    assert rollback.run(error, goes_on=True) is error
    assert done == ["it"]
    with pytest.raises(Stopped):
        release_signals()
