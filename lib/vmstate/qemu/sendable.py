"""Whether the state of a guest can be sent now; if not, why."""

import contextlib

from ..deadline import Deadline
from ..errors import CannotDo, Refused, WrongUsage
from . import answers, markers, userfault
from .monitor import Monitor
from .run_states import RUNS, row_of
from .state import GuestState, keeps_sleep, loses_pages, query, version_words


def require_live(path: str, why: str, hint: str) -> None:
    """WrongUsage where the guest would have to be paused for its migration, and cannot be; `why`, and what helps."""
    with Monitor(path) as monitor:
        if query(monitor).run in RUNS and loses_pages(monitor):
            text = f"{version_words(monitor)} without KVM loses pages that the guest at {path} writes meanwhile"
            raise WrongUsage(f"{text}, and {why}", f"{hint}; or --live-anyway, which risks that")


def require_sendable(monitor: Monitor, path: str) -> GuestState:
    """Where the guest stands; CannotDo where its state cannot be sent now, with QEMU's reason."""
    guest_state = query(monitor)
    if guest_state.moving:
        if markers.LAZY in markers.names(monitor):
            text = f"the guest at {path} cannot be saved or moved: its memory is still being brought from a file"
            raise CannotDo(text, "its vm-restore ends when all is there; with --on-demand, SIGTERM has it do that")
        hint = "vm-status shows how far it is"
        raise CannotDo(f"the guest at {path} is migrating already ({guest_state.migration})", hint)
    if guest_state.run == "postmigrate":
        said, hint = _words_of_postmigrate(monitor, guest_state, path)
    else:
        said, hint = (row := row_of(guest_state.run)).unsendable, row.hint.format(path=path)
    if said:
        raise CannotDo(f"the guest at {path} {said} ({guest_state.run})", *([hint] if hint else []))
    if guest_state.blocked:
        raise CannotDo(
            f"the guest at {path} cannot be saved: {'; '.join(guest_state.blocked)}", "QEMU names the device in its way"
        )
    if not _closed(monitor.pid()):
        text = f"the guest at {path} cannot be saved or moved: its QEMU is left with a snapshot that was lost"
        raise CannotDo(text, "it runs on; once it can be shut down, start it in another QEMU")
    if _without_description(monitor):
        text = f"the guest at {path} writes states without a description (suppress-vmdesc=on)"
        raise CannotDo(text, "the end of such a state cannot be proven")
    return guest_state


def asleep_error(path: str) -> CannotDo:
    """Why a guest that sleeps is not sent."""
    text = f"the guest at {path} sleeps (suspended by its own system), and its QEMU could not let it go on after this"
    return CannotDo(text, "vm-dump --snapshot saves it as it is", "in its monitor, system_wakeup wakes it")


def wakes(monitor: Monitor, path: str, may_sleep: bool) -> str | None:
    """The QEMU that lets a guest run which sleeps, in words, where it does; else CannotDo, unless it `may_sleep`.

    From 9.0 on QEMU keeps it asleep, and ends over a `cont` behind the migration.
    """
    if not keeps_sleep(monitor):
        return version_words(monitor)
    if not may_sleep:
        raise asleep_error(path)
    return None


def _words_of_postmigrate(monitor: Monitor, guest_state: GuestState, path: str) -> tuple[str, str]:
    if markers.OFF in markers.names(monitor):
        return row_of("shutdown").unsendable, row_of("shutdown").hint
    if guest_state.given_away:
        return "has given its state away and stands paused", f"vm-cont {path}, if it does not run elsewhere"
    return "stands paused since a migration of it failed, and QEMU wants it to run before the next", f"vm-cont {path}"


def _closed(pid: int) -> bool:
    """Whether QEMU has closed the userfaultfd of a snapshot; True also where that cannot be seen.

    QEMU 7.2 keeps that of one that was lost, and no migration comes to its end then.
    """
    with contextlib.suppress(OSError):
        return any(not userfault.descriptors(pid) for _ in Deadline(2).tries(0.02))
    return True


def _without_description(monitor: Monitor) -> bool:
    try:
        return answers.qom_flag(monitor, "/machine", "suppress-vmdesc")
    except Refused:
        return False
