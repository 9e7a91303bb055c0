"""A server of pages on standard input and output, for a QEMU that was started by hand."""

from ..errors import CannotDo, Damaged, InDoubt
from .lazy_state import lazy_state
from .page_order import Place
from .page_queue import ServedPages
from .page_server import Lost, PageServer
from .page_server_thread import Serving


def stdio(fd: int, on_demand: bool, first: list[Place]) -> ServedPages:
    """For a QEMU that runs us as its `-incoming exec:`, over standard input and output."""
    state = lazy_state(fd)
    server = PageServer(state.file, state.opening, 0, 1, on_demand=on_demand, first=first)
    serving = Serving(server)
    serving.start(state.opening.stream())
    error = serving.wait(server.give_up)
    if isinstance(error, Lost):
        if not server.tally.asked:
            hint = "start QEMU with: -global migration.x-postcopy-ram=on"
            raise CannotDo(f"QEMU does not take the state: {error}; its own words say why", hint) from error
        raise InDoubt(f"the guest runs, and lacks pages: {error}", STDIO_RESUME) from error
    if isinstance(error, Damaged):
        raise Damaged(f"{error}; the guest stands still as soon as it needs it", STDIO_RESUME) from error
    if error is not None:
        raise error
    return server.tally


STDIO_RESUME = "with a good copy of the state: vm-restore --resume --force-unmarked GUEST < STATE.vmz"
