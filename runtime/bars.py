"""Numbers as block characters, for the live view. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

SPARK = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int, low: float | None = None) -> str:
    """The last `width` values as one bar each, between `low` (else the smallest) and the largest of them.

    A value that is not finite is a blank; equal values are all lowest bars.
    """
    shown = values[-width:] if width > 0 else ()
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return " " * len(shown)
    floor = min(finite) if low is None else low
    span = max(finite) - floor
    return "".join(_bar((value - floor) / span if span > 0 else 0.0) for value in shown)


def _bar(share: float) -> str:
    if not math.isfinite(share):
        return " "
    return SPARK[max(0, min(len(SPARK) - 1, int(share * len(SPARK))))]


def shares(counts: Sequence[int], room: int) -> list[int]:
    """`room` cells shared out in proportion to `counts` (largest remainder), but one at least for each count above 0.

    All are 0 if nothing is counted. `room` must be at least the number of counts.
    """
    total = sum(counts)
    if total == 0:
        return [0] * len(counts)
    cells = [max(1, count * room // total) if count else 0 for count in counts]
    while sum(cells) > room:
        cells[cells.index(max(cells))] -= 1
    by_loss = sorted(range(len(counts)), key=lambda i: -(counts[i] * room / total - cells[i]))
    for i in by_loss[: room - sum(cells)]:
        cells[i] += 1
    return cells


def compact(count: int) -> str:
    """A count in at most four characters up to 999 million: 840, 1.2k, 36k, 5.1M."""
    if count < 1000:
        return str(count)
    for size, unit in ((1_000, "k"), (1_000_000, "M"), (1_000_000_000, "G")):
        if round(count / size, 1) < 10:
            return f"{count / size:.1f}{unit}"
        if round(count / size) < 1000:
            return f"{count / size:.0f}{unit}"
    return f"{count / 1e9:.0f}G"
