"""Draws the facts of `inspect_facts` with rich, for a terminal and for pipes alike: no boxes, nothing said by colour alone.

Pure: facts in, renderables out. Called by `inspect`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from asyncrl.runtime.bars import SPARK
from asyncrl.runtime.inspect_facts import GroupFacts, LifeFacts, Overview, RolloutFacts, Span, Stretch
from asyncrl.runtime.inspect_text import one_line, printable
from asyncrl.runtime.summary_table import BAD, GOOD, LABEL_WIDTH, QUIET

SPAN_COLOURS = ("cyan", "magenta", "green", "yellow", "blue")
NONE = "-"
_STATE_STYLES = {"TRAINED": GOOD, "FAILED": BAD, "DROPPED": "yellow"}
_CELL_WIDTHS = (120, 60, 30)
"""Cells of a query are cut to the first of these with which its table fits the terminal."""
_LONGEST_VALUE = 400
MOST_IDS = 400
"""Token ids that are shown where there is no text."""


def draw_overview(facts: Overview) -> RenderableType:
    lengths = facts.lengths
    length_text = (
        f"mean {lengths.mean:.1f}, median {lengths.median:.0f}, p95 {lengths.p95:.0f}, longest {lengths.longest:,}"
        if lengths
        else "none finished"
    )
    rows = [
        ("run", facts.run),
        ("version", str(facts.version)),
        (
            "rollouts",
            f"{facts.rollouts:,} in {facts.groups:,} groups, {facts.shards} shard{'s' * (facts.shards != 1)}",
        ),
        ("states", ", ".join(f"{name.lower()} {count:,}" for name, count in facts.states.items())),
        ("dropped", _reasons(facts.dropped)),
        ("failed", _reasons(facts.failed)),
        ("finished", _reasons(facts.finished)),
        ("answer tokens", length_text),
    ]
    parts: list[RenderableType] = [_labels(rows)]
    if facts.by_version:
        parts += [Text(), _stretches(facts.by_version)]
    return Group(*parts, Text(), _rollouts(facts.newest, "newest", prompts=True))


def _reasons(counts: dict[str, int]) -> str:
    listed = ", ".join(f"{one_line(reason, 60) or 'no reason'} {count:,}" for reason, count in counts.items())
    return f"{sum(counts.values()):,} ({listed})" if counts else "0"


def _labels(rows: Iterable[tuple[str, str | Text]]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=LABEL_WIDTH, style=QUIET)
    table.add_column()
    for label, text in rows:
        table.add_row(label, text if isinstance(text, Text) else Text(text))
    return table


def _stretches(stretches: Sequence[Stretch]) -> Table:
    table = _table("version", "rollouts", "reward", "tokens", "")
    top = max((s.reward_mean for s in stretches), default=0.0)
    low = min(0.0, *(s.reward_mean for s in stretches))
    for stretch in stretches:
        first, last = stretch.first_version, stretch.last_version
        share = (stretch.reward_mean - low) / (top - low) if top > low else 0.0
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            f"{stretch.rollouts:,}",
            f"{stretch.reward_mean:.3f}",
            f"{stretch.tokens_mean:.1f}",
            Text(SPARK[-1] * round(20 * share), GOOD),
        )
    return table


def _rollouts(rollouts: Sequence[RolloutFacts], label: str, *, prompts: bool) -> Table:
    table = _table(label, "state", "reward", "tokens", "versions")
    if prompts:
        table.add_column("prompt", no_wrap=True, overflow="ellipsis", ratio=2)
    table.add_column("answer", no_wrap=True, overflow="ellipsis", ratio=3)
    table.expand = True
    for r in rollouts:
        cells: list[str | Text] = [
            str(r.rollout_id),
            Text(r.state.lower(), _STATE_STYLES.get(r.state, "")),
            _scores(r, ".3f"),
            _count(r.tokens_count),
            spans_text(r.spans),
        ]
        texts = [r.prompt, r.answer] if prompts else [r.answer]
        table.add_row(*cells, *(Text(NONE if t is None else one_line(t, 400)) for t in texts))
    return table


def _scores(r: RolloutFacts, form: str) -> str:
    """The reward, `cost` where there is one, and `greedy` where it is a baseline's."""
    if r.reward is None:
        return NONE
    return _worth(r.reward, r.cost or 0.0, form) + (" greedy" if r.greedy else "")


def _worth(reward: float, cost: float, form: str) -> str:
    return f"{reward:{form}}" + (f" cost {cost:{form}}" if cost else "")


def spans_text(spans: Sequence[Span] | None) -> Text:
    """`3x40 envx5 4x12`: 40 tokens of version 3, 5 of the environment, then 12 of version 4."""
    if not spans:
        return Text(NONE)
    return Text(" ").join(Text(f"{_by(s)}x{s.tokens}", _colour(i)) for i, s in enumerate(spans))


def _by(span: Span) -> str:
    return str(span.version) if span.origin == "model" else "env"


def draw_group(facts: GroupFacts) -> RenderableType:
    reward = NONE
    if facts.reward_mean is not None:
        reward = f"mean {facts.reward_mean:.3f}, standard deviation {facts.reward_std:.3f}"
    rows = [
        ("group", str(facts.group_id)),
        ("prompt id", _or_none(facts.prompt_id)),
        ("reward", reward),
        ("payload", _or_none(facts.payload)),
        ("prompt", _or_none(facts.prompt)),
    ]
    return Group(_labels(rows), Text(), _rollouts(facts.rollouts, "rollout", prompts=False))


def draw_life(facts: LifeFacts) -> RenderableType:
    r = facts.rollout
    ended = f", {one_line(r.reason)}" if r.reason else ""
    given = f" ({r.environment_tokens:,} of the environment)" if r.environment_tokens else ""
    rows: list[tuple[str, str | Text]] = [
        ("rollout", f"{r.rollout_id} of group {r.group_id}{', its greedy baseline' if r.greedy else ''}"),
        ("prompt id", _or_none(r.prompt_id)),
        ("state", Text(r.state.lower() + ended, _STATE_STYLES.get(r.state, ""))),
        ("reward", _scores(r, "g")),
        ("answer", f"{_count(r.tokens_count)} tokens{given}, finish reason {r.finish_reason or NONE}"),
        ("failed attempts", str(r.attempts)),
        ("trained", NONE if r.step is None else f"step {r.step}, batch {r.batch_id}"),
        ("payload", _or_none(facts.payload)),
    ]
    return Group(
        *(_labels(rows), Text(), _changes(facts), Text(), _spans(r.spans or []), Text()),
        *(Text("prompt", QUIET), _prompt(facts), Text(), Text("answer", QUIET), answer_text(facts)),
    )


def _changes(facts: LifeFacts) -> Table:
    table = _table("time", "after", "state", "version", "lease", "engine", "reward", "reason")
    began = facts.changes[0].unix_s
    for c in facts.changes:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(c.unix_s))
        table.add_row(
            f"{clock}.{int(c.unix_s * 1000) % 1000:03}",
            f"{c.unix_s - began:+.3f} s",
            Text(c.state.lower(), _STATE_STYLES.get(c.state, "")),
            str(c.version),
            str(c.lease_id or NONE),
            one_line(c.engine_id) or NONE,
            _worth(c.reward, c.cost, "g") if c.state == "SCORED" else NONE,
            Text(one_line(c.reason)),
        )
    return table


def _spans(spans: Sequence[Span]) -> Table:
    table = _table("version", "from token", "tokens", "mean logprob")
    for i, s in enumerate(spans):
        mean = f"{s.logprob_mean:.4f}" if s.origin == "model" else NONE
        table.add_row(Text(_by(s), _colour(i)), str(s.start), f"{s.tokens:,}", mean)
    return table


def _prompt(facts: LifeFacts) -> Text:
    if facts.rollout.prompt is not None:
        return Text(printable(facts.rollout.prompt))
    return Text(NONE if facts.prompt_tokens is None else ids_text(facts.prompt_tokens))


def answer_text(facts: LifeFacts) -> Text:
    """The answer with a mark `[3]` where tokens of version 3 begin, `[env]` where the environment's do; token ids where there
    is no text."""
    spans, tokens = facts.rollout.spans, facts.tokens
    if not spans or tokens is None:
        return Text(NONE)
    text = Text()
    for i, span in enumerate(spans):
        ids = tokens[span.start : span.start + span.tokens]
        text.append(f"[{_by(span)}]", f"bold reverse {_colour(i)}")
        text.append(ids_text(ids) + " " if facts.pieces is None else printable(facts.pieces[i]), _colour(i))
    return text


def ids_text(tokens: Sequence[int]) -> str:
    rest = f" ... and {len(tokens) - MOST_IDS:,} more" if len(tokens) > MOST_IDS else ""
    return " ".join(map(str, tokens[:MOST_IDS])) + rest


def draw_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> RenderableType:
    """The answer to a query, for a terminal `width` columns wide: a table where it fits, else one row below the other."""
    for most in _CELL_WIDTHS:
        cells = [[_cell(value, most) for value in row] for row in rows]
        names = [one_line(name, most) for name in columns]
        widths = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) <= width:
            break
    else:
        return Group(*(_record(columns, row) for row in rows))
    table = Table(box=None, pad_edge=False, header_style=QUIET)
    for i, name in enumerate(names):
        numbers = all(isinstance(row[i], int | float) or row[i] is None for row in rows)
        table.add_column(Text(name), justify="right" if numbers else "left", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _record(columns: Sequence[str], row: Sequence[Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style=QUIET)
    table.add_column()
    for name, value in zip(columns, row, strict=True):
        table.add_row(Text(one_line(name)), Text(_cell(value, _LONGEST_VALUE)))
    table.add_row()
    return table


def _cell(value: Any, most: int) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.3f}"
    return one_line(str(value), most)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style=QUIET)
    for name in names:
        left = name in ("state", "engine", "reason", "versions", "time", "")
        table.add_column(
            name, justify="left" if left else "right", no_wrap=name not in ("reason", "versions")
        )
    return table


def _colour(index: int) -> str:
    return SPAN_COLOURS[index % len(SPAN_COLOURS)]


def _count(count: int | None) -> str:
    return NONE if count is None else f"{count:,}"


def _or_none(text: str | None) -> str:
    return NONE if text is None else printable(text)
