"""Tables of engines: the live view's, a row for each or one per pool when there are more than fit; and the whole detail
of each for `asyncrl status`. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from asyncrl.runtime.facts import EngineFacts
from asyncrl.runtime.inspect_text import one_line

MOST_ROWS = 8
STATE_STYLES = {
    "waiting for room": "yellow",
    "starting": "yellow",
    "joining": "yellow",
    "serving": "cyan",
    "updating": "magenta",
    "idle": "bright_black",
    "paused": "bright_black",
    "draining": "yellow",
    "restarting": "red",
    "dead": "red",
}
QUIET = "bright_black"
_WIDE = 110
"""Columns from which notes are a column of their own; below, they follow the table."""
_DIGEST = 18
"""Columns that digests take, with the gap before them."""
Noted = tuple[Sequence[str | Text], str]
"""A row's cells, and a note on it."""


def engines_table(engines: Sequence[EngineFacts], version: int, width: int) -> Table:
    """Engines in the order given. `version` is the newest published one: an engine behind it is shown in yellow."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, width=width, header_style=QUIET)
    by_pool = len(engines) > MOST_ROWS
    narrow = width < 100
    slots_width = (0 if narrow else 16) if by_pool else max(4, min(24, width - 62))
    table.add_column("pool" if by_pool else "engine", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("version", justify="right", no_wrap=True, min_width=7)
    table.add_column("slots", no_wrap=True, min_width=slots_width + 10 if by_pool else slots_width + 6)
    table.add_column("tokens/s", justify="right", no_wrap=True, min_width=8)
    table.add_column("waits for", ratio=1, no_wrap=True, overflow="ellipsis")
    if by_pool:
        for pool in dict.fromkeys(engine.pool for engine in engines):
            _pool_row(table, pool, [e for e in engines if e.pool == pool], version, slots_width)
        return table
    for engine in engines:
        table.add_row(
            engine.engine_id,
            Text(engine.state, STATE_STYLES[engine.state]),
            Text(_version(engine.version), "yellow" if engine.version < version else ""),
            _slots(engine.slots_used, engine.slots, slots_width),
            f"{engine.tokens_per_s:,.0f}",
            Text(engine.waits_for, QUIET),
        )
    return table


def _pool_row(
    table: Table, pool: str, engines: Sequence[EngineFacts], version: int, slots_width: int
) -> None:
    states = Text("  ").join(
        Text(f"{count} {state}", STATE_STYLES[state])
        for state, count in Counter(engine.state for engine in engines).items()
    )
    lowest, highest = min(e.version for e in engines), max(e.version for e in engines)
    span = _version(lowest) if lowest == highest else f"{_version(lowest)}-{_version(highest)}"
    waits = Counter(engine.waits_for for engine in engines if engine.waits_for)
    table.add_row(
        pool,
        states,
        Text(span, "yellow" if lowest < version else ""),
        _slots(sum(e.slots_used for e in engines), sum(e.slots for e in engines), slots_width),
        f"{sum(e.tokens_per_s for e in engines):,.0f}",
        Text(", ".join(f"{count} for {what}" for what, count in waits.most_common(2)), QUIET),
    )


def _version(version: int) -> str:
    return "none" if version < 0 else str(version)


def _slots(used: int, slots: int, width: int) -> Text:
    filled = min(width, round(width * used / slots)) if slots else 0
    return Text.assemble(
        ("■" * filled, "cyan"), ("·" * (width - filled), QUIET), f" {used:>{len(str(slots))}}/{slots}"
    )


def strange_weights(engine: EngineFacts, weights: Mapping[int, str]) -> str:
    """What is wrong with the bytes that `engine` loaded, given the learner's digests by version; empty where nothing is, or where
    one of the two is not known."""
    expected = weights.get(engine.version, "")
    if not expected or engine.weights in ("", expected):
        return ""
    return f"NOT THE LEARNER'S WEIGHTS: version {engine.version} is {expected}, it loaded {engine.weights}"


def engines_detail(
    engines: Sequence[EngineFacts], version: int, width: int, weights: Mapping[int, str]
) -> RenderableType:
    """A row for each engine, however many. What none of them has (a death, a node) gets no column. `weights`: the learner's
    digests by version."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style=QUIET)
    wide = width >= _WIDE
    shown = {
        "KV": any(math.isfinite(e.kv_used_fraction) for e in engines),
        "preempted": wide and any(e.preemptions for e in engines),
        "deaths": wide and any(e.deaths for e in engines),
        "weights": width >= _WIDE + _DIGEST and any(e.weights for e in engines),
        "node": wide and any(e.node for e in engines),
    }
    table.add_column("engine", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("version", "slots", "tokens/s", *(name for name in shown if shown[name])):
        table.add_column(name, justify="left" if name in ("node", "weights") else "right", no_wrap=True)
    rows: list[Noted] = []
    for engine in engines:
        kv = f"{engine.kv_used_fraction:.0%}" if math.isfinite(engine.kv_used_fraction) else "-"
        more = (
            kv,
            f"{engine.preemptions:,}",
            str(engine.deaths),
            one_line(engine.weights),
            one_line(engine.node),
        )
        cells: tuple[str | Text, ...] = (
            one_line(engine.engine_id),
            Text(engine.state, STATE_STYLES[engine.state]),
            Text(_version(engine.version), "yellow" if engine.version < version else ""),
            f"{engine.slots_used}/{engine.slots}",
            f"{engine.tokens_per_s:,.0f}",
            *(cell for cell, is_shown in zip(more, shown.values(), strict=True) if is_shown),
        )
        rows.append((cells, _note(engine, strange_weights(engine, weights), wide=wide)))
    return with_notes(table, rows, width)


def _note(engine: EngineFacts, strange: str, *, wide: bool) -> str:
    """Why it is as it is, and on a narrow terminal what has no column there."""
    deaths = f"{engine.deaths} death{'s' if engine.deaths > 1 else ''}"
    parts = (
        strange,
        f"waits for {engine.waits_for}" if engine.waits_for else "",
        engine.reason,
        f"{engine.preemptions:,} preempted" if engine.preemptions and not wide else "",
        deaths if engine.deaths and not wide else "",
    )
    said = "; ".join(part for part in parts if part)
    return f"{said}; on {engine.node}" if said and engine.node and not wide else said


def with_notes(table: Table, rows: Sequence[Noted], width: int) -> RenderableType:
    """`table` filled with `rows`, the first cell of each being its name; notes are of any length, "" for none."""
    notes = [one_line(note) for _, note in rows]
    beside = width >= _WIDE and any(notes)
    if beside:
        table.width = width
        table.add_column("", ratio=1, overflow="fold", style=QUIET)
    for (cells, _), note in zip(rows, notes, strict=True):
        table.add_row(*cells, *([Text(note)] if beside else []))
    if beside:
        return table
    below = (Text(f"{cells[0]}: {note}", QUIET) for (cells, _), note in zip(rows, notes, strict=True) if note)
    return Group(table, *below)
