"""vm-restore with a death in it: after COUNT bytes of its channel the process kills itself.

    lazy_fault.py MONITOR COUNT ARGUMENT...

They are counted from the moment at which the guest runs, as its second monitor has it; with `-` for MONITOR from the
end of the devices on, backwards where COUNT is negative.  With `fill` it is pages that are counted, put in from
outside; with `eio` 4 MiB of the file cannot be read from there on.
"""

import contextlib
import errno
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vm import Qmp
from vmstate.qemu import userfault
from vmstate.restore import page_server

monitor, left = sys.argv[1], int(sys.argv[2])
counts = threading.Event()
command = shutil.which("vm-restore")
assert command
real_write, real_run, real_ask = os.writev, page_server.PageServer.run, userfault.Userfault._ask
real_pread = os.pread


def look() -> None:
    while not counts.is_set():
        with contextlib.suppress(OSError), Qmp(monitor) as qmp:
            if qmp.cmd("query-status")["running"]:
                counts.set()
        time.sleep(0.002)


def run(server: page_server.PageServer, first: bytes = b"") -> None:
    global left
    if monitor == "-":
        left += len(first)
        counts.set()
    else:
        threading.Thread(target=look, daemon=True).start()
    real_run(server, first)


def write(fd: int, views: list[memoryview]) -> int:
    global left
    if not counts.is_set():
        return real_write(fd, views)
    count = os.write(fd, b"".join(views)[:left]) if left else 0
    left -= count
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return count


def ask(faults: userfault.Userfault, what: int, arguments: bytes) -> None:
    global left
    real_ask(faults, what, arguments)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


def pread(fd: int, count: int, at: int) -> bytes:
    if left <= at < left + (4 << 20):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return real_pread(fd, count, at)


if monitor == "eio":
    os.pread = pread  # type: ignore[assignment]
if monitor == "fill":
    userfault.Userfault._ask = ask  # type: ignore[method-assign]
page_server.PageServer.run = run  # type: ignore[method-assign]
os.writev = write  # type: ignore[assignment]
sys.argv = [command, *sys.argv[3:]]
runpy.run_path(command, run_name="__main__")
