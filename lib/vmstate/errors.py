"""The family of errors; each class knows the exit status of a command that ends with it.

    VmstateError
    +-- CannotDo   1  it could not be done, and every guest involved is as it was
    |   +-- GuestGone   the guest's process or its monitor went away
    |   +-- Refused     QEMU refused a command; `text` has its own words
    +-- WrongUsage 2  the command line is wrong
    +-- Damaged    3  the input is truncated, corrupt, forged, or no state at all
    +-- Misfit     4  the state and the guest do not fit
    +-- InDoubt    5  the outcome is not settled; the message says who stands where

Beside them stands `Stopped`, which is no error: a signal asked the command to put things back and die of it.
"""


class VmstateError(Exception):
    """A reason to end with `status`; `hints` say what to do next, one sentence each.

    told: the other side of a link has been told, and tells its user.
    """

    status = 1
    told = False

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__(message)
        self.hints = hints


class CannotDo(VmstateError):
    """Status 1."""


class GuestGone(CannotDo):
    """The guest's process or its monitor went away."""


class Refused(CannotDo):
    """QEMU refused a command; `text` is what it said."""

    def __init__(self, command: str, text: str, *hints: str) -> None:
        super().__init__(f"QEMU refused '{command}': {text}", *hints)
        self.text = text


class WrongUsage(VmstateError):
    """Status 2."""

    status = 2


class Damaged(VmstateError):
    """Status 3."""

    status = 3


class Misfit(VmstateError):
    """Status 4."""

    status = 4


class InDoubt(VmstateError):
    """Status 5."""

    status = 5


class Stopped(BaseException):
    """Signal `number` arrived: put the guest back, then die of it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
