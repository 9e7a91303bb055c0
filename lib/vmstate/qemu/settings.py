"""Migration capabilities and parameters: which are set for a dump, restore or migration, and how they are restored.

What is found is not trusted: before a migration every capability that QEMU knows is set, on or off, with the parameters
relied on, and `SavedSettings.put_back` gives the guest what it had.
"""

import os
import time
from typing import Any

from . import markers, userfault
from .monitor import Monitor

# QEMU's own rhythm, in ms
ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
ON = ("return-path",)
SNAPSHOT = ("background-snapshot",)
LEFT_OVER = ("return-path", "late-block-activate", "postcopy-ram", "background-snapshot")
# QEMU's own default, which nobody chose.
DEFAULT_BANDWIDTH = 128 << 20


class SavedSettings:
    """What a command found and is to put back: capabilities, parameters, and whether the guest ran.

    rate: max-bandwidth as the command has set it, None where it has not.  owner: tells this command's values from those
    of another.  The values are kept in QEMU too, until they are put back, for whoever comes after a command that died.
    """

    def __init__(self, owner: str | None = None) -> None:
        self.owner = owner or os.urandom(8).hex()
        self.capabilities: list[dict[str, Any]] = []
        self.parameters: dict[str, Any] = {}
        self.rate: int | None = None
        self.ran = False

    def keep(self, monitor: Monitor) -> None:
        """Leave the values in QEMU, in place of those that another command has left there."""
        markers.remove(monitor, markers.SETTINGS)
        if self.capabilities or self.parameters:
            values = {"capabilities": self.capabilities, "parameters": self.parameters, "rate": self.rate}
            markers.put(monitor, markers.SETTINGS, owner=self.owner, **values)

    def put_back(self, monitor: Monitor) -> None:
        if not self.capabilities and not self.parameters:
            return
        if self.capabilities:
            _wait_for_the_snapshot(monitor)
            monitor.ask("migrate-set-capabilities", capabilities=self.capabilities)
        had = dict(self.parameters)
        if "max-bandwidth" in had and monitor.ask("query-migrate-parameters").get("max-bandwidth") != self.rate:
            # vm-speed has set it meanwhile.
            del had["max-bandwidth"]
        if had:
            monitor.ask("migrate-set-parameters", **had)
        self.capabilities, self.parameters = [], {}
        markers.remove(monitor, markers.SETTINGS)


def left_behind(monitor: Monitor) -> SavedSettings | None:
    """What a command has kept in QEMU and not put back; None where there is nothing."""
    if markers.SETTINGS not in markers.names(monitor, (markers.SETTINGS,)):
        return None
    facts = markers.facts(monitor, markers.SETTINGS)
    left = SavedSettings(str(facts.get("owner")))
    left.capabilities, left.parameters = facts.get("capabilities", []), facts.get("parameters", {})
    left.rate = facts.get("rate")
    return left


def prepare(monitor: Monitor, on: tuple[str, ...], parameters: dict[str, Any], saved: SavedSettings) -> None:
    """Set every capability that this QEMU knows, those of `on` to on, and `parameters` as far as it knows them.

    `saved` learns what was there before anything is changed, so that an interruption leaves nothing behind.
    """
    capabilities = monitor.ask("query-migrate-capabilities")
    had = monitor.ask("query-migrate-parameters")
    wanted = [{"capability": c["capability"], "state": c["capability"] in on} for c in capabilities]
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
    left: SavedSettings | None, capabilities: list[dict[str, Any]], had: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Capabilities and parameters as they were before any command of ours, `left` by one that was killed."""
    on = {c["capability"]: c["state"] for c in left.capabilities} if left else {}
    # Nobody else switches these on for long.
    back = [
        {**c, "state": on.get(c["capability"], c["state"] and c["capability"] not in LEFT_OVER)} for c in capabilities
    ]
    values = dict(left.parameters) if left else {}
    if left and had.get("max-bandwidth") != left.rate:
        values.pop("max-bandwidth", None)
    return back, {**had, **{name: value for name, value in values.items() if name in had}}


def _set_capabilities(monitor: Monitor, had: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    # QEMU checks each list as a whole against what is set: first everything off that goes off, then the others on.
    on_before = {c["capability"] for c in had if c["state"]}
    off = [c for c in wanted if not c["state"] and c["capability"] in on_before]
    for change in (off, wanted):
        if change:
            _wait_for_the_snapshot(monitor)
            monitor.ask("migrate-set-capabilities", capabilities=change)


def _wait_for_the_snapshot(monitor: Monitor) -> None:
    """Where a snapshot has just ended, QEMU lifts the protection of the guest's pages a moment after it has said so,
    and only while the capability is on: switched off before, the guest would wait for ever at its next write.

    Where that cannot be seen, time has to do.
    """
    if not any(c["state"] and c["capability"] in SNAPSHOT for c in monitor.ask("query-migrate-capabilities")):
        return
    give_up, pid = time.monotonic() + 20, monitor.pid()
    try:
        while time.monotonic() < give_up and userfault.descriptors(pid) and userfault.protected(pid):
            time.sleep(0.01)
    except OSError:
        time.sleep(1)


def clear_leftovers(monitor: Monitor, owner: str | None = None) -> None:
    """Put back what a command that was killed has left behind; owner: only where it was this one."""
    left = left_behind(monitor)
    if owner is not None and (left is None or left.owner != owner):
        return
    if left:
        left.put_back(monitor)
    on = [c for c in monitor.ask("query-migrate-capabilities") if c["state"] and c["capability"] in LEFT_OVER]
    if on:
        _wait_for_the_snapshot(monitor)
        monitor.ask("migrate-set-capabilities", capabilities=[{**c, "state": False} for c in on])
