"""What became of a restore: the guest's state and cards, or why QEMU refused."""

from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import Refused, VmstateError
from ..qemu.incoming import Waiting, refusal
from ..report import Report

if TYPE_CHECKING:
    from ..net.nic import Nic
    from ..qemu.launch import Process


class Outcome(NamedTuple):
    """state: the guest's run state; saved: the one in the state; nics: its cards, empty where it does not run."""

    guest: str
    state: str
    saved: str
    machine: str
    bytes: int
    nics: "list[Nic]"

    def values(self) -> dict[str, Any]:
        cards = [{"mac": nic.mac, "iface": nic.iface, "addresses": list(nic.addresses)} for nic in self.nics]
        return {**self._asdict(), "nics": cards}


def left_over(path: str | None) -> str:
    """What to do where a restore into the guest at `path`, None: a QEMU that it started, could not be undone."""
    return f"vm-status {path}" if path else "a QEMU that was started may be left: end it before the next try"


def refusal_of(waiting: Waiting, process: "Process | None", error: Exception, whole: bool) -> VmstateError:
    """Why QEMU did not take a state, in its own words where they can be had; `whole`: the state had proven its end."""
    if process and not process.alive():
        return refusal(process.words(), whole)
    try:
        if isinstance(error, Refused):
            raise error
        waiting.loaded()
    except Refused as reason:
        # From 9.1 on QEMU lives on; the details are on its stderr nevertheless.
        details = process.words() if process else ""
        return refusal(f"{details}; {reason.text}" if details else reason.text, whole)
    except VmstateError:
        pass
    return refusal("", whole)


def nics_of(waiting: Waiting, report: Report) -> "list[Nic]":
    """The cards; the guest runs already, and what cannot be learnt now does not change that."""
    from ..qemu.nics import from_info_network

    try:
        return from_info_network(*waiting.nic_facts())
    except (VmstateError, OSError) as error:
        report.warning(f"the guest runs, but its network cards are not known: {error}")
        return []
