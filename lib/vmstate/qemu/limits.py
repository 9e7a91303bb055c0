"""What a migration may take before it is cancelled, and whether it comes any nearer to its end."""

import time
from typing import NamedTuple

from .state import GuestState

# Two rounds running that leave more than this share of what was to be sent bring it no nearer.
SHRINKS = 0.9


class Limits(NamedTuple):
    """timeout: in seconds; rounds: how often RAM is gone through.  None: as long as it takes."""

    timeout: float | None = None
    rounds: int | None = None

    def passed(self, what: str, guest_state: GuestState, started: float) -> str | None:
        """Which of them `what`, begun at `started`, has passed, in words; none in its last step."""
        if guest_state.run == "finish-migrate" or not guest_state.moving:
            return None
        now = guest_state.ram.round if guest_state.ram else 0
        if self.timeout is not None and time.monotonic() - started > self.timeout:
            return f"{what} was not over in {self.timeout:g} s, in round {now}"
        if self.rounds is not None and now > self.rounds:
            return f"{what} does not come to an end: {self.rounds} rounds are over, and pages are left"
        return None


class Convergence:
    """Whether what remains at the begin of each round grows less."""

    def __init__(self) -> None:
        self._round = 0
        self._left: int | None = None
        self._in_vain = 0

    def stalls(self, guest_state: GuestState) -> bool:
        """To be asked often: two rounds running have not made it less by a tenth."""
        ram = guest_state.ram
        if ram is None or ram.round <= self._round:
            return False
        vain = self._left is not None and ram.remaining > SHRINKS * self._left
        self._in_vain = self._in_vain + 1 if vain else 0
        self._round, self._left = ram.round, ram.remaining
        return self._in_vain >= 2
