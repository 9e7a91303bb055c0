"""What is in a state, as values for a person or a program: RAM, devices, vCPUs, cards, and how two states differ."""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import CannotDo
from ..io.readers import Reader
from ..stream import constants
from ..stream.device_facts import nics, vcpus
from ..stream.device_values import Device, Struct, to_json
from ..stream.devices import decode_part
from ..stream.page_map import PageMap
from ..stream.validate import State, validate
from ..vmz.state_file import StateFile, state_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .page_hash import Fingerprints

PAGES_LIMIT = 1 << 28
COMMANDS = {
    number: name.removeprefix("MIG_CMD_").lower().replace("_", "-")
    for name, number in vars(constants).items()
    if name.startswith("MIG_CMD_")
}


class Survey:
    """A whole state that has been looked through; prints: None where the pages themselves were not."""

    def __init__(self, state: State, prints: "Fingerprints | None") -> None:
        self.state, self.prints = state, prints

    @cached_property
    def devices(self) -> list[Device]:
        return [decode_part(part) for part in self.state.parts]

    @cached_property
    def maps(self) -> list[PageMap]:
        return list(self.state.maps.values())

    @cached_property
    def kinds(self) -> "dict[bytes, NDArray[Any]]":
        from .page_hash import kinds

        return kinds(self.maps, self.prints)

    def block_values(self, page_map: PageMap) -> dict[str, Any]:
        counts = page_map.count()
        return {
            "name": page_map.block.text,
            "bytes": page_map.block.size,
            "page": page_map.page,
            **counts,
            "duplicate": self._duplicates(page_map) if self.prints else None,
            "resent": page_map.again,
        }

    def _duplicates(self, page_map: PageMap) -> int:
        from .page_hash import DUPLICATE

        return int((self.kinds[page_map.block.name] == DUPLICATE).sum())

    def version(self) -> str:
        """What the state itself tells of the QEMU that wrote it."""
        if constants.MIG_CMD_SWITCHOVER_START in self.state.commands:
            return "10.0 or newer"
        return "9.2 or newer" if "configuration" in self.state.description else "older than 10.0"

    def values(self) -> dict[str, Any]:
        """Everything but the fields of devices."""
        state = self.state
        return {
            "machine": state.machine,
            "qemu": self.version(),
            "runstate": state.runstate,
            "bytes": state.size,
            "how": self.how(),
            "capabilities": list(state.capabilities),
            "uuid": state.uuid.hex() if state.uuid else None,
            "commands": [COMMANDS.get(number, str(number)) for number in state.commands],
            "sections": state.sections,
            "ram_sections": state.rounds,
            "deltas": state.deltas,
            "packed": state.packed,
            "blocks": [self.block_values(page_map) for page_map in self.maps],
            "vcpus": vcpus(self.devices),
            "nics": nics(self.devices),
        }

    def everything(self) -> dict[str, Any]:
        devices = []
        for part, device in zip(self.state.parts, self.devices, strict=True):
            devices.append({**to_json(device), "version": part.version})
        return {**self.values(), "devices": devices}

    def how(self) -> str:
        """How it was saved: 'background snapshot', 'live' (pages were sent again) or 'at rest or idle'."""
        if self.state.background:
            return "background snapshot"
        return "live" if any(page_map.again for page_map in self.maps) else "at rest, or of an idle guest"


def survey(source: Reader) -> Survey:
    """Look through a state; Damaged where it is not whole, CannotDo where a block has too many pages to be shown."""
    from .page_hash import Fingerprints

    prints = Fingerprints()
    state = validate(source, see=prints.see)
    _require_shown(state)
    return Survey(state, prints)


def _require_shown(state: State) -> None:
    for page_map in state.maps.values():
        if page_map.pages > PAGES_LIMIT:
            text = f"RAM block {page_map.block.text!r} has {page_map.pages} pages: more than can be shown here"
            raise CannotDo(text, "vm-verify judges it all the same")


def survey_index(file: StateFile) -> Survey:
    """What the index of a .vmz knows, without its pages; CannotDo where it has none."""
    state = state_of(file)
    _require_shown(state)
    return Survey(state, None)


def leaves(device: Device) -> Iterator[tuple[str, Any]]:
    """Every value of a device with its path; one that has no root is one value."""
    if device.root is None:
        yield "", device.raw
    else:
        yield from _leaves(device.root, "")


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Struct):
        for field in value.fields:
            yield from _leaves(field.value, f"{path}.{field.name}" if path else field.name)
        for part in value.subsections:
            yield from _leaves(part, f"{path}.{part.name}" if path else part.name)
    elif isinstance(value, list) and any(isinstance(element, Struct | list) for element in value):
        for number, element in enumerate(value):
            yield from _leaves(element, f"{path}[{number}]")
    else:
        yield path, value


class Difference:
    """pages: by block, first page and number of pages of each run that differs; None where only one has the block.

    fields: (device, path, value of the one, value of the other); a value is None where there is none.
    """

    def __init__(self, pages: dict[str, list[tuple[int, int]] | None], fields: list[tuple[str, str, Any, Any]]) -> None:
        self.pages, self.fields = pages, fields

    def values(self) -> dict[str, Any]:
        fields = [
            {"device": device, "field": path, "before": _shown(before), "after": _shown(after)}
            for device, path, before, after in self.fields
        ]
        return {"pages": self.pages, "fields": fields}

    @property
    def count(self) -> int:
        return sum(count for runs in self.pages.values() if runs for _, count in runs)


def difference(one: Survey, other: Survey) -> Difference:
    from .page_hash import differing

    pages: dict[str, list[tuple[int, int]] | None] = {}
    maps = {page_map.block.name: page_map for page_map in one.maps}
    others = {page_map.block.name: page_map for page_map in other.maps}
    for name in dict.fromkeys([*maps, *others]):
        both = name in maps and name in others
        text = (maps.get(name) or others[name]).block.text
        assert one.prints and other.prints
        pages[text] = differing(one.prints.of(maps[name]), other.prints.of(others[name])) if both else None
    return Difference(pages, list(_changed(one.devices, other.devices)))


def _changed(one: list[Device], other: list[Device]) -> Iterator[tuple[str, str, Any, Any]]:
    before = {(device.name, device.instance): dict(leaves(device)) for device in one}
    after = {(device.name, device.instance): dict(leaves(device)) for device in other}
    for key in dict.fromkeys([*before, *after]):
        fields, theirs = before.get(key, {}), after.get(key, {})
        for path in dict.fromkeys([*fields, *theirs]):
            if fields.get(path) != theirs.get(path):
                yield label(*key), path, fields.get(path), theirs.get(path)


def label(name: str, instance: int) -> str:
    return f"{name}#{instance}" if instance else name


def _shown(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value
