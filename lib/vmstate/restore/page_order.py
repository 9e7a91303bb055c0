"""The order in which a guest wanted its pages, kept for the next time: `--record`, `--prefetch`.

A line `vmstate order 1`, then a line for each run of neighbours: RAM block, number of the first page, number of pages.
"""

from collections.abc import Iterable

from ..errors import CannotDo, Damaged

HEAD = "vmstate order 1"
Place = tuple[bytes, int]
# Pages that are read of a record: 8 GiB, the first that a guest wanted
MOST = 1 << 21


def write(path: str, order: Iterable[Place]) -> None:
    """The file appears whole or not at all."""
    from ..io.descriptors import write_all
    from ..io.output import Output

    lines = [HEAD, *(f"{name.decode(errors='surrogateescape')} {first} {count}" for name, first, count in _runs(order))]
    output = Output(path, text=True)
    try:
        write_all(output.fd, ("\n".join(lines) + "\n").encode(errors="surrogateescape"))
        output.settle()
    finally:
        output.abandon()


def _runs(order: Iterable[Place]) -> list[tuple[bytes, int, int]]:
    found: list[tuple[bytes, int, int]] = []
    for name, number in order:
        if found and found[-1][0] == name and sum(found[-1][1:]) == number:
            found[-1] = (name, found[-1][1], found[-1][2] + 1)
        else:
            found.append((name, number, 1))
    return found


def read(path: str) -> list[Place]:
    """The pages in their order, at most `MOST`; CannotDo where there is no file, Damaged where it is another."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise CannotDo(f"cannot open {path}: {error.strerror}") from error
    if lines[:1] != [HEAD]:
        raise Damaged(f"{path} is no record of vm-restore --record: expected '{HEAD}' in line 1")
    found: list[Place] = []
    for number, line in enumerate(lines[1:], 2):
        name, _, rest = line.rpartition(" ")
        name, _, first = name.rpartition(" ")
        short = len(first) < 20 and len(rest) < 21
        if not (name and short and first.isdecimal() and rest.isdecimal() and int(first) < 1 << 52):
            raise Damaged(f"{path}, line {number}: expected BLOCK PAGE COUNT, found '{line[:60]}'")
        count = min(int(rest), MOST - len(found))
        found += [(name.encode(errors="surrogateescape"), int(first) + at) for at in range(count)]
    return found
