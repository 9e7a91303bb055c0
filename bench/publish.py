"""What is published: ratios, as JSON, as a table and as bars.  Absolute times go to a folder that git ignores."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from measure import Row

# In the network ours may take so much for its second phase.
GAP_LIMIT = "1.3 tcp: + 20 ms"
# The start of a command behind a pipe, which QEMU does not need.
ANNOUNCE_LIMIT = "QEMU's own + 30 ms"
LIMITS = ("100 ms", "300 ms", "0.5 ms", "5 ms", "20 us", "1 ms", "20 ms", "1.25 of itself", "128 MiB", "256 MiB")
LIMITS += (GAP_LIMIT, ANNOUNCE_LIMIT)
UNITS = {"s": (1.0, "s"), "B": (1 / (1 << 20), "MiB")}


def amount(values: list[float], unit: str) -> str:
    import statistics

    factor, name = UNITS[unit]
    return f"{statistics.median(values) * factor:.3f} {name}" if unit == "s" else f"{min(values) * factor:.1f} {name}"


def verdict(row: Row) -> str:
    return {True: "met", False: "MISSED", None: ""}[row.met]


def target(row: Row) -> str:
    return "" if row.target is None else f"{row.target:g}"


def line(row: Row) -> str:
    """For the screen, with absolute figures."""
    who = f"{row.ours_name} : {row.theirs_name}"
    figures = f"{amount(row.ours, row.unit):>11} {amount(row.theirs, row.unit):>11}"
    ratios = f"{row.ratio:6.2f} {row.best:6.2f} {target(row):>5} {verdict(row)}"
    return f"{row.case:16}{who:44.44} {row.what:46.46} {figures} {ratios}"


def headline() -> str:
    return f"{'':16}{'ours : theirs':44} {'what':46} {'ours':>11} {'theirs':>11} {'ratio':>6} {'best':>6} {'least':>5}"


def record(row: Row) -> dict[str, Any]:
    kind = "limit" if row.theirs_name in LIMITS else {"s": "time", "B": "size"}[row.unit]
    values = {"case": row.case, "ours": row.ours_name, "theirs": row.theirs_name, "what": row.what, "kind": kind}
    ratios = {"ratio": round(row.ratio, 3), "best": round(row.best, 3), "rounds": len(row.ours)}
    return {**values, **ratios, "target": row.target, "met": row.met}


def write(rows: list[Row], about: dict[str, Any], folder: Path, times: Path) -> None:
    for place in (folder, times):
        place.mkdir(parents=True, exist_ok=True)
    records = [record(row) for row in rows]
    save(folder / "results.json", json.dumps({"version": 1, **about, "rows": records}, indent=1) + "\n")
    save(folder / "results.md", table(rows, about))
    absolute = [
        {**entry, "ours_took": row.ours, "theirs_took": row.theirs} for entry, row in zip(records, rows, strict=True)
    ]
    save(times / "times.json", json.dumps(absolute, indent=1) + "\n")
    times_alone = [r for r in rows if record(r)["kind"] == "time" and r.case != "start"]
    save(folder / "speed.svg", bars("How many times as fast", times_alone))
    limits = [r for r in rows if record(r)["kind"] == "limit"]
    save(folder / "limits.svg", bars("How often it fits into its limit", limits))
    if found := [r for r in rows if r.case == "gap"]:
        save(folder / "gaps.svg", gaps(found, "How long a moved guest does not answer, 1 being QEMU's own migration"))
    if found := [r for r in rows if r.case == "pause" and r.theirs_name == "stop, migrate, cont"]:
        save(folder / "pauses.svg", gaps(found, "How long a guest stands to be saved, 1 being stop, migrate, cont"))
    if found := [r for r in rows if r.case == "lazy" and r.what.startswith("until the guest runs, ")]:
        save(folder / "lazy.svg", sizes(found))
    if curves := [r.curve for r in rows if r.curve]:
        save(folder / "asked.svg", asked(curves[0]))


def save(path: Path, text: str) -> None:
    path.write_text(text)


def table(rows: list[Row], about: dict[str, Any]) -> str:
    lines = [
        "# What `make bench` found",
        "",
        f"{about['cores']} cores, guest accelerated by {about['accel']}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f"; medians of {about['rounds']} rounds or more, taken in turn; load before and after: "
        + f"{about['load'][0]} and {about['load'][1]}.",
        "",
        "A ratio is theirs / ours in time or size, or a limit / ours: above 1 ours is better. `best` is the same of",
        "the best rounds. The target is the least ratio wanted. A whole command counts Python's start; QEMU's own",
        "`migrate` has none.",
        "",
        "With its own pipe of 64 KiB `exec:cat` was seen to take thrice as long where both cores were idle as where",
        "one was busy, or where QEMU was held on one core. So it is also measured with a pipe of 1 MiB, and beside a",
        "busy core.",
        "",
        "| | ours | against | what | ratio | best | target | |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        ours, theirs = (f"`{name}`".replace("|", "\\|") for name in (row.ours_name, row.theirs_name))
        words = (row.case, ours, theirs, row.what)
        figures = (f"{row.ratio:.2f}", f"{row.best:.2f}", target(row), verdict(row))
        lines.append(f"| {' | '.join((*words, *figures))} |")
    return "\n".join(lines) + "\n"


STYLE = """
  text { font: 13px sans-serif; fill: #24292f }
  .bar, .ours { fill: #2f7d4f } .loss { fill: #b35900 } .theirs { fill: #6e7781 }
  .axis { stroke: #8c959f } .target { stroke: #24292f; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .bar, .ours { fill: #56b37f } .loss { fill: #e08a3c } .theirs { fill: #9ea7b3 }
    .target { stroke: #e6edf3 }
  }
"""
LEFT, WIDE, HIGH, TOP = 560, 330, 24, 62


def bars(title: str, rows: list[Row]) -> str:
    """One bar a row from 1, right where ours is better; the tick is the target.  The scale is logarithmic."""
    ratios = [row.ratio for row in rows] or [1.0]
    low = min(0.5, *ratios, *(row.target or 1 for row in rows), 1) / 1.1
    high = max(2.0, *ratios, *(row.target or 1 for row in rows), 1) * 1.1

    def at(ratio: float) -> float:
        return LEFT + WIDE * (math.log(max(ratio, 1e-6)) - math.log(low)) / (math.log(high) - math.log(low))

    marks = [mark for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= mark <= high]
    parts = frame(title, len(rows), marks, at)
    for number, row in enumerate(rows):
        parts += bar(row, TOP + HIGH * number, at)
    return "\n".join([*parts, "</svg>"]) + "\n"


def frame(title: str, lines: int, marks: list[float], at: Any) -> list[str]:
    """A picture's begin, up to its axis."""
    height = TOP + HIGH * lines + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDE + 70} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    for mark in marks:
        parts.append(f'<text x="{at(mark):.0f}" y="46" text-anchor="middle">{mark:g}</text>')
        ink = 0.9 if mark == 1 else 0.3
        parts.append(
            f'<line class="axis" x1="{at(mark):.0f}" x2="{at(mark):.0f}" y1="52" y2="{height - 8}" opacity="{ink}"/>'
        )
    return parts


def bar(row: Row, top: int, at: Any) -> list[str]:
    left, right = sorted((at(1.0), at(row.ratio)))
    kind = "bar" if row.ratio >= 1 else "loss"
    words = f"{row.ours_name} : {row.theirs_name}"
    what = row.what if row.case != "memory" else ""
    parts = [
        f'<text x="8" y="{top + 14}">{escape(words)}</text>',
        f'<text x="300" y="{top + 14}" opacity="0.75">{escape(shorter(what))}</text>',
        f'<rect class="{kind}" x="{left:.1f}" y="{top + 2}" width="{max(1.0, right - left):.1f}" height="{HIGH - 8}"/>',
        f'<text x="{max(right, at(row.target or 0.001)) + 6:.1f}" y="{top + 14}">{row.ratio:.2f}</text>',
    ]
    if row.target:
        x = at(row.target)
        parts.append(f'<line class="target" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 1}" y2="{top + HIGH - 3}"/>')
    return parts


def gaps(rows: list[Row], title: str) -> str:
    """A dot a round, in medians of QEMU's own way with the same guest; the tick is the most that is wanted."""
    import statistics

    lines: list[tuple[str, str, list[float], float | None, str]] = []
    ticks = {(row.ours_name, row.what): statistics.median(row.theirs) / row.target for row in rows if row.target}
    for row in [row for row in rows if row.theirs_name != GAP_LIMIT]:
        usual = max(1e-9, statistics.median(row.theirs))
        if all(row.what != line[1] for line in lines):
            lines.append((row.theirs_name, row.what, [t / usual for t in row.theirs], None, "theirs"))
        most = ticks.get((row.ours_name, row.what))
        lines.append((row.ours_name, row.what, [t / usual for t in row.ours], most and most / usual, "ours"))
    high = max(2.0, *(x for line in lines for x in (*line[2], line[3] or 0))) * 1.05

    def at(ratio: float) -> float:
        return LEFT + WIDE * ratio / high

    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50, 1e9) if high / step <= 8)
    parts = frame(title, len(lines), [step * n for n in range(int(high / step) + 1)], at)
    for number, (name, what, values, most, kind) in enumerate(lines):
        y = TOP + HIGH * number + (HIGH - 4) / 2
        parts.append(f'<text x="8" y="{y + 4:.0f}">{escape(name)}</text>')
        parts.append(f'<text x="300" y="{y + 4:.0f}" opacity="0.75">{escape(shorter(what))}</text>')
        parts += [f'<circle class="{kind}" cx="{at(x):.1f}" cy="{y:.1f}" r="4" opacity="0.6"/>' for x in values]
        if most:
            parts.append(f'<line class="target" x1="{at(most):.1f}" x2="{at(most):.1f}" y1="{y - 9}" y2="{y + 9}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


SIDE, FLOOR = 420, 300


def plot(title: str, across: str, up: str) -> list[str]:
    """A picture's begin, with its two axes."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE + 240} {FLOOR + 60}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE} polyline {{ fill: none; stroke-width: 2 }}</style>",
        f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>',
        f'<text x="60" y="44" opacity="0.75">{escape(up)}</text>',
        f'<text x="{60 + SIDE / 2}" y="{FLOOR + 50}" text-anchor="middle" opacity="0.75">{escape(across)}</text>',
        f'<line class="axis" x1="60" x2="{60 + SIDE}" y1="{FLOOR + 10}" y2="{FLOOR + 10}"/>',
        f'<line class="axis" x1="60" x2="60" y1="54" y2="{FLOOR + 10}"/>',
    ]


def curve(points: list[tuple[float, float]], color: str, words: str = "") -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return [
        f'<polyline points="{path}" stroke="{color}"/>',
        f'<text x="{x + 8:.0f}" y="{y + 4:.0f}" style="fill: {color}">{escape(words)}</text>',
    ]


COLORS = ("#2f7d4f", "#b35900", "#6e7781")


def sizes(rows: list[Row]) -> str:
    """How long until a guest of each size runs, each way a line; 1 is the quickest of all.  Both scales double."""
    import re
    import statistics

    took: dict[str, dict[int, float]] = {}
    for row in rows:
        if found := re.search(r"(\d+) GiB, half full", row.what):
            gib = int(found[1])
            took.setdefault(row.ours_name, {})[gib] = statistics.median(row.ours)
            took.setdefault(row.theirs_name, {})[gib] = statistics.median(row.theirs)
    least = min(min(values.values()) for values in took.values())
    gibs = sorted({gib for values in took.values() for gib in values})
    most = max(max(values.values()) for values in took.values()) / least
    doublings = max(1, math.ceil(math.log2(most)))

    def at(gib: int, seconds: float) -> tuple[float, float]:
        right = math.log2(gib / gibs[0]) / max(1.0, math.log2(gibs[-1] / gibs[0]))
        return 60 + SIDE * right, FLOOR + 10 - (FLOOR - 50) * math.log2(seconds / least) / doublings

    parts = plot("How long until a restored guest runs", "its RAM in GiB, half full", "times the quickest")
    for power in range(doublings + 1):
        parts.append(f'<text x="52" y="{at(gibs[0], least * 2**power)[1] + 4:.0f}" text-anchor="end">{2**power}</text>')
    for gib in gibs:
        parts.append(f'<text x="{at(gib, least)[0]:.0f}" y="{FLOOR + 28}" text-anchor="middle">{gib}</text>')
    for color, (name, values) in zip(COLORS, took.items(), strict=False):
        parts += curve([at(gib, seconds) for gib, seconds in sorted(values.items())], color, name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def asked(times: list[float]) -> str:
    """When the guest asked for its pages, from the moment in which it ran until all were there."""
    title = "Pages that a guest asked for, while all others were brought beside them"
    parts = plot(title, "from its first moment until all memory is there", "share of all that it asked for")
    for share in (0, 0.5, 1):
        y = FLOOR + 10 - (FLOOR - 50) * share
        parts.append(f'<text x="52" y="{y + 4:.0f}" text-anchor="end">{share:.0%}</text>')
        parts.append(f'<text x="{60 + SIDE * share:.0f}" y="{FLOOR + 28}" text-anchor="middle">{share:g}</text>')
    points = [(60 + SIDE * min(1.0, at), FLOOR + 10 - (FLOOR - 50) * n / 100) for n, at in enumerate(times)]
    parts += curve(points, COLORS[0])
    return "\n".join([*parts, "</svg>"]) + "\n"


def shorter(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
