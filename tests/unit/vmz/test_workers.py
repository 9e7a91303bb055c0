"""Work for several threads, whose results come in order."""

import threading
import time

import pytest
from vmstate.vmz.workers import Pool, Result


def wait(released: threading.Event, name: bytes) -> Result:
    assert released.wait(10)
    return name, []


def test_results_come_in_the_order_of_the_work() -> None:
    pool, late, soon = Pool(2, 3), threading.Event(), threading.Event()
    pool.give(wait, late, b"late")
    pool.give(wait, soon, b"soon")
    assert not pool.full
    pool.give(wait, soon, b"last")
    assert pool.full
    soon.set()
    assert not pool.ready()
    late.set()
    assert [pool.next()[0] for _ in range(3)] == [b"late", b"soon", b"last"]
    assert not pool
    assert not pool.ready()
    pool.close()


def test_what_the_work_raises_is_raised_with_its_result() -> None:
    pool = Pool(1, 2)
    pool.give(lambda: 1 // 0)
    pool.give(lambda: (b"next", []))
    with pytest.raises(ZeroDivisionError):
        pool.next()
    assert pool.next() == (b"next", [])
    pool.close()


def test_closed_it_begins_nothing_more_and_leaves_no_thread() -> None:
    before, released, done = threading.active_count(), threading.Event(), []
    pool = Pool(1, 3)
    pool.give(wait, released, b"begun")
    for _ in range(2):
        pool.give(lambda: (b"", done.append(True) or []))
    pool.close()
    released.set()
    give_up = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < give_up
        time.sleep(0.001)
    assert done == []
