"""A moment until which something is waited for."""

import time
from collections.abc import Iterator


class Deadline:
    """`seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, never below 0."""
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end

    def tries(self, pause: float, slowest: float | None = None) -> Iterator[None]:
        """A turn of a loop at once, and one after each pause; none once the deadline is over, but for the first.

        slowest: each pause is half as long again as the one before, up to this; None: all are equal.
        """
        yield
        while not self.over:
            time.sleep(min(pause, self.left))
            if slowest is not None:
                pause = min(slowest, pause * 1.5)
            yield
