"""A state and a waiting guest side by side, by what QMP tells of the guest.

QEMU itself loads silently with another card, or with more vCPUs, than were saved.  Here the part that talks to QEMU and
the part that reads the stream meet.
"""

import os

from ..errors import CannotDo, Damaged, Misfit
from ..io.descriptors import HOLD
from ..qemu import answers, qtree
from ..qemu.incoming import DEVICES, misfits, require_waiting
from ..qemu.monitor import Monitor
from ..stream.description import find_end
from ..stream.device_facts import pci as pci_of
from ..stream.device_values import Device
from ..stream.devices import decode_part, devices_at_end
from ..stream.records import Blocks, Configuration, Record
from ..stream.validate import State
from ..vmz.state_file import state_of
from ..vmz.vmz_file import vmz_file

# What QMP cannot tell before a guest is loaded.
UNKNOWN = ("features of the CPU", "addresses of network cards", "disks", "devices that are not on a PCI bus")
Pci = dict[str, tuple[int, int]]


class Against:
    """The guest that waits at `path`; unknown: what was not compared.  Each method raises Misfit where they differ."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.unknown = list(UNKNOWN)
        self._machine = ""
        self._ahead: list[Device] | None = None
        self._compared = False

    def look_ahead(self, fd: int) -> None:
        """Where the input is a file with a plain state or a .vmz, its devices can be read first and compared early."""
        try:
            if file := vmz_file(fd):
                self._ahead = [decode_part(part) for part in state_of(file).parts]
                return
            start, size = os.lseek(fd, 0, os.SEEK_CUR), os.fstat(fd).st_size
            data = os.pread(fd, min(HOLD, size - start), max(start, size - HOLD))
            end = find_end(data)
            # Not where they are more than that: the first ones would be missing.
            if end and end.tail < len(data):
                self._ahead = devices_at_end(data)
        except (OSError, Damaged, CannotDo):
            # A pipe; or what the validator will say more about.
            return

    def see(self, record: Record) -> None:
        """Machine type and RAM blocks, as soon as they come; then the devices that were found ahead."""
        if isinstance(record, Configuration):
            self._machine = record.machine.decode("utf-8", "backslashreplace")
        if isinstance(record, Blocks):
            self._heads(tuple((block.text, block.size) for block in record.blocks))
            if self._ahead:
                self._devices(self._ahead)

    def _heads(self, blocks: tuple[tuple[str, int], ...]) -> None:
        with Monitor(self.path) as monitor:
            require_waiting(monitor, self.path)
            self._check(misfits(monitor, self.path, self._machine, blocks))

    def whole(self, state: State) -> None:
        """All of it at once, of a state that is known."""
        self._machine = state.machine
        self._heads(tuple((page_map.block.text, page_map.block.size) for page_map in state.maps.values()))
        self._devices([decode_part(part) for part in state.parts])

    def settle(self, state: State) -> None:
        """What is left to compare, once the state is known to be whole."""
        if not self._compared:
            self._devices([decode_part(part) for part in state.parts])

    def _devices(self, devices: list[Device]) -> None:
        """Number of vCPUs, and what is at each PCI address."""
        with Monitor(self.path) as monitor:
            require_waiting(monitor, self.path)
            own_vcpus, own = len(answers.vcpus(monitor)), _pci(monitor)
        found = []
        vcpus = sum(device.name == "cpu_common" for device in devices)
        if vcpus != own_vcpus:
            text = f"the state has {vcpus} vCPUs, the guest at {self.path} has {own_vcpus}"
            found.append((text, f"start the guest with -smp {vcpus}"))
        if own is None:
            self.unknown.append("PCI devices, which this guest does not have")
        else:
            found += self._pci_differences(pci_of(devices), own)
        self._check(found)
        self._compared = True

    def _pci_differences(self, pci: Pci, own: Pci) -> list[tuple[str, str]]:
        found = []
        for address in sorted(pci.keys() | own.keys()):
            theirs, ours = _words(pci.get(address)), _words(own.get(address))
            if theirs != ours:
                text = f"at PCI address {address} the state has {theirs}, the guest at {self.path} has {ours}"
                found.append((text, DEVICES))
        return found

    def _check(self, found: list[tuple[str, str]]) -> None:
        if found:
            hints = dict.fromkeys(hint for _, hint in found)
            raise Misfit("; ".join(text for text, _ in found), *hints, f"not compared: {', '.join(self.unknown)}")


def _words(found: tuple[int, int] | None) -> str:
    return "nothing" if found is None else f"{found[0]:04x}:{found[1]:04x}"


def _pci(monitor: Monitor) -> Pci | None:
    """Vendor and device id by address, in the form that QEMU uses in names of sections; None without a PCI device.

    Not from `query-pci`: before firmware has numbered the buses, it has nothing of what is behind a bridge.
    """
    found: Pci = {}
    for device in qtree.devices(answers.human(monitor, "info qtree")):
        if device["pci"]:
            vendor, card = device["pci"].split(":")
            found[device["at"]] = (int(vendor, 16), int(card, 16))
    return found or None
