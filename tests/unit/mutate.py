"""Changes to real streams by the number, and which of them can never make a state again.

    python -m unit.mutate COUNT

in the folder tests judges COUNT of them and prints what came of it as JSON.  A change is made by its number alone, so
that `change(number)` is the one that a failure names.
"""

from __future__ import annotations

import functools
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vmstate.errors import Damaged
from vmstate.inspect.summary import survey
from vmstate.stream import constants
from vmstate.stream.reader import StateReader
from vmstate.stream.records import (
    Bitmap,
    Blocks,
    Command,
    Configuration,
    Description,
    Devices,
    EndMark,
    EndOfBody,
    Footer,
    Opaque,
    Packed,
    Pages,
    Record,
    Section,
    Start,
)
from vmstate.stream.validate import validate
from vmstate.stream.writer import encode

from unit.streams import Pieces, state

# The smaller a stream, the more of it can be judged in a second.
STREAMS = ["microvm-7.2", "microvm-10.0"] * 10 + ["ignore-shared-7.2", "compress-7.2", "virtio-mem-10.0"] * 2
STREAMS += ["background-10.0", "returnpath-7.2", "uuid-10.0", "postcopy-10.0", "xbzrle-7.2", "virt-aarch64-7.2"]
DEADLINE = 10
# Pages of a run whose words are changed
SAMPLES = 6


@dataclass(frozen=True)
class Place:
    """`size` bytes of structure; strict: no others there make a state, but for those in `but`."""

    at: int
    size: int
    what: str
    strict: bool = True
    but: bytes = b""


@dataclass(frozen=True)
class Change:
    """A changed stream; strict: it has to be refused."""

    name: str
    words: str
    data: bytes
    strict: bool


@dataclass(frozen=True)
class Anatomy:
    """Where everything is in a stream, by the reader.

    plain: all is RAM or devices, whose layout is known.  once: each page is there exactly once, and none is missing.
    """

    name: str
    data: bytes
    records: list[tuple[Record, int]]
    places: list[Place]
    plain: bool
    once: bool

    @functools.cached_property
    def front(self) -> list[Place]:
        """Places before the devices."""
        return [place for place in self.places if place.at < self.records[-3][0].offset]

    @property
    def text(self) -> int:
        """Where the JSON begins."""
        return self.records[-1][0].offset + 5


@functools.cache
def anatomy(name: str) -> Anatomy:
    data = state(name)
    judged = validate(Pieces(data))
    once = all(page_map.covered == page_map.pages and not page_map.again for page_map in judged.maps.values())
    records, pages = [], {}
    for record in StateReader(Pieces(data)):
        records.append((record, record.offset + len(encode(record))))
        if isinstance(record, Pages):
            pages[record.offset] = (record.first, record.stride, record.count)
    plain = not any(isinstance(record, Bitmap | Opaque) for record, _ in records)
    found = _Places(data, records, pages, once, list(judged.description["devices"]))
    return Anatomy(name, data, records, list(found.all()), plain, once)


class _Places:
    def __init__(self, data: bytes, records: Any, pages: Any, once: bool, devices: list[Any]) -> None:
        self.data, self.records, self.pages, self.once, self.devices = data, records, pages, once, devices
        self.named = {record.block.name for record, _ in records if isinstance(record, Pages | Packed) and record.named}
        self.rounds = [
            r.offset for r, _ in records if isinstance(r, Section) and r.tag != constants.QEMU_VM_SECTION_START
        ]
        self.looks: dict[type[Record], Callable[[Any], Iterator[Place]]] = {
            Start: self.start,
            Configuration: self.configuration,
            Command: self.command,
            Section: self.section,
            Footer: lambda record: iter(
                [Place(record.offset, 1, "footer"), Place(record.offset + 1, 4, "footer's id")]
            ),
            Blocks: self.blocks,
            Pages: self.run,
            Packed: self.packed,
            EndOfBody: lambda record: iter([Place(record.offset, 8, "end of a body")]),
            Devices: self.sections,
            EndMark: lambda record: iter([Place(record.offset, 1, "end mark")]),
            Description: self.description,
        }

    def all(self) -> Iterator[Place]:
        for record, _ in self.records:
            yield from self.looks[type(record)](record)

    def start(self, _record: Start) -> Iterator[Place]:
        yield Place(0, 4, "magic")
        yield Place(4, 4, "version")

    def configuration(self, record: Configuration) -> Iterator[Place]:
        yield Place(record.offset, 1, "tag of the configuration")
        # A longer name could be that with all parts behind it in it.
        yield Place(record.offset + 1, 4, "length of the machine's name", strict=not record.parts)

    def command(self, record: Command) -> Iterator[Place]:
        yield Place(record.offset, 1, "tag of a command")
        yield Place(record.offset + 1, 2, "number of a command", strict=False)
        yield Place(record.offset + 3, 2, "length of a command", strict=False)

    def section(self, record: Section) -> Iterator[Place]:
        # The last round may have any tag of a round: without an END it is what a background snapshot looks like.
        last = record.offset == self.rounds[-1]
        rounds = bytes((constants.QEMU_VM_SECTION_PART, constants.QEMU_VM_SECTION_END))
        yield Place(record.offset, 1, "tag of a section", but=rounds if last else b"")
        yield Place(record.offset + 1, 4, "id of a section")
        if record.name is not None:
            at = record.offset + 5
            yield Place(at, 1, "length of a section's name")
            yield Place(at + 1, len(record.name), "name of a section")
            yield Place(at + 1 + len(record.name), 4, "instance of RAM")
            yield Place(at + 5 + len(record.name), 4, "version of RAM")

    def blocks(self, record: Blocks) -> Iterator[Place]:
        yield Place(record.offset, 8, "size of all RAM")
        at = record.offset + 8
        for block in record.blocks:
            yield Place(at, 1, "length of a block's name")
            yield Place(at + 1, len(block.name), "name of a block", strict=block.name in self.named)
            yield Place(at + 1 + len(block.name), 8, "size of a block")
            at += 9 + len(block.name) + 8 * ((block.page_size is not None) + (block.address is not None))

    def run(self, record: Pages) -> Iterator[Place]:
        first, stride, count = self.pages[record.offset]
        for number in sorted({0, 1, count - 1, *range(0, count, 1 + count // SAMPLES)} & set(range(count))):
            content = record.offset + first + number * stride
            yield Place(content - 8 if number else record.offset, 8, "word of a page", strict=self.once)
            if record.named and number == 0:
                yield Place(record.offset + 8, first - 8, "name of a page's block", strict=self.once)
            if record.zero:
                yield Place(content, 1, "byte of a zero page")
            else:
                yield Place(content, 8, "content of a page", strict=False)

    def packed(self, record: Packed) -> Iterator[Place]:
        yield Place(record.offset, 8, "word of a packed page", strict=self.once)
        head = record.offset + 8 + (1 + len(record.block.name) if record.named else 0)
        if record.flag == constants.RAM_SAVE_FLAG_XBZRLE:
            yield Place(head, 1, "encoding of a delta")
            yield Place(head + 1, 2, "length of a delta", strict=False)
        else:
            yield Place(head, 4, "length of a packed page", strict=False)

    def sections(self, record: Devices) -> Iterator[Place]:
        at = record.offset
        while at < record.offset + len(record.data):
            device = self.devices.pop(0)
            name, size = device["name"].encode(), size_of(device)
            yield Place(at, 1, "tag of a device")
            yield Place(at + 1, 4, "id of a device")
            yield Place(at + 5, 1, "length of a device's name")
            yield Place(at + 6, len(name), "name of a device")
            yield Place(at + 6 + len(name), 4, "instance of a device")
            yield Place(at + 10 + len(name), 4, "version of a device", strict=False)
            behind = at + 14 + len(name) + size
            if size:
                yield Place(behind - size, size, "payload of a device", strict=False)
            yield Place(behind, 1, "footer of a device")
            yield Place(behind + 1, 4, "id in the footer of a device")
            at = behind + 5

    def description(self, record: Description) -> Iterator[Place]:
        yield Place(record.offset, 1, "tag of the description")
        yield Place(record.offset + 1, 4, "length of the description")


def size_of(part: dict[str, Any]) -> int:
    """Bytes of the fields of a device, as described."""
    size = sum(int(entry["size"]) * int(entry.get("array_len", 1)) for entry in part["fields"])
    return size + sum(6 + len(below["vmsd_name"].encode()) + size_of(below) for below in part.get("subsections", ()))


def described(text: bytes) -> list[tuple[str, int, int]] | None:
    """Name, instance and size of each device section; None where that cannot be read."""
    try:
        devices = json.loads(text)["devices"]
        return [(str(device["name"]), int(device["instance_id"]), size_of(device)) for device in devices]
    except Exception:  # noqa: BLE001 - whatever a changed text leads to
        return None


class Mutator:
    """Makes one change of a stream."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.found = anatomy(self.random.choice(STREAMS))
        self.data = self.found.data

    def change(self) -> Change:
        kinds = [self.flip, self.number, self.cut, self.insert, self.delete, self.whole, self.text, self.junk, self.any]
        words, data, strict = self.random.choices(kinds, [35, 20, 10, 10, 5, 10, 5, 1, 4])[0]()
        return Change(self.found.name, words, data, strict)

    def spliced(self, at: int, behind: int, new: bytes) -> bytes:
        return b"".join((memoryview(self.data)[:at], new, memoryview(self.data)[behind:]))

    def replaced(self, place: Place, new: bytes) -> tuple[str, bytes, bool]:
        old = self.data[place.at : place.at + place.size]
        strict = place.strict and new != old and not (place.but and new in place.but)
        words = f"{place.what} at {place.at}: {old[:16].hex()} to {new[:16].hex()}"
        return words, self.spliced(place.at, place.at + place.size, new), strict

    def place(self) -> Place:
        """One of RAM more often than one of the devices, of which there are more, and which take longer to judge."""
        return self.random.choice(self.found.front if self.random.random() < 0.6 else self.found.places)

    def flip(self) -> tuple[str, bytes, bool]:
        place = self.place()
        new = bytearray(self.data[place.at : place.at + place.size])
        new[self.random.randrange(place.size)] ^= 1 << self.random.randrange(8)
        return self.replaced(place, bytes(new))

    def number(self) -> tuple[str, bytes, bool]:
        place = self.place()
        new = self.random.choice([bytes(place.size), b"\xff" * place.size, self.random.randbytes(place.size)])
        return self.replaced(place, new)

    def cut(self) -> tuple[str, bytes, bool]:
        record, _ = self.random.choice(self.found.records)
        at = self.random.choice([record.offset, self.random.randrange(len(self.data))])
        return f"cut at {at}", self.data[:at], True

    def junk(self) -> tuple[str, bytes, bool]:
        junk = self.random.randbytes(self.random.choice([1, 5, 4096]))
        return f"{len(junk)} bytes behind the end", self.data + junk, True

    def insert(self) -> tuple[str, bytes, bool]:
        """Less than a command has, before a record."""
        record, _ = self.random.choice(self.found.records)
        new = self.random.randbytes(self.random.randint(1, 3))
        words = f"{new.hex()} before {type(record).__name__} at {record.offset}"
        return words, self.spliced(record.offset, record.offset, new), self.found.plain

    def delete(self) -> tuple[str, bytes, bool]:
        """The first bytes of a record."""
        record, behind = self.random.choice(self.found.records)
        end = min(behind, record.offset + self.random.randint(1, 8))
        words = f"{end - record.offset} bytes less of {type(record).__name__} at {record.offset}"
        strict = self.found.once or not isinstance(record, Pages | Packed | Command)
        return words, self.spliced(record.offset, end, b""), strict and not isinstance(record, Command)

    def whole(self) -> tuple[str, bytes, bool]:
        """A record taken away, there twice, or in turn with the next one."""
        number = self.random.randrange(len(self.found.records) - 1)
        (one, middle), (other, behind) = self.found.records[number : number + 2]
        first, second = self.data[one.offset : middle], self.data[middle:behind]
        how, new, strict = self.random.choice(
            [
                ("without", second, self.found.once or not isinstance(one, Pages | Packed)),
                ("twice", first + first + second, not isinstance(one, Pages | Packed)),
                ("swapped", second + first, not (isinstance(one, LOOSE) and isinstance(other, LOOSE))),
            ]
        )
        strict = strict and self.found.plain and (how == "swapped" or not isinstance(one, Command))
        words = f"{how}: {type(one).__name__} at {one.offset}"
        return words, self.spliced(one.offset, behind, new), strict

    def text(self) -> tuple[str, bytes, bool]:
        """A byte of the JSON changed, put in or taken out, and the length as it is then."""
        start = self.found.text
        at = self.random.randrange(start, len(self.data))
        old, new = self.data[at : at + 1], bytes((self.random.choice(b'0123456789{}[]:,"\\ eE-\0'),))
        piece = self.random.choice([new, b"", old + new, bytes((old[0] ^ 1 << self.random.randrange(8),))])
        text = self.data[start:at] + piece + self.data[at + 1 :]
        strict = text[:1] != b"{" or described(text) != described(self.data[start:])
        words = f"description at {at}: {old!r} to {piece!r}"
        return words, self.data[: start - 4] + constants.U32.pack(len(text)) + text, strict

    def any(self) -> tuple[str, bytes, bool]:
        at = self.random.randrange(len(self.data))
        behind = at + self.random.choice([0, 1, 8, 500])
        new = self.random.randbytes(self.random.choice([0, 1, 8, 500]))
        return f"from {at} to {behind}: {len(new)} others", self.spliced(at, behind, new), False


# What may come in any order
LOOSE = (Pages, Packed, Command)


def change(number: int) -> Change:
    return Mutator(number).change()


class Slow(BaseException):
    """It took too long."""


def _slow(_number: int, _frame: FrameType | None) -> None:
    raise Slow


def verdict(made: Change, deep: bool) -> tuple[str, str]:
    """'refused' or 'accepted', and what is wrong with that (empty: nothing).  deep: look through what is accepted."""
    sink = bytearray()
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        validate(Pieces(made.data), sink.extend)
        if made.strict:
            return "accepted", "had to be refused"
        if sink != made.data:
            return "accepted", "something else came out"
        if deep:
            json.dumps(survey(Pieces(made.data)).everything())
    except Damaged as error:
        if made.data[: len(sink)] != sink:
            return "refused", "something else came out"
        return "refused", "" if str(error) else "nothing is said"
    except Slow:
        return "neither", f"not within {DEADLINE} s"
    except Exception as error:  # noqa: BLE001 - the one thing that must not happen
        return "neither", repr(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "accepted", ""


def peak() -> int:
    """The most memory that this process had, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10


def main(count: int) -> None:
    signal.signal(signal.SIGALRM, _slow)
    started, found, failures = time.process_time(), Counter[str](), []
    for number in range(count):
        made = change(number)
        outcome, wrong = verdict(made, number % 20 == 0)
        found[outcome] += 1
        found["strict"] += made.strict
        if wrong:
            failures.append(f"change {number} of {made.name}, {made.words}: {wrong}")
    result = {**found, "failed": len(failures), "failures": failures[:20], "peak": peak()}
    print(json.dumps({**result, "seconds": round(time.process_time() - started, 1)}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
