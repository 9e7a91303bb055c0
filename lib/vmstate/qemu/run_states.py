"""QEMU's run states, one row each: what they mean, and what each command does with a guest in one.

Who may run is decided by the markers and the decision alone (`markers.refuse`); a run state only words it.
Source of the names: qapi/run-state.json, RunState.
"""

from typing import NamedTuple


class RunState(NamedTuple):
    """One row of the table.

    words: of the guest, for `vm-status`.
    runs: it ran when its state is sent, so that it is to run on, there or here.
    cont: `vm-cont` lets it run; advised: `vm-status` names that command.
    resumes: `--after running` and `vm-restore` by itself let it run.
    unsendable: why its state cannot be sent, and hint: what to do then; "" where it can.
    """

    words: str
    runs: bool = False
    cont: bool = True
    advised: bool = False
    resumes: bool = False
    unsendable: str = ""
    hint: str = ""


STATUS = "vm-status {path}"
OFF = "in its monitor, system_reset starts it anew"
TABLE = {
    "running": RunState("runs", runs=True, resumes=True),
    "paused": RunState("stands paused", advised=True, resumes=True),
    "prelaunch": RunState("has not been started yet", advised=True),
    "suspended": RunState("sleeps, suspended by its own system (S3)", runs=True, resumes=True),
    "shutdown": RunState("has shut down", cont=False, unsendable="has shut down", hint=OFF),
    "guest-panicked": RunState("has panicked"),
    "watchdog": RunState("was stopped by its watchdog"),
    "io-error": RunState("has stopped on an error of a disk", advised=True, resumes=True),
    "internal-error": RunState(
        "has stopped on an internal error of QEMU",
        cont=False,
        unsendable="has stopped on an internal error of QEMU",
        hint=f"its state is not to be trusted; {OFF}",
    ),
    "inmigrate": RunState("waits for a state", unsendable="waits for a state", hint="vm-restore {path} < STATE"),
    "finish-migrate": RunState(
        "stands still in the last step of a migration, until whoever takes its state has it whole",
        cont=False,
        unsendable="is in the last step of a migration",
        hint=STATUS,
    ),
    "postmigrate": RunState("has given its state away and stands paused", advised=True, resumes=True),
    "save-vm": RunState("is saving a snapshot", unsendable="is saving a snapshot", hint=STATUS),
    "restore-vm": RunState("is loading a snapshot", unsendable="is loading a snapshot", hint=STATUS),
    "colo": RunState(
        "is kept in step with another one (COLO)", cont=False, unsendable="is kept in step with another", hint=STATUS
    ),
    "debug": RunState("is held by a debugger"),
}
# Those of a guest that runs, or will by itself
RUNS = tuple(name for name, row in TABLE.items() if row.runs)


def row_of(run: str) -> RunState:
    """Of a run state that is not known here QEMU decides whether it can run."""
    return TABLE.get(run) or RunState(f"is '{run}'")
