"""`asyncrl status` as a person reads it: who waits for whom, the run, its parts, its pools, its engines.

Pure: a `RunStatus` and a width in, something to print out. Plain text on a pipe, the same with colours on a terminal;
what a run says (reasons, names of nodes) is shown, never obeyed. Called by the command line.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from asyncrl.recipes.sizes import amount
from asyncrl.runtime.control import RunStatus
from asyncrl.runtime.engines_table import QUIET, engines_detail, engines_table, strange_weights, with_notes
from asyncrl.runtime.facts import BufferFacts, EngineFacts, PoolFacts, PoolState, RunState, Snapshot
from asyncrl.runtime.inspect_text import one_line
from asyncrl.runtime.plain_view import clock, held_out_text

_LABEL = 9
_LIVE_STATES = ("queued", "leased", "complete", "scored", "batched")
_RUN_STYLES: dict[RunState, str] = {
    "starting": "yellow",
    "running": "green",
    "paused": "yellow",
    "draining": "yellow",
    "stopping": "yellow",
}
_POOL_STYLES: dict[PoolState, str] = {
    "starting": "yellow",
    "serving": "cyan",
    "short": "yellow",
    "failed": "red",
}


def draw_status(run: RunStatus, endpoint: str, width: int, most_engines: int | None = None) -> RenderableType:
    """`endpoint`: where it was asked. More engines than `most_engines` are shown by pool; None shows each."""
    now = run.snapshot
    rows: list[RenderableType] = [Text(one_line(run.who_waits), "bold"), Text(), _facts(run, endpoint, width)]
    if now.pools:
        rows += [Text(), _pools(now.pools, width)]
    if now.engines:
        by_pool = most_engines is not None and len(now.engines) > most_engines
        engines = _by_pool if by_pool else engines_detail
        rows += [Text(), engines(now.engines, now.version, width, now.weights)]
    return Group(*rows)


def _by_pool(
    engines: Sequence[EngineFacts], version: int, width: int, weights: Mapping[int, str]
) -> RenderableType:
    """With the engines that run other weights than the learner's, of which there should be none, by name."""
    table = engines_table(engines, version, width)
    strange = [
        f"{engine.engine_id}: {said}" for engine in engines if (said := strange_weights(engine, weights))
    ]
    return Group(table, *(Text(one_line(each), "red") for each in strange))


def _facts(run: RunStatus, endpoint: str, width: int) -> Table:
    now = run.snapshot
    table = Table.grid(padding=(0, 1))
    table.add_column(width=_LABEL, style=QUIET)
    table.add_column(width=width - _LABEL - 1)
    started = datetime.datetime.fromtimestamp(run.started_at).astimezone()
    phase = "" if now.phase == now.state else f", {one_line(now.phase)}"
    table.add_row(
        "run",
        Text.assemble(
            (one_line(run.name), "bold"),
            "  ",
            (now.state, _RUN_STYLES[now.state]),
            phase,
            (f"  {clock(now.seconds)} since {started:%Y-%m-%d %H:%M:%S %Z}", QUIET),
        ),
    )
    done = f"  {now.step / now.steps:.0%}".replace("%", " %") if now.steps else ""
    version = str(now.version) if now.version >= 0 else "none"
    digest = now.weights.get(now.version, "")
    weights = [("weights", one_line(digest))] if digest else []
    table.add_row("step", _labelled(("", f"{now.step}/{now.steps}{done}"), ("version", version), *weights))
    table.add_row(
        "learner", _labelled(("", now.learner_state), ("tokens/s", f"{now.learner_tokens_per_s:,.0f}"))
    )
    table.add_row("engines", _engines(now))
    table.add_row("buffer", _held(now.buffer))
    table.add_row("", _ended(now.buffer))
    if now.held_out.wanted:
        table.add_row("held out", Text(held_out_text(now.held_out)))
    table.add_row("control", Text(endpoint, QUIET))
    return table


def _engines(now: Snapshot) -> Text:
    used, slots = sum(e.slots_used for e in now.engines), sum(e.slots for e in now.engines)
    return _labelled(
        ("", str(len(now.engines))),
        ("slots", f"{used}/{slots}"),
        ("tokens/s", f"{now.engine_tokens_per_s:,.0f}"),
    )


def _held(buffer: BufferFacts) -> Text:
    counts = [(name, f"{getattr(buffer, name):,}") for name in _LIVE_STATES]
    return _labelled(
        *counts,
        ("groups held", f"{buffer.held_groups}/{buffer.capacity_groups}"),
        ("memory", f"{amount(buffer.held_bytes)} of {amount(buffer.memory_bytes)}"),
    )


def _ended(buffer: BufferFacts) -> Text:
    """With the reasons, and with what is not ordinary only where there is some of it."""
    cells = [("trained", f"{buffer.trained:,}")]
    for label, reasons in (("dropped", buffer.dropped), ("failed", buffer.failed)):
        split = ", ".join(f"{one_line(reason)} {count:,}" for reason, count in reasons.items() if count)
        cells.append((label, f"{sum(reasons.values()):,}" + (f" ({split})" if split else "")))
    if buffer.quarantined_prompts:
        cells.append(("quarantined prompts", f"{buffer.quarantined_prompts:,}"))
    if buffer.recoveries:
        cells.append(("restarts", f"{buffer.recoveries:,}"))
    return _labelled(*cells)


def _labelled(*cells: tuple[str, str]) -> Text:
    text = Text()
    for label, value in cells:
        text.append("  " if text else "")
        text.append(f"{label} " if label else "", QUIET).append(value)
    return text


def _pools(pools: list[PoolFacts], width: int) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style=QUIET)
    table.add_column("pool", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("engines", justify="right", no_wrap=True)
    table.add_column("slots per engine", justify="right", no_wrap=True)
    rows = [
        (
            (
                one_line(pool.name),
                Text(pool.state, _POOL_STYLES[pool.state]),
                f"{pool.engines_serving}/{pool.engines_wanted}",
                str(pool.concurrency),
            ),
            pool.reason,
        )
        for pool in pools
    ]
    return with_notes(table, rows, width)
