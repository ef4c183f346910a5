"""The live view's table of engines: one row each, or one per pool when there are more than fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from asyncrl.runtime.facts import EngineFacts

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
