"""Stands in the link between vm-migrate and vm-restore --receive, and at one frame does something to somebody.

    link:python link_fault.py ONCE KIND COUNT before|after|later DEED PID -- COMMAND

At the COUNTth frame of KIND (as in docs/link.md), before or after it is passed on (later: a second), DEED is done:
`kill` (SIGKILL to PID, which is a number, `source` for vm-migrate or `receiver` for COMMAND), `end` (the same, and the
link is cut), `cut` (both directions end), `flip` (a bit of the frame), `pause` (PID seconds), or `stall` (nothing
passes any more, until the link is ended).  The file ONCE is made then, and where it is there already all passes.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

SIZE = 16


class Fault:
    def __init__(self, arguments: list[str]) -> None:
        once, self.kind, count, self.when, self.deed, self.whom = arguments[:6]
        self.once, self.count = Path(once), int(count)
        self.seen = 0
        self.lock = threading.Lock()
        self.child = subprocess.Popen(arguments[7:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def carry(self, source: int, sink: int) -> None:
        try:
            while head := exactly(source, SIZE):
                frame = bytearray(head + exactly(source, int.from_bytes(head[8:12], "big")))
                mine = chr(head[4]) == self.kind and self.is_it()
                if mine and self.when == "before":
                    self.act(frame)
                write(sink, frame)
                if mine and self.when == "after":
                    self.act(frame)
                if mine and self.when == "later":
                    threading.Timer(1, self.act, (frame,)).start()
        except OSError:
            pass
        os.close(sink)

    def is_it(self) -> bool:
        with self.lock:
            self.seen += 1
            if self.seen != self.count or self.once.exists():
                return False
            self.once.touch()
            return True

    def act(self, frame: bytearray) -> None:
        if self.deed == "flip":
            frame[len(frame) // 2] ^= 4
        elif self.deed == "pause":
            time.sleep(float(self.whom))
        elif self.deed == "stall":
            time.sleep(3600)
        elif self.deed == "cut":
            os._exit(1)
        else:
            pid = {"source": os.getppid(), "receiver": self.child.pid}.get(self.whom) or int(self.whom)
            os.kill(pid, signal.SIGKILL)
            if self.deed == "end":
                os._exit(1)
            time.sleep(0.3)

    def run(self) -> None:
        assert self.child.stdin and self.child.stdout
        back = threading.Thread(target=self.carry, args=(self.child.stdout.fileno(), 1))
        there = threading.Thread(target=self.carry, args=(0, os.dup(self.child.stdin.fileno())), daemon=True)
        self.child.stdin.close()
        there.start()
        back.start()
        back.join()
        os._exit(self.child.wait())


def exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = os.read(fd, count - len(data))
        if not more:
            return b""
        data += more
    return data


def write(fd: int, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    Fault(sys.argv[1:]).run()
