"""What a job has done so far, and how each part of it is undone: in reverse, and none is left out over another."""

from collections.abc import Callable
from typing import NamedTuple

from .errors import InDoubt, Stopped
from .signals import hold_signals, no_more_signals


class Trouble(NamedTuple):
    """The undoing of `step` failed with `error`."""

    step: str
    error: Exception


class _Step(NamedTuple):
    name: str
    undo: Callable[[], object]


class Rollback:
    """A stack of steps.  `trouble`: what went wrong when they were undone, in that order.

    A step is added before it is begun: what undoes it also copes with one that was not, or was in part.
    """

    def __init__(self, hint: str) -> None:
        """hint: what to do where a step could not be undone."""
        self._hint = hint
        self._steps: list[_Step] = []
        self.trouble: list[Trouble] = []

    def add(self, name: str, undo: Callable[[], object]) -> None:
        """name: what is put back, as it reads in 'could not put back NAME'."""
        self._steps.append(_Step(name, undo))

    def keep(self, name: str) -> None:
        """That step stays as it is from now on."""
        self._steps = [step for step in self._steps if step.name != name]

    @property
    def names(self) -> list[str]:
        return [step.name for step in self._steps]

    def undo(self, goes_on: bool = False, until: str | None = None) -> list[Trouble]:
        """All of it, each step once; a signal does not interrupt it.

        goes_on: it is done in another way now, so that a signal waits until that lets it come.  until: that step, and
        those before it, wait.
        """
        if goes_on:
            hold_signals()
        else:
            no_more_signals()
        while self._steps and self._steps[-1].name != until:
            step = self._steps.pop()
            try:
                step.undo()
            except Exception as error:  # noqa: BLE001 - whatever it is, the others are undone as well
                self.trouble.append(Trouble(step.name, error))
        return self.trouble

    def run(self, error: BaseException, goes_on: bool = False) -> BaseException:
        """`undo` over an error; the one to raise: that one, or InDoubt with both where a step could not be undone."""
        self.undo(goes_on)
        return self.in_doubt(error) if self.trouble else error

    def in_doubt(self, error: BaseException) -> InDoubt:
        """Of the trouble that there was."""
        why = "a signal came" if isinstance(error, Stopped) else str(error) or type(error).__name__
        words = "; ".join(f"could not put back {step}: {trouble}" for step, trouble in self.trouble)
        hints = [hint for _, trouble in self.trouble for hint in getattr(trouble, "hints", ())]
        found = InDoubt(f"{why}; and {words}", self._hint, *hints, *getattr(error, "hints", ()))
        found.__cause__ = self.trouble[0].error
        return found
