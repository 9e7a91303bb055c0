"""How far a migration is, from what QEMU tells of it."""

from typing import Any

from ..errors import VmstateError
from ..progress import Sample
from ..report import size_words
from . import state

# Of a guest whose migration has failed
AS_BEFORE = {
    "running": "runs on",
    "shutdown": "has shut down",
    "paused": "is paused as before",
    "postmigrate": "is paused as before",
}


def words_of(run: str) -> str:
    return AS_BEFORE.get(run, f"is '{run}' as before")


def sample(path: str) -> Sample | None:
    """How far the migration of the guest at `path` is; None where that is not known now."""
    try:
        return sample_of(state.query_once(path, 0.4))
    except VmstateError:
        return None


def sample_of(guest_state: state.GuestState) -> Sample | None:
    """How far its migration is, as progress; None where none has sent memory."""
    ram = guest_state.ram
    if ram is None:
        return None
    facts = {
        "status": guest_state.migration,
        "percent": round(100 * (ram.total - ram.remaining) / max(1, ram.total), 1),
        "remaining": ram.remaining,
        "transferred": ram.transferred,
        "rate": int(ram.rate),
        "dirty_rate": ram.dirty_rate,
        "round": ram.round,
        "expected_downtime_ms": guest_state.expected_downtime,
        "seconds_left": round(ram.remaining / ram.rate, 3) if ram.rate else None,
    }
    return Sample(ram.total - ram.remaining, ram.total, facts, _words_of_sample(facts))


def _words_of_sample(facts: dict[str, Any]) -> str:
    words = [f"round {facts['round']}", f"{size_words(facts['rate'])}/s sent"]
    words.append(f"{size_words(facts['dirty_rate'])}/s dirtied")
    if facts["expected_downtime_ms"] is not None:
        words.append(f"downtime {facts['expected_downtime_ms']} ms")
    return ", ".join(words)
