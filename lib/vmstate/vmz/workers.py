"""Work for all processors, with results in order."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Pool:
    """Work for all processors, whose results come in the order in which it was given."""

    def __init__(self, threads: int, ahead: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._ahead = ahead
        self._waiting: deque[Future[tuple[bytes, list[bytes]]]] = deque()

    def give(self, work: Callable[..., tuple[bytes, list[bytes]]], *arguments: object) -> None:
        self._waiting.append(self._pool.submit(work, *arguments))

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._ahead

    def ready(self) -> bool:
        return bool(self._waiting) and self._waiting[0].done()

    def next(self) -> tuple[bytes, list[bytes]]:
        """The oldest result, once it is there; raises what the work raised."""
        return self._waiting.popleft().result()

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def processors(threads: int = 0) -> int:
    return threads or len(os.sched_getaffinity(0))
