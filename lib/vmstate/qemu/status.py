"""Where a guest stands, in words, and what to do next."""

import contextlib
import shlex
import time
from typing import Any, NamedTuple

from ..progress import Sample
from ..report import printable, time_words
from . import answers, claim, markers
from .migration_progress import sample_of
from .monitor import Monitor
from .run_states import row_of
from .settings import LEFT_OVER, SavedSettings, left_behind
from .state import GuestState, lost_its_snapshot, query, query_once


class Status(NamedTuple):
    """What `of` found: the guest's path, its standing, whether left-overs lie there, words and commands for next.

    holder: the command that works on it, in words; "" where there is none.
    """

    path: str
    guest_state: GuestState
    leftovers: tuple[str, ...]
    words: str
    next: tuple[str, ...]
    holder: str = ""

    def lines(self) -> list[str]:
        found = [f"{self.path}: {self.words}"]
        if self.holder:
            found.append(f"in the hands of {self.holder}")
        if self.leftovers:
            what = ", ".join(self.leftovers)
            found.append(f"left over from a command that was killed: {what} (the next command sets it right)")
        return found + [f"next: {command}" for command in self.next]

    def values(self) -> dict[str, Any]:
        sample = sample_of(self.guest_state) if self.guest_state.moving else None
        return {
            "guest": self.path,
            "state": self.guest_state.run,
            "migration": self.guest_state.migration,
            "reason": self.guest_state.reason or None,
            "words": self.words,
            "next": list(self.next),
            "holder": self.holder or None,
            "leftovers": list(self.leftovers),
            "progress": sample.facts if sample else None,
        }


class _Seen(NamedTuple):
    """on: capabilities.  left: what a command has changed.  at_work: who holds the QEMU.  lost: its snapshot."""

    guest_state: GuestState
    found: markers.Marks
    on: frozenset[str]
    left: SavedSettings | None
    at_work: claim.Holder | None
    lost: bool

    @property
    def leftovers(self) -> tuple[str, ...]:
        """Of a command that has ended: what belongs to one that is at work is not left over."""
        if self.guest_state.moving or markers.held(self.found) or self.at_work:
            return ()
        changed = {*self.left.parameters, *(["the pause"] if self.left.stopped else [])} if self.left else set()
        return tuple(sorted(self.on & set(LEFT_OVER) | changed))


def of(path: str) -> Status:
    """Where the guest at `path` stands."""
    with Monitor(path) as monitor:
        guest_state = query(monitor)
        seen = _Seen(
            guest_state,
            markers.read(monitor),
            frozenset(name for name, state in answers.capabilities(monitor).items() if state),
            left_behind(monitor),
            claim.another(monitor),
            lost_its_snapshot(guest_state, monitor.pid()),
        )
    return _status(path, seen)._replace(holder=seen.at_work.words() if seen.at_work else "")


def _status(path: str, seen: _Seen) -> Status:
    guest_state, at_work, leftovers = seen.guest_state, seen.at_work, seen.leftovers
    if seen.lost:
        words = "stands still: its pages are protected still, for a snapshot that was lost"
        return Status(path, guest_state, (), words, (f"vm-cont {shlex.quote(path)}",))
    if markers.OFF in seen.found and guest_state.run == "postmigrate":
        return Status(path, guest_state, leftovers, row_of("shutdown").words, ())
    if moved := _of_move(path, guest_state, seen.found):
        return Status(path, guest_state, leftovers, *moved)
    waits = at_work and not at_work.serves and not guest_state.moving
    words = _words(guest_state, leftovers)
    return Status(path, guest_state, leftovers, words, () if waits else _next(path, guest_state))


def _of_move(path: str, guest_state: GuestState, found: markers.Marks) -> tuple[str, tuple[str, ...]] | None:
    """Words and commands for a guest that a move has left at both ends; None for any other."""
    force = f"vm-cont --force {shlex.quote(path)}    (only if it is gone where it was sent to)"
    settle = markers.recover_command(path, found)
    if markers.LAZY in found and guest_state.migration.startswith("postcopy"):
        return _of_lazy(path, guest_state, found)
    log = _last_words(found.get(markers.MOVED, {}).get("log"))
    if guest_state.migration == "postcopy-paused":
        if markers.MOVED in found:
            return "has crossed over, and pages that it lacks there are here; the link was lost", (settle,)
        words = "has crossed over to here, and lacks pages that are at its source; the link was lost"
        return words, ("on its source, vm-status tells how to go on",)
    if markers.has_left(found, guest_state):
        if "move" not in found[markers.MOVED]:
            return "was moved and stands paused here", (force,)
        if markers.HEARD in found:
            return f"was moved, and has been heard to run there{log}", (force,)
        if markers.decision(found) == markers.GRANTED:
            return f"was moved and stands paused here{log}", (settle, force)
        return f"was given away, but has not been let run where it was sent to{log}", (settle,)
    if markers.held(found):
        source = found[markers.TAKEN]
        where = printable(f"{source.get('path')} on {source.get('host')}").replace("\n", " ")
        reset = ", and was reset since" if guest_state.run == "prelaunch" else ""
        return f"has loaded the guest of {where} and is held until that has let it go{reset}", (settle,)
    return None


def _of_lazy(path: str, guest_state: GuestState, found: markers.Marks) -> tuple[str, tuple[str, ...]]:
    words = row_of(guest_state.run).words
    if guest_state.migration != "postcopy-paused":
        return f"{words} while its memory is being brought from a file", ()
    why = "the file could not be read" if markers.HALTED in found else "who brought it has ended"
    return f"{words}, and lacks a part of its memory: {why}", (markers.resume_command(path, found),)


def _last_words(log: object) -> str:
    """What a detached move has said last, in the file of this name."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(log, str) and log:
            with open(log, encoding="utf-8", errors="replace") as file:
                lines = [line.strip() for line in file if line.strip()]
            return f"; {log} ends with: {lines[-1]}" if lines else ""
    return ""


def wait_until_it_stands(path: str) -> None:
    """Return once no migration of the guest runs; GuestGone where its QEMU ends."""
    moving = True
    while moving:
        moving = query_once(path).moving
        time.sleep(0.2 if moving else 0)


def _words(guest_state: GuestState, leftovers: tuple[str, ...]) -> str:
    words = row_of(guest_state.run).words
    if guest_state.run == "postmigrate" and not guest_state.given_away:
        words = "stands paused"
    if guest_state.run == "inmigrate":
        return words if guest_state.migration == "none" else _words_of_load(guest_state)
    if guest_state.run == "paused" and "late-block-activate" in leftovers and guest_state.migration == "completed":
        return "has loaded its state and is held: whoever restored it did not get to let it run"
    return words + _words_of_migration(guest_state)


def _words_of_load(guest_state: GuestState) -> str:
    if guest_state.migration == "failed":
        return f"has failed to load a state and cannot load another: {guest_state.reason or 'no reason given'}"
    return "is loading a state"


def _words_of_migration(guest_state: GuestState) -> str:
    if guest_state.moving and guest_state.run != "finish-migrate":
        sample = sample_of(guest_state)
        return f" while its state is being sent ({guest_state.migration})" + (
            _words_of_sample(sample) if sample else ""
        )
    if guest_state.migration == "failed":
        return f"; its last migration failed: {guest_state.reason or 'no reason given'}"
    if guest_state.migration == "cancelled":
        return "; its last migration was cancelled"
    return ""


def _words_of_sample(sample: Sample) -> str:
    left = sample.facts["seconds_left"]
    at_most = f", at most {time_words(left)} left" if left is not None else ""
    return f": {sample.facts['percent']} %, {sample.words}{at_most}"


def _next(path: str, guest_state: GuestState) -> tuple[str, ...]:
    name = shlex.quote(path)
    if guest_state.run == "inmigrate":
        if guest_state.migration == "none":
            return (f"vm-restore {name} < STATE",)
        return ("end this QEMU and start it again with -incoming defer",) if guest_state.migration == "failed" else ()
    if guest_state.run == "finish-migrate":
        return (f"vm-status {name}", f"vm-cancel {name}    (takes it back)")
    if guest_state.moving:
        return (f"vm-status {name}",)
    if guest_state.given_away:
        return (f"vm-cont {name}    (only if it does not run elsewhere)",)
    if row_of(guest_state.run).advised:
        return (f"vm-cont {name}",)
    return ()
