"""vm-restore with a death in it: after COUNT bytes of its channel behind the opening, the process kills itself.

    lazily.py COUNT ARGUMENT...

A negative COUNT is counted from the end of the opening backwards.
"""

import os
import runpy
import shutil
import signal
import sys

from vmstate import pageserver

left = int(sys.argv[1])
found = shutil.which("vm-restore")
assert found
real = os.writev
run = pageserver.PageServer.run


def begin(server: pageserver.PageServer, first: bytes = b"") -> None:
    global left
    left += len(first)
    run(server, first)


def write(fd: int, views: list[memoryview]) -> int:
    global left
    data = b"".join(views)[:left]
    count = real(fd, [memoryview(data)])
    left -= count
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return count


pageserver.PageServer.run = begin  # type: ignore[method-assign]
os.writev = write  # type: ignore[assignment]
sys.argv = [found, *sys.argv[2:]]
runpy.run_path(found, run_name="__main__")
