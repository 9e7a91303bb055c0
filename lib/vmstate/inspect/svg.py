"""Guest RAM as a picture: every page at its address, in the colour of what it is (SVG)."""

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ..report import size_words
from ..stream.page_map import PageMap
from .page_hash import DUPLICATE, PLAIN, REWRITTEN, UNSENT, ZERO

if TYPE_CHECKING:
    from numpy.typing import NDArray

COLUMNS, ROWS, CELL = 128, 128, 7
LEFT, TOP, GAP, LINE = 96, 84, 44, 18
COLOURS = {
    UNSENT: (255, 255, 255),
    ZERO: (226, 231, 237),
    PLAIN: (38, 92, 158),
    DUPLICATE: (234, 164, 36),
    REWRITTEN: (196, 48, 64),
}
# The rare ones would be lost among their neighbours.
WEIGHTS = {REWRITTEN: 8, DUPLICATE: 2}
NAMES = {
    PLAIN: "normal",
    DUPLICATE: "duplicate: an earlier page is the same",
    REWRITTEN: "rewritten: sent more than once",
    ZERO: "zero",
    UNSENT: "not in the state",
}
FONT = "font-family='DejaVu Sans, Helvetica, Arial, sans-serif'"


def draw(title: str, maps: list[PageMap], kinds: dict[bytes, "NDArray[np.uint8]"]) -> str:
    """The picture; one field for each block, the largest first, a cell for one page or for as many as fit."""
    width = LEFT + COLUMNS * CELL + 24
    pieces, y = [], TOP
    for page_map in sorted(maps, key=lambda page_map: -page_map.block.size):
        piece, y = _block(page_map, kinds[page_map.block.name], y)
        pieces.append(piece)
    head = _text(LEFT, 30, title, 18, "#1b2733", "bold") + _legend(kinds)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{y}' viewBox='0 0 {width} {y}' {FONT}>"
        f"<rect width='{width}' height='{y}' fill='#ffffff'/>{head}{''.join(pieces)}</svg>\n"
    )


def _legend(kinds: dict[bytes, "NDArray[np.uint8]"]) -> str:
    totals = sum((np.bincount(kind, minlength=5) for kind in kinds.values()), np.zeros(5, int))
    pieces, x = [], LEFT
    for kind, name in NAMES.items():
        if not totals[kind]:
            continue
        words = f"{name} ({int(totals[kind]):,})"
        pieces.append(f"<rect x='{x}' y='44' width='12' height='12' fill='{_colour(COLOURS[kind])}' stroke='#9aa7b4'/>")
        pieces.append(_text(x + 18, 55, words, 12, "#3a4856"))
        x += 34 + 7 * len(words)
    return "".join(pieces)


def _block(page_map: PageMap, kind: "NDArray[np.uint8]", y: int) -> tuple[str, int]:
    """The field of one block, and where the next one begins."""
    each = max(1, -(-len(kind) // (COLUMNS * ROWS)))
    cells = -(-len(kind) // each)
    per_cell = size_words(each * page_map.page)
    words = f"{page_map.block.text}, {size_words(page_map.block.size)}: {_counts(kind)}; a cell is {per_cell}"
    pieces = [_text(LEFT, y + 14, words, 12, "#1b2733")]
    y += LINE + 4
    colours = _blend(kind, each, cells)
    for row in range(-(-cells // COLUMNS)):
        if row % 16 == 0:
            address = row * COLUMNS * each * page_map.page
            pieces.append(_text(LEFT - 8, y + row * CELL + 9, f"{address:#x}", 10, "#6b7885", anchor="end"))
        pieces += _row(colours[row * COLUMNS : (row + 1) * COLUMNS], y + row * CELL)
    height = -(-cells // COLUMNS) * CELL
    frame = min(cells, COLUMNS) * CELL
    pieces.append(f"<rect x='{LEFT}' y='{y}' width='{frame}' height='{height}' fill='none' stroke='#9aa7b4'/>")
    return "".join(pieces), y + height + GAP


def _counts(kind: "NDArray[np.uint8]") -> str:
    totals = np.bincount(kind, minlength=5)
    short = {number: name.split(":")[0] for number, name in NAMES.items()}
    return ", ".join(f"{int(totals[number]):,} {short[number]}" for number in NAMES if totals[number])


def _blend(kind: "NDArray[np.uint8]", each: int, cells: int) -> list[str]:
    """The colour of each cell, mixed of those of its pages."""
    table = np.array([COLOURS[number] for number in range(5)], float)
    weights = np.array([WEIGHTS.get(number, 1) for number in range(5)], float)[kind][:, None]
    starts = np.arange(0, len(kind), each)
    mixed = np.add.reduceat(table[kind] * weights, starts, axis=0) / np.add.reduceat(weights, starts, axis=0)
    return [_colour(tuple(cell)) for cell in mixed[:cells]]


def _row(colours: list[str], y: int) -> list[str]:
    """Neighbours of one colour are one rectangle."""
    pieces, begin = [], 0
    for at in range(1, len(colours) + 1):
        if at == len(colours) or colours[at] != colours[begin]:
            place = f"x='{LEFT + begin * CELL}' y='{y}' width='{(at - begin) * CELL}' height='{CELL}'"
            pieces.append(f"<rect {place} fill='{colours[begin]}'/>")
            begin = at
    return pieces


def _colour(parts: tuple[float, ...]) -> str:
    # Fewer colours make longer rectangles.
    return "#" + "".join(f"{min(255, round(part / 4) * 4):02x}" for part in parts)


def _text(x: int, y: int, words: str, size: int, fill: str, weight: str = "normal", anchor: str = "start") -> str:
    style = f"font-size='{size}' fill='{fill}' font-weight='{weight}' text-anchor='{anchor}'"
    return f"<text x='{x}' y='{y}' {style}>{escape(words)}</text>"
