"""Markers in a QEMU: objects with facts about a migration, for whoever comes later; they live as long as it.

Source: docs/link.md, "Who stands where".
"""

import contextlib
import json
import shlex
from typing import Any

from ..errors import InDoubt, Refused
from . import answers
from .monitor import Monitor
from .state import GuestState

# The guest was sent to another QEMU; once it is 'postmigrate' and 'completed', it is there.
MOVED = "vmstate-moved"
# What was decided of it: `GRANTED`, it may run there, and never again here; or `KEPT`, it stays here.
DECIDED = "vmstate-decided"
GRANTED, KEPT = "granted", "kept"
# It has been heard to run there.
HEARD = "vmstate-heard"
# It is loaded, or has been, and is held until the grant of its source has come.
TAKEN = "vmstate-taken"
# It came here, and was let run.
ARRIVED = "vmstate-arrived"
# It runs on pages that are still being brought, out of a file.
LAZY = "vmstate-lazy"
# It was stopped, since the rest of that file could not be read.
HALTED = "vmstate-halted"
# It has shut down, in the midst of a migration that its QEMU went on with: it may not run on, until it is reset.
OFF = "vmstate-off"
# In a hint, what only the reader knows: the way to the other side.
URI = "URI-OF-THE-SOURCE"
ALL = (MOVED, DECIDED, HEARD, TAKEN, ARRIVED, LAZY, HALTED, OFF)
# What a command has changed in the settings of its QEMU, as it was before; two names, so that it can be replaced.
SETTINGS = ("vmstate-settings", "vmstate-settings-2")

Marks = dict[str, dict[str, Any]]


def read(monitor: Monitor) -> Marks:
    """The marks of a guest, each with its facts (none where another hand has set it)."""
    return {name: facts(monitor, name) for name in names(monitor)}


def names(monitor: Monitor, of: tuple[str, ...] = ALL) -> list[str]:
    found = {child.name for child in answers.children(monitor, "/objects")}
    return [name for name in of if name in found]


def facts(monitor: Monitor, name: str) -> dict[str, Any]:
    with contextlib.suppress(Refused, ValueError, RecursionError):
        values = json.loads(answers.qom_text(monitor, f"/objects/{name}", "data"))
        if isinstance(values, dict):
            return values
    return {}


def put(monitor: Monitor, name: str, **values: Any) -> None:
    monitor.ask("object-add", **{"qom-type": "secret", "id": name, "data": json.dumps(values)})


def remove(monitor: Monitor, name: str) -> None:
    """The mark is not there any more, or was not."""
    with contextlib.suppress(Refused):
        monitor.ask("object-del", id=name)


def clear(monitor: Monitor) -> None:
    for name in names(monitor):
        remove(monitor, name)


def hold(monitor: Monitor) -> None:
    """Somebody says that the guest is to run here: from now on nobody can grant it to the other side."""
    mark = read(monitor).get(MOVED, {})
    if "move" in mark:
        decide(monitor, KEPT, mark["move"])


def stay(monitor: Monitor) -> None:
    """The guest runs here now, by somebody's word."""
    found = read(monitor)
    if OFF in found:
        remove(monitor, OFF)
    if MOVED in found:
        # Heard to run there, it is asked for by nobody any more.
        keep(monitor, None if HEARD in found else found[MOVED].get("move"))
    elif TAKEN in found:
        clear(monitor)
        put(monitor, ARRIVED, **found[TAKEN])


def keep(monitor: Monitor, move: str | None) -> None:
    """The guest of this move stays where it is; whoever asks later is to know that it is the same one."""
    found = read(monitor)
    clear(monitor)
    if move is not None:
        decide(monitor, KEPT, move, _secret(found, move))


def forget(monitor: Monitor, move: str) -> None:
    """Nobody will ask for the guest of this move, which has stayed here."""
    found = read(monitor)
    if decision(found) == KEPT and found[DECIDED].get("move") == move:
        remove(monitor, DECIDED)


def decide(monitor: Monitor, what: str, move: str, secret: str | None = None) -> str:
    """Decide the move, once and for all; what was decided, by this or by another command.

    secret: of the move, where no other marker has it.

    QEMU takes no second object of one name, so that it happens once also where there are several monitors.
    """
    try:
        put(monitor, DECIDED, move=move, what=what, **({"secret": secret} if secret else {}))
    except Refused:
        return decision(read(monitor)) or what
    return what


def has_left(found: Marks, guest_state: GuestState) -> bool:
    """It was given away in a move, and nobody has let it run here since."""
    if MOVED not in found:
        return False
    # One that was not started when its move began shows the same before and after it.
    return guest_state.given_away or (guest_state.reset and found[MOVED].get("found", "") != "prelaunch")


def held(found: Marks) -> bool:
    """It is loaded, and may not run before its source has let it go."""
    return TAKEN in found and ARRIVED not in found


def _secret(found: Marks, move: str) -> str | None:
    """The secret of the move that has left from here; whoever has the monitor may know it."""
    secrets = [found[name].get("secret") for name in (MOVED, DECIDED) if found.get(name, {}).get("move") == move]
    return next((secret for secret in secrets if isinstance(secret, str)), None)


def decision(found: Marks) -> str:
    """`GRANTED`, `KEPT`, or "" where nothing is decided."""
    return str(found.get(DECIDED, {}).get("what", ""))


def refuse(found: Marks, guest_state: GuestState, path: str) -> None:
    """InDoubt where a guest is at both ends of a move; who lets it run here must know that it does not there.

    What it has been through since, a reset perhaps, changes nothing about that.
    """
    settle = f"to see to that: {recover_command(path, found)}"
    granted = guest_state.migration == "completed" and decision(found) == GRANTED
    if granted or has_left(found, guest_state):
        if "move" in found.get(MOVED, {}) and decision(found) != GRANTED:
            raise InDoubt(f"the guest at {path} is being moved, and has not arrived", settle)
        hint = f"only once it is gone there: vm-cont --force {path}"
        raise InDoubt(f"the guest at {path} was moved, and is where it was sent to", hint)
    if held(found):
        raise InDoubt(f"the guest at {path} came by a move, and its source has not let it go", settle)


def resume_command(path: str, found: Marks) -> str:
    """What goes on with a lazy restore whose server has died."""
    options = ["--on-demand"] if found.get(LAZY, {}).get("on_demand") else []
    return f"{shlex.join(['vm-restore', '--resume', *options, path])} < STATE.vmz"


def recover_command(path: str, found: Marks) -> str:
    """What brings a move to its end whose commands have died."""
    uri = URI if TAKEN in found else found.get(MOVED, {}).get("uri")
    return shlex.join(["vm-migrate", "--recover", path, *([uri] if uri else [])])
