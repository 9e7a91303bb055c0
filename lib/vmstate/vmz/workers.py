"""Work for all processors, with results in order."""

import os
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread

Result = tuple[bytes, list[bytes]]


class _Task:
    def __init__(self, work: Callable[..., Result], arguments: tuple[object, ...]) -> None:
        self._work = work
        self._arguments = arguments
        self._result: Result | None = None
        self._error: BaseException | None = None
        # Held until the work is done.
        self._undone = Lock()
        self._undone.acquire()

    def run(self) -> None:
        try:
            self._result = self._work(*self._arguments)
        except BaseException as error:  # noqa: BLE001 - it is raised to whoever asks for the result
            self._error = error
        self._undone.release()

    def done(self) -> bool:
        return not self._undone.locked()

    def result(self) -> Result:
        with self._undone:
            if self._error is not None:
                raise self._error
            assert self._result is not None
            return self._result


class Pool:
    """Work for all processors, whose results come in the order in which it was given.

    concurrent.futures has more, and takes 7 ms to import: as long as a group takes to be packed.
    """

    def __init__(self, threads: int, ahead: int) -> None:
        self._most = threads
        self._ahead = ahead
        self._threads: list[Thread] = []
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        self._waiting: deque[_Task] = deque()
        self._closed = False

    def give(self, work: Callable[..., Result], *arguments: object) -> None:
        task = _Task(work, arguments)
        self._waiting.append(task)
        self._queue.put(task)
        if len(self._threads) < self._most:
            # Whoever forgets to close it must not wait for it at the end.
            self._threads.append(Thread(target=self._run, daemon=True))
            self._threads[-1].start()

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._ahead

    def ready(self) -> bool:
        return bool(self._waiting) and self._waiting[0].done()

    def next(self) -> Result:
        """The oldest result, once it is there; raises what the work raised."""
        return self._waiting.popleft().result()

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """What has not been begun is not done any more."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)

    def _run(self) -> None:
        while not self._closed:
            if task := self._queue.get():
                task.run()
            # Or its result would be kept until there is more to do.
            del task


def processors(threads: int = 0) -> int:
    return threads or len(os.sched_getaffinity(0))
