"""Progress of long work: a bar on a terminal, lines or JSON where asked for, one line on SIGUSR1."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .report import Report, size_words, time_words

# Work that is over sooner shows no bar.
LASTS = 1.0
PERIOD = 0.5


class Sample(NamedTuple):
    """Where the work stands: bytes done, bytes in all (None: not known), and further facts by name."""

    done: int
    total: int | None = None
    facts: Mapping[str, Any] = MappingProxyType({})
    words: str = ""


class Progress:
    """While this context lasts, `sample` is asked now and then and its answer shown."""

    def __init__(self, report: Report, mode: str, sample: Callable[[], Sample | None]) -> None:
        self._report = report
        self._sample = sample
        terminal = sys.stderr.isatty() and not report.as_json
        self._shown = mode == "on" or (mode == "auto" and terminal)
        self._bar: Any = None
        self._terminal = terminal
        self._started = time.monotonic()
        self._over = threading.Event()
        # A plain flag: an Event has a lock, which a second signal could find taken by the first.
        self._asked = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Progress":
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGUSR1, self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        self._thread.join(10)
        if self._bar is not None:
            # A terminal that has gone away changes nothing of what was done.
            with contextlib.suppress(OSError, ValueError):
                self._bar.close()

    def _ask(self, _number: int, _frame: object) -> None:
        self._asked = True

    def _work(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._show_now_and_then()

    def _show_now_and_then(self) -> None:
        while not self._over.is_set():
            if self._over.wait(PERIOD):
                return
            asked, self._asked = self._asked, False
            lasted = time.monotonic() - self._started
            if asked or (self._shown and (lasted > LASTS or not self._terminal)):
                self._show(asked, lasted)

    def _show(self, asked: bool, lasted: float) -> None:
        sample = self._sample()
        if sample is None:
            return
        if self._terminal and self._shown:
            self._draw(sample)
        if asked or not self._terminal:
            self._report.progress(self._line(sample, lasted), self._values(sample, lasted))

    def _draw(self, sample: Sample) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._report.name, unit="B", unit_scale=True, unit_divisor=1024, leave=False, dynamic_ncols=True
            )
            self._bar.start_t -= time.monotonic() - self._started
        self._bar.total = sample.total
        self._bar.n = sample.done
        self._bar.set_postfix_str(sample.words, refresh=False)
        self._bar.refresh()

    @staticmethod
    def _values(sample: Sample, lasted: float) -> dict[str, Any]:
        return {"done": sample.done, "total": sample.total, "seconds": round(lasted, 3), **sample.facts}

    @staticmethod
    def _line(sample: Sample, lasted: float) -> str:
        rate = sample.done / lasted if lasted else 0.0
        words = [f"{size_words(sample.done)} done"]
        if sample.total:
            left = (sample.total - sample.done) / rate if rate else 0.0
            percent = 100 * sample.done / sample.total
            words = [f"{percent:.0f} %", f"{size_words(sample.done)} of {size_words(sample.total)}"]
            words += [f"{time_words(left)} left"] if rate else []
        words.append(f"{size_words(rate)}/s")
        return ", ".join(words + ([sample.words] if sample.words else []))
