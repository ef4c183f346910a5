"""`report.png`: one run at a glance, drawn from `metrics.jsonl` and the summary.

Six panels: what was learned, answer length, staleness, throughput, waits and engine/learner mismatch. The x axis is the
learner step for what happens once a step and minutes since launch for what goes on in between. Works on a run that
is still going on or failed before its first step: an empty panel says so. matplotlib is imported when a report is
written, and its state is not touched: the figure is drawn with the Agg canvas alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asyncrl.runtime.facts import Evaluation, Snapshot, StepFacts
from asyncrl.runtime.metrics import read_facts
from asyncrl.runtime.plain_view import clock
from asyncrl.runtime.report_panels import (
    FAINT,
    INK,
    Recorded,
    SnapshotPoint,
    draw_length,
    draw_mismatch,
    draw_reward,
    draw_staleness,
    draw_throughput,
    draw_waits,
    say_empty,
    style,
)
from asyncrl.runtime.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 1000
"""Snapshots kept for drawing; of a longer run every 2nd, 4th, ... is."""


def write_report(metrics_path: Path, summary: Summary | None, out_png: Path) -> None:
    """Draws the run recorded at `metrics_path` into `out_png`, whole or not at all.

    `summary` is None for a run that has not ended. Raises `MetricsError` if the metrics cannot be read; a missing
    file is a run without facts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_report(load(metrics_path), summary)
    partial = out_png.with_name(out_png.name + ".partial")
    FigureCanvasAgg(figure)
    figure.savefig(partial, format="png", dpi=140, facecolor="white")
    os.replace(partial, out_png)


def load(metrics_path: Path) -> Recorded:
    """Reads the facts, thinning snapshots so that a long run fits."""
    recorded = Recorded([], [], [])
    stride, seen = 1, 0
    for fact in read_facts(metrics_path):
        if isinstance(fact, StepFacts):
            _forget_from(recorded, fact.step)
            recorded.steps.append(fact)
        elif isinstance(fact, Evaluation):
            recorded.evaluations.append(fact)
        elif isinstance(fact, Snapshot):
            if seen % stride == 0:
                recorded.points.append(_point(fact))
            seen += 1
            if len(recorded.points) >= 2 * MOST_POINTS:
                del recorded.points[1::2]
                stride *= 2
    return recorded


def _forget_from(recorded: Recorded, step: int) -> None:
    """A run that went on from a checkpoint does again what came after it; the curves are of what counts."""
    while recorded.steps and recorded.steps[-1].step >= step:
        recorded.steps.pop()
    while recorded.evaluations and recorded.evaluations[-1].step >= step:
        recorded.evaluations.pop()


def _point(snapshot: Snapshot) -> SnapshotPoint:
    return SnapshotPoint(snapshot.seconds, snapshot.phase, snapshot.engine_tokens_per_s, snapshot.waits)


def draw_report(recorded: Recorded, summary: Summary | None) -> Figure:
    """The whole figure, 12 x 9 inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9))
    axes = figure.subplots(3, 2)
    figure.subplots_adjust(left=0.065, right=0.975, top=0.855, bottom=0.065, hspace=0.5, wspace=0.19)
    name, facts = headline(recorded, summary)
    figure.text(0.065, 0.955, name, fontsize=17, fontweight="bold", color=INK)
    figure.text(0.065, 0.923, facts, fontsize=10, color=FAINT)
    bound = summary.run.max_staleness_versions if summary is not None else None
    panels: Sequence[tuple[Axes, Callable[[Axes], bool]]] = (
        (axes[0, 0], lambda ax: draw_reward(ax, recorded)),
        (axes[0, 1], lambda ax: draw_length(ax, recorded.steps)),
        (axes[1, 0], lambda ax: draw_staleness(ax, recorded.steps, bound)),
        (axes[1, 1], lambda ax: draw_throughput(ax, recorded)),
        (axes[2, 0], lambda ax: draw_waits(ax, recorded.points)),
        (axes[2, 1], lambda ax: draw_mismatch(ax, recorded.steps)),
    )
    for ax, draw in panels:
        style(ax)
        if not draw(ax):
            say_empty(ax)
    return figure


def headline(recorded: Recorded, summary: Summary | None) -> tuple[str, str]:
    """The title and the line of facts below it."""
    if summary is None:
        steps = recorded.steps[-1].step if recorded.steps else 0
        return "asyncrl", f"{steps} steps so far; the run has not ended"
    facts = [
        summary.outcome.splitlines()[0][:60],
        f"{summary.steps_done} of {summary.run.steps} steps in {clock(summary.seconds)}",
    ]
    before, after = summary.held_out_before, summary.held_out_after
    if before is not None and after is not None:
        facts.append(f"held-out accuracy {before.accuracy:.3f} → {after.accuracy:.3f}")
    facts.append(f"{summary.tokens_trained:,} tokens trained, {summary.tokens_past_bound} past the bound")
    facts.append("conservation holds" if summary.conservation.holds else "conservation BROKEN")
    text = "   ·   ".join(facts)
    return f"{summary.run.name}  ({Path(summary.run.model).name})", text if len(text) < 170 else text[
        :167
    ] + "..."
