"""A job of which one undo step fails, after it has done its work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vmstate.errors import CannotDo
from vmstate.rollback import Rollback

TROUBLES = [CannotDo("no way back"), KeyError("a bug"), OSError(5, "Input/output error")]


class Undone:
    """`step` fails with `error`, if there is one.  ran: the names of all steps that were undone, in that order."""

    def __init__(self, patch: pytest.MonkeyPatch, step: str, error: Exception | None) -> None:
        self.ran: list[str] = []
        add = Rollback.add

        def spoilt(rollback: Rollback, name: str, undo: Callable[[], Any]) -> None:
            def undone() -> None:
                undo()
                self.ran.append(name)
                if name == step and error:
                    raise error

            add(rollback, name, undone)

        patch.setattr(Rollback, "add", spoilt)
