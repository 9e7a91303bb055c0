"""Verbs on a guest: look, stop, run, send its state, load one.  Each is a short conversation with its monitor.

What is found is not trusted: before a migration every capability that QEMU knows is set, on or off, with the parameters
relied on, and `Found.put_back` gives the guest what it had.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import CannotDo, GuestGone, Refused, Unsettled, VmstateError, WrongUsage
from . import markers, userfault
from .monitor import PATIENCE, Monitor, StandsStill

T = TypeVar("T")
# The name under which QEMU keeps our descriptor; one left over by a killed command is replaced by the next.
NAME = "vmstate"
# QEMU's own rhythm, in ms
ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
ON = ("return-path",)
SNAPSHOT = ("background-snapshot",)
LEFT_OVER = ("return-path", "late-block-activate", "postcopy-ram", "background-snapshot")
# QEMU's own default, which nobody chose.
DEFAULT_BANDWIDTH = 128 << 20
# The QEMU from which on, under TCG, a live migration sends every page that the guest writes (upstream 03bfc2188f).
COHERENT = (9, 0)
# Longer than any migration: the wait ends with the QEMU.
FOR_EVER = 1e9
# Run states of a guest that runs
RUNS = ("running", "suspended")
# migration.json, MigrationStatus: those in which QEMU is not done
BUSY = frozenset(("setup", "active", "device", "pre-switchover", "wait-unplug", "cancelling", "colo")) | frozenset(
    ("postcopy-active", "postcopy-device", "postcopy-paused", "postcopy-recover", "postcopy-recover-setup")
)


@dataclass(frozen=True)
class Standing:
    """Where a guest stands: QEMU's run state, the status of its migration ('none' where there was none), its answer."""

    run: str
    migration: str
    info: dict[str, Any]

    @property
    def moving(self) -> bool:
        return self.migration in BUSY

    @property
    def given_away(self) -> bool:
        """Its state is whole elsewhere.  (A stopped guest is 'postmigrate' after a migration that failed, too.)"""
        return self.run == "postmigrate" and self.migration == "completed"

    @property
    def reason(self) -> str:
        return str(self.info.get("error-desc", ""))


@dataclass
class Found:
    """What a command found and is to put back: capabilities, parameters, and whether the guest ran.

    rate: max-bandwidth as the command has set it, None where it has not.  owner: tells this command's values from those
    of another.  The values are kept in QEMU too, until they are put back, for whoever comes after a command that died.
    """

    capabilities: list[dict[str, Any]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    rate: int | None = None
    ran: bool = False
    owner: str = field(default_factory=lambda: os.urandom(8).hex())

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


def left_behind(monitor: Monitor) -> Found | None:
    """What a command has kept in QEMU and not put back; None where there is nothing."""
    if markers.SETTINGS not in markers.names(monitor, (markers.SETTINGS,)):
        return None
    facts = markers.facts(monitor, markers.SETTINGS)
    rate, owner = facts.get("rate"), str(facts.get("owner"))
    return Found(facts.get("capabilities", []), facts.get("parameters", {}), rate, owner=owner)


def look(monitor: Monitor) -> Standing:
    info = monitor.ask("query-migrate")
    return Standing(monitor.ask("query-status")["status"], info.get("status", "none"), info)


def glance(path: str, patience: float = PATIENCE) -> Standing:
    """`look` in a conversation of its own."""
    with Monitor(path, patience) as monitor:
        return look(monitor)


def wait_for(
    path: str, done: Callable[[Standing], bool], seconds: float, what: str, *, slowest: float = 0.1
) -> Standing:
    """Look until `done`; CannotDo after `seconds`.  A monitor that is busy meanwhile is asked again.

    slowest: seconds between two looks, once it lasts.
    """
    give_up = time.monotonic() + seconds
    pause = 0.005
    while True:
        standing = None
        try:
            standing = glance(path)
            if done(standing):
                return standing
        except GuestGone:
            raise
        except CannotDo:
            if time.monotonic() > give_up:
                raise
        if time.monotonic() > give_up:
            where = f"'{standing.run}', migration '{standing.migration}'" if standing else "not known"
            raise CannotDo(f"waited {seconds:.0f} s for {path} {what}: its state is {where}")
        time.sleep(pause)
        pause = min(slowest, pause * 1.5)


def patiently(path: str, do: Callable[[Monitor], T], seconds: float = 60) -> T:
    """What `do` gives in a conversation of its own; while another client holds the monitor, it is tried again."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            with Monitor(path) as monitor:
                return do(monitor)
        except (GuestGone, Refused, Unsettled):
            raise
        except CannotDo:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)


def prepare(monitor: Monitor, on: tuple[str, ...], parameters: dict[str, Any], found: Found) -> None:
    """Set every capability that this QEMU knows, those of `on` to on, and `parameters` as far as it knows them.

    `found` learns what was there before anything is changed, so that an interruption leaves nothing behind.
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
    found.parameters = {name: before[name] for name in had if name in changed or before[name] != had[name]}
    found.rate = changed.get("max-bandwidth", had.get("max-bandwidth"))
    if wanted != back:
        found.capabilities = back
    found.keep(monitor)
    if wanted != capabilities:
        _set_capabilities(monitor, capabilities, wanted)
    if changed:
        monitor.ask("migrate-set-parameters", **changed)


def _before(
    left: Found | None, capabilities: list[dict[str, Any]], had: dict[str, Any]
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


def tidy(monitor: Monitor, owner: str | None = None) -> None:
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


def loses_pages(monitor: Monitor) -> bool:
    """Whether a live migration of the guest may leave out pages that it writes meanwhile: QEMU before 9.0 under TCG."""
    version = monitor.ask("query-version")["qemu"]
    return (version["major"], version["minor"]) < COHERENT and not monitor.ask("query-kvm")["enabled"]


def version_words(monitor: Monitor) -> str:
    version = monitor.ask("query-version")["qemu"]
    return f"QEMU {version['major']}.{version['minor']}"


def require_live(path: str, why: str, hint: str) -> None:
    """WrongUsage where the guest would have to be paused for its migration, and cannot be; `why`, and what helps."""
    with Monitor(path) as monitor:
        if look(monitor).run in RUNS and loses_pages(monitor):
            text = f"{version_words(monitor)} without KVM loses pages that the guest at {path} writes meanwhile"
            raise WrongUsage(f"{text}, and {why}", f"{hint}; or --live-anyway, which risks that")


def ram_blocks(monitor: Monitor) -> dict[str, tuple[int, int]]:
    """Name to used and greatest size, in bytes, of each RAM block of a guest."""
    text = monitor.ask("x-query-ramblock")["human-readable-text"]
    row = re.compile(r"^\s*(\S.*?)\s+\d+ [KMG]iB\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)", re.M)
    return {name: (int(used, 16), int(total, 16)) for name, used, total in row.findall(text)}


def odd_pages(monitor: Monitor) -> list[str]:
    """The RAM blocks of a guest whose pages are not of 4 KiB."""
    text = monitor.ask("x-query-ramblock")["human-readable-text"]
    rows = re.findall(r"^\s*(\S.*?)\s+(\d+ [KMG]iB)\s+0x", text, re.M)
    return [name for name, size in rows if size != "4 KiB"]


def stop(path: str) -> Standing:
    with Monitor(path) as monitor:
        standing = look(monitor)
        if standing.run == "inmigrate":
            raise CannotDo(f"the guest at {path} waits for a state: there is nothing to stop")
        monitor.ask("stop")
        return look(monitor)


def cancel(path: str) -> Standing:
    """End the migration of a guest that still has its state; CannotDo where there is none, or it is too late."""
    with Monitor(path) as monitor:
        standing = look(monitor)
        if standing.run == "inmigrate":
            hint = "end the command that restores it; a QEMU that has begun to load cannot load again"
            raise CannotDo(f"the guest at {path} is the one that takes a state", hint)
        if not standing.moving:
            raise CannotDo(f"the guest at {path} is not migrating ({standing.migration})", f"vm-status {path}")
        if any(c["state"] and c["capability"] in SNAPSHOT for c in monitor.ask("query-migrate-capabilities")):
            hint = "end the vm-dump that makes it, which lets QEMU come to its end"
            raise CannotDo(f"a snapshot of the guest at {path} is not cancelled: it may not survive that", hint)
        if standing.migration.startswith("postcopy"):
            text = f"the guest at {path} runs at its destination already ({standing.migration})"
            raise CannotDo(text, "from the switchover of postcopy on there is no way back")
        monitor.ask("migrate_cancel")
    standing = wait_for(path, lambda s: not s.moving and s.run != "finish-migrate", 60, "to be cancelled")
    if standing.migration == "completed":
        raise CannotDo(f"the migration of the guest at {path} had completed before", f"vm-status {path}")
    return standing


def limit(path: str, rate: int) -> Standing:
    """From now on a migration of the guest sends at most `rate` bytes a second; 0: as fast as it goes."""
    with Monitor(path) as monitor:
        monitor.ask("migrate-set-parameters", max_bandwidth=rate)
        return look(monitor)


def cont(path: str, force: bool = False) -> Standing:
    """Let a guest run; CannotDo where it waits for a state, or QEMU refuses (a disk image locked by another).

    Unsettled where it was moved to another QEMU, unless `force`.  One whose snapshot has lost all who had to do with it
    (QEMU 7.2 leaves its pages protected) goes on; with `force` also where QEMU itself has come to wait for it.
    """
    try:
        with Monitor(path) as monitor:
            return _cont(monitor, path, force)
    except StandsStill as error:
        if not (force and error.protected):
            raise
        userfault.unprotect(error.pid)
        with contextlib.suppress(Refused):
            patiently(path, tidy)
    return patiently(path, lambda monitor: _cont(monitor, path, force))


def _cont(monitor: Monitor, path: str, force: bool) -> Standing:
    standing = look(monitor)
    if lost_its_snapshot(standing, monitor.pid()):
        userfault.unprotect(monitor.pid())
        tidy(monitor)
        return look(monitor)
    if standing.run == "inmigrate":
        raise CannotDo(f"the guest at {path} waits for a state: it cannot run yet", f"vm-restore {path} < STATE")
    found = markers.read(monitor)
    # One whose memory is being brought is where it belongs; not so one that waits for a file that can be read.
    if standing.moving and (markers.LAZY not in found or markers.HALTED in found):
        raise CannotDo(f"the guest at {path} is migrating ({standing.migration})", f"vm-status {path}")
    if not force:
        markers.refuse(found, standing.run, standing.given_away, path)
    markers.hold(monitor)
    after = cont_in(monitor)
    markers.stay(monitor)
    if not after.moving:
        with contextlib.suppress(Refused):
            tidy(monitor)
    return after


def lost_its_snapshot(standing: Standing, pid: int) -> bool:
    """Whether a guest waits for ever at a page that it may not write into."""
    runs = standing.run in RUNS and not standing.moving
    return runs and userfault.waits(pid) and userfault.protected(pid)


def cont_in(monitor: Monitor) -> Standing:
    before = look(monitor)
    after = run_on(monitor)
    # It was loaded and held, or comes back: the network may know it elsewhere.
    if before.migration == "completed" and before.run in ("paused", "postmigrate"):
        announce(monitor)
    return after


def announce(monitor: Monitor, rhythm: dict[str, int] | None = None) -> None:
    """Have the guest's cards speak up, in the rhythm of its parameters."""
    monitor.ask("announce-self", **(rhythm or rhythm_of(monitor)))


def rhythm_of(monitor: Monitor) -> dict[str, int]:
    """The rhythm of its parameters; for a guest that is being restored, as they were before."""
    had = monitor.ask("query-migrate-parameters")
    if left := left_behind(monitor):
        had = {**had, **left.parameters}
    values = {name: had.get(f"announce-{name}", ANNOUNCE[name]) for name in ANNOUNCE}
    # Who has set no rounds does not want QEMU's announcement; ours was asked for.
    return {**values, "rounds": values["rounds"] or ANNOUNCE["rounds"]}


def run_on(monitor: Monitor, rhythm: dict[str, int] | None = None) -> Standing:
    """Let it run; Refused where QEMU does not.  rhythm: announce it just before, as QEMU does itself."""
    if rhythm:
        # Once it runs, it and the monitor want the same lock.
        with contextlib.suppress(CannotDo):
            announce(monitor, rhythm)
    monitor.ask("cont")
    standing = look(monitor)
    # Where an image cannot be taken, some versions answer well and stay paused.
    if standing.run not in RUNS:
        raise Refused("cont", f"the guest stays '{standing.run}'")
    return standing


def require_sendable(monitor: Monitor, path: str) -> Standing:
    """Where the guest stands; CannotDo where its state cannot be sent now, with QEMU's reason."""
    standing = look(monitor)
    if standing.moving:
        if markers.LAZY in markers.names(monitor):
            text = f"the guest at {path} cannot be saved or moved: its memory is still being brought from a file"
            raise CannotDo(text, "its vm-restore ends when all is there; with --on-demand, SIGTERM has it do that")
        hint = "vm-status shows how far it is"
        raise CannotDo(f"the guest at {path} is migrating already ({standing.migration})", hint)
    words = {
        "inmigrate": ("waits for a state", f"vm-restore {path} < STATE"),
        "postmigrate": _words_of_postmigrate(standing, path),
        "finish-migrate": ("is in the last step of a migration", f"vm-status {path}"),
        "internal-error": ("has stopped on an internal error of QEMU", "its state is not to be trusted"),
    }
    if standing.run in words:
        said, hint = words[standing.run]
        raise CannotDo(f"the guest at {path} {said} ({standing.run})", hint)
    blocked = standing.info.get("blocked-reasons")
    if blocked:
        raise CannotDo(f"the guest at {path} cannot be saved: {'; '.join(blocked)}", "QEMU names the device in its way")
    if not _closed(monitor.pid()):
        text = f"the guest at {path} cannot be saved or moved: its QEMU is left with a snapshot that was lost"
        raise CannotDo(text, "it runs on; once it can be shut down, start it in another QEMU")
    if _without_description(monitor):
        text = f"the guest at {path} writes states without a description (suppress-vmdesc=on)"
        raise CannotDo(text, "the end of such a state cannot be proven")
    return standing


def _words_of_postmigrate(standing: Standing, path: str) -> tuple[str, str]:
    if standing.given_away:
        return "has given its state away and stands paused", f"vm-cont {path}, if it does not run elsewhere"
    return "stands paused since a migration of it failed, and QEMU wants it to run before the next", f"vm-cont {path}"


def _closed(pid: int) -> bool:
    """Whether QEMU has closed the userfaultfd of a snapshot; True also where that cannot be seen.

    QEMU 7.2 keeps that of one that was lost, and no migration comes to its end then.
    """
    give_up = time.monotonic() + 2
    with contextlib.suppress(OSError):
        while userfault.descriptors(pid):
            if time.monotonic() > give_up:
                return False
            time.sleep(0.02)
    return True


def _without_description(monitor: Monitor) -> bool:
    try:
        return bool(monitor.ask("qom-get", path="/machine", property="suppress-vmdesc"))
    except Refused:
        return False


class Sending:
    """The state of a guest on its way to our end of a socket pair.

    QEMU has `return-path` on: after the last byte it waits, the guest stopped, for our word on the socket.  `give_away`
    is the point of no return; when instead our end closes, also by our death, the guest runs on by itself.
    """

    def __init__(
        self,
        path: str,
        *,
        rate: int | None = None,
        downtime: int | None = None,
        on: tuple[str, ...] = ON,
        mark: dict[str, Any] | None = None,
        live_anyway: bool = False,
    ) -> None:
        """mark: facts about the move, to be left in the guest; None where its state goes into a file.

        live_anyway: do not pause the guest first where a live migration may lose pages.
        """
        self.path = path
        self._mark = mark
        self._rate = rate
        self._downtime = downtime
        self._on = on
        self._live_anyway = live_anyway
        # The QEMU that made it necessary to pause the guest first, in words; None where it was not.
        self.paused_first: str | None = None
        self.found = Found()
        self._stopped = False
        self.begun = False
        # QEMU has begun to send.
        self.sent = False

    def start(
        self, fd: int, *, stopped: bool, watch: Callable[[], None], take: Callable[[Monitor], None] | None = None
    ) -> None:
        """Send to the socket `fd`; with `stopped` the guest is stopped first, after `watch` has been called.

        It is stopped as well where a live migration may lose pages.  take: what belongs to the instant in which it
        stands.  Once `begun` is true there is something for `take_back` to undo, also where this raises.
        """

        def send(monitor: Monitor) -> None:
            if self.found.ran and not (stopped or take or self._live_anyway) and loses_pages(monitor):
                self.paused_first = version_words(monitor)
            if (stopped or take or self.paused_first) and self.found.ran:
                watch()
                self._stopped = True
                monitor.ask("stop")
            if take:
                take(monitor)
            monitor.give(NAME, fd)
            monitor.ask("migrate", uri=f"fd:{NAME}")

        self._begin(send)

    def snapshot(self, fd: int, take: Callable[[Monitor], None] | None = None) -> float | None:
        """Send the state of an instant to the socket `fd`, while the guest goes on; how long it stood, in ms.

        None where it stood before.  take: what belongs to that instant, the guest being stopped for it.  CannotDo where
        this guest, or this host, cannot do that.
        """
        paused: list[float] = []

        def send(monitor: Monitor) -> None:
            monitor.give(NAME, fd)
            if take:
                self._stopped = self.found.ran
                monitor.ask("stop")
                take(monitor)
            # Before the word is given: where no answer comes, it may be sending.
            self.sent = True
            try:
                monitor.ask("migrate", uri=f"fd:{NAME}")
            except Refused:
                self.sent = False
                raise
            if take and self.found.ran:
                _run_on_once_kept(monitor)
            if self.found.ran:
                paused.append(_pause(monitor))

        self._begin(send)
        return paused[0] if paused else None

    def move(self, uri: str, fd: int | None = None) -> None:
        """Send to another QEMU: at `uri`, or behind the descriptor `fd`."""

        def send(monitor: Monitor) -> None:
            if fd is not None:
                monitor.give(NAME, fd)
            monitor.ask("migrate", uri=uri if fd is None else f"fd:{NAME}")

        self._begin(send)

    def _begin(self, send: Callable[[Monitor], None]) -> None:
        with Monitor(self.path) as monitor:
            standing = require_sendable(monitor, self.path)
            markers.refuse(markers.read(monitor), standing.run, standing.given_away, self.path)
            self.found.ran = standing.run in RUNS
            self.begun = True
            try:
                markers.clear(monitor)
                if self._mark is not None:
                    markers.put(monitor, markers.MOVED, ran=self.found.ran, **self._mark)
                prepare(monitor, self._on, self._parameters(monitor), self.found)
                send(monitor)
            except Refused as error:
                raise _explained(error, self.path) from error

    def _parameters(self, monitor: Monitor) -> dict[str, Any]:
        wanted: dict[str, Any] = {}
        if self._rate is not None:
            wanted["max-bandwidth"] = self._rate
        elif monitor.ask("query-migrate-parameters").get("max-bandwidth") == DEFAULT_BANDWIDTH:
            wanted["max-bandwidth"] = 0
        if self._downtime is not None:
            wanted["downtime-limit"] = self._downtime
        return wanted

    def completed(self) -> Standing:
        """After the given-away word: wait for QEMU's `completed` and put back what was found."""
        standing = wait_for(self.path, lambda s: not s.moving, 60, "to complete")
        if standing.migration != "completed":
            self.take_back()
            said = f"'{standing.migration}': {standing.reason or 'no reason given'}"
            raise CannotDo(f"QEMU ended the migration as {said}")
        with contextlib.suppress(Refused):
            patiently(self.path, self.found.put_back)
        return standing

    def take_back(self, *, doubt: bool = True) -> Standing:
        """After our end was closed: wait until QEMU has noticed, put back what was found, see the guest run again.

        doubt: another QEMU may hold the guest, and ask for it later.
        """
        wait_for(self.path, lambda s: not s.moving and s.run != "finish-migrate", 60, "to run on")
        return patiently(self.path, lambda monitor: self.taken_back(monitor, doubt=doubt))

    def taken_back(self, monitor: Monitor, *, doubt: bool = True) -> Standing:
        """The same within a conversation, once QEMU has noticed."""
        standing = look(monitor)
        if standing.moving or standing.given_away:
            words = f"another migration of the guest at {self.path} has begun meanwhile ({standing.migration})"
            raise Unsettled(words, f"vm-status {self.path}")
        markers.keep(monitor, (self._mark or {}).get("move") if doubt else None)
        with contextlib.suppress(Refused):
            # Not there any more, where QEMU got as far as using it.
            monitor.ask("closefd", fdname=NAME)
        with contextlib.suppress(Refused):
            self.found.put_back(monitor)
        ours = standing.run == "postmigrate" or (standing.run == "paused" and self._stopped)
        return run_on(monitor) if self.found.ran and ours else look(monitor)


def _run_on_once_kept(monitor: Monitor) -> None:
    """Let a guest run that was stopped for its snapshot, as soon as QEMU keeps its pages as they are: it has sent some.

    'active' alone is too early.  Some versions let it run themselves.
    """
    while True:
        standing = look(monitor)
        ram = standing.info.get("ram", {})
        if not standing.moving or ram.get("normal", 0) + ram.get("duplicate", 0) > 0:
            break
        time.sleep(0.0005)
    if standing.migration in BUSY | {"completed"}:
        monitor.ask("cont")


def _pause(monitor: Monitor) -> float:
    """From QEMU's STOP to its RESUME, in ms, by its own clock; CannotDo where the migration ends before."""
    stopped = None
    while True:
        event = monitor.event(1)
        if event is None:
            standing = look(monitor)
            if not standing.moving and standing.migration != "completed":
                raise CannotDo(f"QEMU ended the snapshot as '{standing.migration}': {standing.reason}")
            continue
        stamp = event["timestamp"]
        at: float = stamp["seconds"] * 1000 + stamp["microseconds"] / 1000
        if event["event"] == "STOP":
            stopped = at
        elif event["event"] == "RESUME" and stopped is not None:
            return round(at - stopped, 3)


def _explained(error: Refused, path: str) -> CannotDo:
    if "non-migratable" in error.text or "block" in error.text.lower():
        return CannotDo(f"the guest at {path} cannot be saved: {error.text}", "QEMU names the device in its way")
    return error


def finish(path: str, after: str) -> str:
    """What becomes of a guest whose state has been sent: 'paused', 'running' or 'quit'.  Gives the state reached."""
    if after == "running":
        try:
            return cont(path).run
        except VmstateError as error:
            text = f"the state is whole, but the guest at {path} does not run on: {error}"
            raise Unsettled(text, f"vm-cont {path}") from error
    if after == "quit":
        try:
            with contextlib.suppress(GuestGone):
                patiently(path, lambda monitor: monitor.ask("quit"))
        except VmstateError as error:
            text = f"the state is whole, but the guest at {path} was not ended: {error}"
            raise Unsettled(text, f"vm-status {path}") from error
        return "gone"
    return "paused"
