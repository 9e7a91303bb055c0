"""Pages put into a QEMU's memory from outside (UFFDIO_COPY), where it waits for one and answers nothing.

A QEMU that has lost its server of pages, and whose own thread waits for one, has a silent monitor: it cannot be told to
take up another channel.
"""

import contextlib

from ..errors import CannotDo, Damaged, Misfit
from ..qemu.userfault import Userfault
from ..stream.page_map import NORMAL
from ..vmz.page_index import BlockIndex
from ..vmz.state_file import StateFile
from .postcopy import PAGE, Opening


def fill(pid: int, file: StateFile, opening: Opening, identity: str | None) -> None:
    """Give the QEMU `pid` every page that it lacks.

    identity: what its mark must have, of the state that it runs on; None: it is not looked at.  Raises CannotDo,
    Misfit, and Damaged where a page cannot be read: what was put in until then is right, and stays.
    """
    with contextlib.closing(Userfault(pid)) as faults:
        if identity is not None and not faults.holds(identity.encode()):
            text = f"this is not the state that QEMU (process {pid}) runs on, or its mark cannot be found"
            raise Misfit(text, "its pages would be wrong; if it is the one after all: --force-unmarked")
        places = faults.places(opening.blocks)
        if not places:
            raise CannotDo(f"the RAM of QEMU (process {pid}) cannot be found in its memory")
        for name, start in places.items():
            _fill_block(faults, start, file, file.blocks[name], faults.present(start, opening.blocks[name]))


def _fill_block(faults: Userfault, start: int, file: StateFile, block: BlockIndex, have: bytearray) -> None:
    at = -1
    while (at := have.find(0, at + 1)) >= 0:
        kind, place = block.find(at)
        if kind & NORMAL:
            faults.copy(start + at * PAGE, _content(file, block, at, place))
        else:
            faults.zero(start + at * PAGE)


def _content(file: StateFile, block: BlockIndex, number: int, place: int) -> memoryview:
    try:
        return file.read(place, PAGE)
    except (Damaged, OSError, IndexError) as error:
        raise Damaged(f"page {number} of RAM block {block.block.text!r} cannot be read: {error}") from error


def present(pid: int, opening: Opening) -> dict[bytes, bytearray]:
    """Which pages a QEMU has, as its kernel has it, of the blocks that can be told apart; a byte for each.

    More than QEMU knows of, where `fill` was at work.
    """
    try:
        with contextlib.closing(Userfault(pid)) as faults:
            places = faults.places(opening.blocks)
            return {name: faults.present(start, opening.blocks[name]) for name, start in places.items()}
    except CannotDo:
        # Then nobody could put anything there either.
        return {}
