"""Into a network namespace by its name, as `ip netns exec` goes: its interfaces, and a /sys that shows them."""

import ctypes
import os

from ..errors import CannotDo

PLACE = "/run/netns"
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MNT_DETACH = 2
MS_REC, MS_SLAVE = 0x4000, 0x80000


def enter(name: str) -> None:
    """From here on this process is in the namespace; CannotDo where there is none, or without CAP_SYS_ADMIN."""
    try:
        if "/" in name or name in ("", ".", ".."):
            raise FileNotFoundError
        fd = os.open(f"{PLACE}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CannotDo(f"there is no network namespace {name!r}", "ip netns list") from error
    except OSError as error:
        raise CannotDo(f"no way into the network namespace {name!r}: {error.strerror}") from error
    try:
        _change(fd)
    except OSError as error:
        hint = "it needs CAP_SYS_ADMIN; who has that may start it inside: ip netns exec NAME vm-announce"
        raise CannotDo(f"no way into the network namespace {name!r}: {error.strerror}", hint) from error
    finally:
        os.close(fd)


def _change(fd: int) -> None:
    # os.setns and os.unshare are there from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.setns(fd, CLONE_NEWNET))
    # A /sys of its own shows the interfaces of the namespace in which it is mounted.
    _check(libc.unshare(CLONE_NEWNS))
    _check(libc.mount(b"", b"/", None, ctypes.c_ulong(MS_SLAVE | MS_REC), None))
    libc.umount2(b"/sys", MNT_DETACH)
    _check(libc.mount(b"sysfs", b"/sys", b"sysfs", ctypes.c_ulong(0), None))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
