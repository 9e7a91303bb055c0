"""How large the state of a guest would be, and how long it would take (`vm-dump -n`), without sending anything."""

import time
from typing import Any

from ..io.descriptors import BLOCK, channel, memory
from ..qemu.monitor import Monitor
from ..qemu.sendable import require_sendable
from ..qemu.state import ram_blocks

PAGE = 4096
# What a page that is not zero, and one that is, take in the stream (migration/ram.c).
NORMAL_RECORD, ZERO_RECORD = 8 + PAGE, 8 + 1


def estimate(path: str, rate: int) -> dict[str, Any]:
    """`bytes` of the state and `seconds` it takes at `rate` bytes a second (0: as fast as this machine carries them).

    `touched` is the memory that the guest has used so far, as the kernel counts it, or None where it may not be read.
    """
    with Monitor(path) as monitor:
        guest_state = require_sendable(monitor, path)
        total = sum(used for used, _ in ram_blocks(monitor).values())
        sizes = {used for used, _ in ram_blocks(monitor).values()}
        touched = _resident(monitor.pid(), sizes)
    size = _stream_size(total, total if touched is None else min(touched, total))
    speed = rate or _speed()
    return {
        "guest": guest_state.run,
        "ram": total,
        "touched": touched,
        "bytes": size,
        "rate": speed,
        "limited": bool(rate),
        "seconds": round(size / speed, 3),
    }


def _stream_size(total: int, normal: int) -> int:
    return normal // PAGE * NORMAL_RECORD + (total - normal) // PAGE * ZERO_RECORD


def _resident(pid: int, sizes: set[int]) -> int | None:
    """Bytes in memory or swap of the mappings that are as large as a RAM block."""
    found, counting = 0, False
    try:
        with open(f"/proc/{pid}/smaps", encoding="ascii", errors="replace") as lines:
            for line in lines:
                name, _, rest = line.partition(":")
                if name == "Size":
                    counting = int(rest.split()[0]) << 10 in sizes
                elif counting and name in ("Rss", "Swap"):
                    found += int(rest.split()[0]) << 10
    except OSError:
        return None
    return found


def _speed() -> int:
    """Bytes a second that this machine carries through a socket, tried with 64 MiB."""
    ours, theirs = channel()
    data, buffer = bytes(BLOCK), memory(BLOCK)
    started = time.perf_counter()
    with ours, theirs:
        for _ in range(64):
            ours.sendall(data)
            left = BLOCK
            while left:
                left -= theirs.recv_into(buffer, left)
    return int(64 * BLOCK / (time.perf_counter() - started))
