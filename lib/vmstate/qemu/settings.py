"""Migration capabilities and parameters: which are set for a dump, restore or migration, and how they are restored.

What is found is not trusted: before a migration every capability that QEMU knows is set, on or off, with the parameters
relied on, and `SavedSettings.put_back` gives the guest what it had.
"""

import os
import time
from typing import Any

from ..deadline import Deadline
from ..fields import Fields
from . import answers, markers, userfault
from .monitor import Monitor
from .run_states import RUNS
from .state import GuestState, query

# QEMU's own rhythm, in ms
ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
ON = ("return-path",)
SNAPSHOT = ("background-snapshot",)
LEFT_OVER = ("return-path", "late-block-activate", "postcopy-ram", "background-snapshot")
# In ms: QEMU's own default, and the most that it takes
DOWNTIME, LONGEST_DOWNTIME = 300, 2000000
# QEMU's own default, which nobody chose.
DEFAULT_BANDWIDTH = 128 << 20


class SavedSettings:
    """What a command found and is to put back: capabilities, parameters, and whether the guest ran.

    rate: max-bandwidth as the command has set it.  stopped: the command has paused a guest that ran.  owner: tells this
    command's values from those of another.  The values are kept in QEMU too, until they are put back, for whoever comes
    after a command that died.
    """

    def __init__(self, owner: str | None = None) -> None:
        self.owner = owner or os.urandom(8).hex()
        self.capabilities: dict[str, bool] = {}
        self.parameters: dict[str, Any] = {}
        self.rate: int | None = None
        self.stopped = False
        self.ran = False
        # The run state in which its guest was found
        self.found = ""

    @property
    def restored(self) -> bool:
        """Whether nothing is left to put back."""
        return not (self.capabilities or self.parameters or self.stopped)

    def keep(self, monitor: Monitor) -> None:
        """Leave the values in QEMU, in place of those that this or another command has left there."""
        before = [name for _, name, _ in _kept(monitor)]
        if len(before) == len(markers.SETTINGS):
            markers.remove(monitor, before.pop(0))
        if not self.restored:
            (spare,) = set(markers.SETTINGS) - set(before) if before else markers.SETTINGS[:1]
            markers.put(monitor, spare, at=time.time(), **self._values())
        for name in before:
            markers.remove(monitor, name)

    def _values(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("owner", "parameters", "rate", "stopped", "found")}
        return {**values, "capabilities": answers.capability_list(self.capabilities)}

    def pause(self, monitor: Monitor) -> None:
        """Pause a guest that runs; who comes later knows that it was not the user."""
        self.stopped = True
        self.keep(monitor)
        monitor.ask("stop")

    def resumed(self, monitor: Monitor) -> None:
        """It runs again."""
        self.stopped = False
        self.keep(monitor)

    def lift_rate(self, monitor: Monitor) -> None:
        """No limit any more to what QEMU sends; the one that there was is put back with all else."""
        had = answers.parameters(monitor).get("max-bandwidth", 0)
        if "max-bandwidth" not in self.parameters or had != self.rate:
            self.parameters["max-bandwidth"] = had
        self.rate = 0
        self.keep(monitor)
        monitor.ask("migrate-set-parameters", max_bandwidth=0)

    def lift_downtime(self, monitor: Monitor) -> None:
        """QEMU is to take its last step now, however long that takes."""
        self.parameters.setdefault("downtime-limit", answers.parameters(monitor).get("downtime-limit", DOWNTIME))
        self.keep(monitor)
        monitor.ask("migrate-set-parameters", downtime_limit=LONGEST_DOWNTIME)

    def put_back(self, monitor: Monitor) -> None:
        """Refused where QEMU does not take them: then they stay in QEMU, to be put back later."""
        if self.restored:
            return
        left = left_behind(monitor)
        if left and left.owner == self.owner:
            had = dict(self.parameters)
            if "max-bandwidth" in had and answers.parameters(monitor).get("max-bandwidth") != self.rate:
                # vm-speed has set it meanwhile.
                del had["max-bandwidth"]
            if had:
                monitor.ask("migrate-set-parameters", **had)
            if self.capabilities:
                _wait_for_the_snapshot(monitor)
                answers.set_capabilities(monitor, self.capabilities)
        self.capabilities, self.parameters, self.stopped = {}, {}, False
        if left and left.owner == self.owner:
            self.keep(monitor)


def _kept(monitor: Monitor) -> list[tuple[float, str, Fields]]:
    """When, under which name, and what; of two, where a command died when it replaced one, the newer has all."""
    found = [
        (name, Fields(markers.facts(monitor, name), f"the object '{name}' in QEMU"))
        for name in markers.names(monitor, markers.SETTINGS)
    ]
    return sorted(((facts.number("at", 0.0), name, facts) for name, facts in found), key=lambda entry: entry[0])


def left_behind(monitor: Monitor) -> SavedSettings | None:
    """What a command has kept in QEMU and not put back; None where there is nothing."""
    kept = _kept(monitor)
    if not kept:
        return None
    _, _, facts = kept[-1]
    left = SavedSettings(facts.text("owner", ""))
    left.found = facts.text("found", "running")
    left.capabilities = answers.capabilities_of(facts.objects("capabilities"))
    left.parameters = dict(facts.inner("parameters").raw()) if "parameters" in facts else {}
    rate = facts.get("rate")
    left.rate, left.stopped = None if rate is None else facts.whole("rate"), facts.flag("stopped", False)
    return left


def ran(monitor: Monitor, guest_state: GuestState) -> bool:
    """Whether the guest runs, or was only paused by a command that has died since."""
    left = left_behind(monitor) if guest_state.run == "paused" else None
    return guest_state.run in RUNS or bool(left and left.stopped)


def prepare(monitor: Monitor, on: tuple[str, ...], parameters: dict[str, Any], saved: SavedSettings) -> None:
    """Set every capability that this QEMU knows, those of `on` to on, and `parameters` as far as it knows them.

    `saved` learns what was there before anything is changed, so that an interruption leaves nothing behind.
    """
    capabilities, had = answers.capabilities(monitor), answers.parameters(monitor)
    wanted = {name: name in on for name in capabilities}
    # A name of credentials or another mode would turn our descriptor into something else.
    for name, value in (("tls-creds", ""), ("mode", "normal")):
        if had.get(name, value) != value:
            parameters[name] = value
    changed = {name: value for name, value in parameters.items() if name in had and had[name] != value}
    back, before = _before(left_behind(monitor), capabilities, had)
    saved.parameters = {name: before[name] for name in had if name in changed or before[name] != had[name]}
    saved.rate = changed.get("max-bandwidth", had.get("max-bandwidth"))
    if wanted != back:
        saved.capabilities = back
    saved.keep(monitor)
    if wanted != capabilities:
        _set_capabilities(monitor, capabilities, wanted)
    if changed:
        monitor.ask("migrate-set-parameters", **changed)


def _before(
    left: SavedSettings | None, capabilities: dict[str, bool], had: dict[str, Any]
) -> tuple[dict[str, bool], dict[str, Any]]:
    """Capabilities and parameters as they were before any command of ours, `left` by one that was killed."""
    on = left.capabilities if left else {}
    # Nobody else switches these on for long.
    back = {name: on.get(name, state and name not in LEFT_OVER) for name, state in capabilities.items()}
    values = dict(left.parameters) if left else {}
    if left and had.get("max-bandwidth") != left.rate:
        values.pop("max-bandwidth", None)
    return back, {**had, **{name: value for name, value in values.items() if name in had}}


def _set_capabilities(monitor: Monitor, had: dict[str, bool], wanted: dict[str, bool]) -> None:
    # QEMU checks each list as a whole against what is set: first everything off that goes off, then the others on.
    changes = {name: False for name, state in wanted.items() if not state and had.get(name)}, wanted
    for change in changes:
        if change:
            _wait_for_the_snapshot(monitor)
            answers.set_capabilities(monitor, change)


def _wait_for_the_snapshot(monitor: Monitor) -> None:
    """Where a snapshot has just ended, QEMU lifts the protection of the guest's pages a moment after it has said so,
    and only while the capability is on: switched off before, the guest would wait for ever at its next write.

    Where that cannot be seen, time has to do.
    """
    on, pid = answers.capabilities(monitor), monitor.pid()
    if not any(on.get(name) for name in SNAPSHOT):
        return
    try:
        for _ in Deadline(20).tries(0.01):
            if not (userfault.descriptors(pid) and userfault.protected(pid)):
                return
    except OSError:
        time.sleep(1)


def clear_leftovers(monitor: Monitor, owner: str | None = None) -> None:
    """Put back what a command that was killed has left behind; owner: only where it was this one."""
    left = left_behind(monitor)
    # Those of a command that is at work are its own.
    if query(monitor).moving or (owner is not None and (left is None or left.owner != owner)):
        return
    if left:
        left.put_back(monitor)
    on = [name for name, state in answers.capabilities(monitor).items() if state and name in LEFT_OVER]
    if on:
        _wait_for_the_snapshot(monitor)
        answers.set_capabilities(monitor, dict.fromkeys(on, False))
