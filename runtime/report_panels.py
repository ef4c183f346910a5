"""The six panels of a report: each draws its part of the recorded facts into axes, or says that there is nothing to draw.

One palette throughout: blue and purple for engines and learner, orange for extremes, red for what must not be. A panel
returns False if nothing was recorded for it. Called by `asyncrl.runtime.report`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from asyncrl.runtime.facts import ENGINES_WAIT, LEARNER_WAITS, PROMPTS_WAIT, TRAINING, Evaluation, StepFacts
from asyncrl.runtime.summary import accuracy_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP_AXIS, TIME_AXIS = "learner step", "minutes since launch"
LABEL_POINTS = 11.0
INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, PURPLE, RED = "#2f6fb3", "#d9822b", "#2e9e6b", "#7a5ea8", "#c73e3a"
WAIT_CAUSES = (LEARNER_WAITS, ENGINES_WAIT, PROMPTS_WAIT)
WAIT_COLOURS = (PURPLE, BLUE, ORANGE, GREEN, RED)


class SnapshotPoint(NamedTuple):
    """What a report needs of one snapshot."""

    seconds: float
    phase: str
    engine_tokens_per_s: float
    waits: dict[str, float]


class Recorded(NamedTuple):
    """The facts of one run as a report needs them, in the order of time."""

    steps: list[StepFacts]
    points: list[SnapshotPoint]
    evaluations: list[Evaluation]


def draw_reward(ax: Axes, recorded: Recorded) -> bool:
    _title(ax, "Reward", STEP_AXIS)
    xs = [step.step for step in recorded.steps]
    rewards = [step.reward_mean for step in recorded.steps]
    if xs:
        ax.plot(xs, rewards, color=GREEN, alpha=0.35, linewidth=1)
        ax.plot(
            xs,
            smooth(rewards, max(1, len(xs) // 15)),
            color=GREEN,
            linewidth=2,
            label="mean reward of a step",
        )
    _draw_held_out(ax, recorded.evaluations)
    if not xs and not recorded.evaluations:
        return False
    _legend(ax, "best")
    return True


def _draw_held_out(ax: Axes, evaluations: list[Evaluation]) -> None:
    """avg@k with its interval, the first and the last with their figures; pass@k and maj@k of the largest k as lines."""
    shares = [evaluation.accuracy.value for evaluation in evaluations]
    for number, (evaluation, share) in enumerate(zip(evaluations, shares, strict=True)):
        low, high = accuracy_interval(evaluation)
        label = "held-out accuracy, 95 % interval" if number == 0 else None
        ax.errorbar(
            [evaluation.step], [share], yerr=[[max(0.0, share - low)], [max(0.0, high - share)]],
            fmt="D", color=INK, markersize=5, capsize=3, linewidth=1.2, label=label, zorder=5,
        )  # fmt: skip
        if number not in (0, len(evaluations) - 1):
            continue
        side = -1 if evaluation.step > 0 else 1
        ax.annotate(
            f"{share:.3f}", (evaluation.step, share), xytext=(8 * side, -14), textcoords="offset points",
            ha="right" if side < 0 else "left", fontsize=9, fontweight="bold", color=INK,
        )  # fmt: skip
    steps = [evaluation.step for evaluation in evaluations]
    k = max((k for evaluation in evaluations for k in evaluation.pass_at), default=0)
    for name, field, dashes in (("pass", "pass_at", (4, 2)), ("maj", "maj_at", (1, 1.5))):
        points = [getattr(evaluation, field).get(k) for evaluation in evaluations]
        if k and all(points):
            values = [point.value for point in points]
            ax.plot(
                steps, values, color=INK, linewidth=1, linestyle=(0, dashes), label=f"held-out {name}@{k}"
            )


def draw_length(ax: Axes, steps: list[StepFacts]) -> bool:
    _title(ax, "Answer length (tokens)", STEP_AXIS)
    if not steps:
        return False
    xs = [step.step for step in steps]
    ax.plot(xs, [step.response_tokens_max for step in steps], color=ORANGE, linewidth=1.2, label="longest")
    ax.plot(xs, [step.response_tokens_mean for step in steps], color=BLUE, linewidth=2, label="mean")
    ax.set_ylim(bottom=0)
    _end_labels(ax)
    return True


def draw_staleness(ax: Axes, steps: list[StepFacts], bound: int | None) -> bool:
    _title(ax, "Staleness at hand-over (versions)", STEP_AXIS)
    if not steps:
        return False
    xs = [step.step for step in steps]
    ax.step(xs, [step.staleness_max for step in steps], where="mid", color=ORANGE, linewidth=1.2, label="max")
    ax.plot(xs, [step.staleness_mean for step in steps], color=BLUE, linewidth=2, label="mean")
    ax.fill_between(
        xs,
        [step.staleness_in_flight_mean for step in steps],
        color=BLUE,
        alpha=0.15,
        linewidth=0,
        label="in flight",
    )
    if bound is not None:
        ax.axhline(bound, color=RED, linewidth=1.2, linestyle=(0, (4, 3)), label=f"bound {bound}")
    masked = [step for step in steps if step.tokens_masked]
    if masked:
        ax.plot(
            [step.step for step in masked], [step.staleness_max for step in masked], "o", color=RED, markersize=4,
            label="tokens masked",
        )  # fmt: skip
    ax.set_ylim(0, max(1, bound or 0, *(step.staleness_max for step in steps)) * 1.45)
    _legend(ax, "upper right", columns=5)
    return True


def draw_throughput(ax: Axes, recorded: Recorded) -> bool:
    _title(ax, "Tokens per second", TIME_AXIS)
    engines = [
        (point.seconds / 60, point.engine_tokens_per_s)
        for point in recorded.points
        if point.phase == TRAINING and math.isfinite(point.engine_tokens_per_s)
    ]
    learner = [(step.seconds / 60, step.learner_tokens_per_s) for step in recorded.steps]
    if not any(rate > 0 for _, rate in engines + learner):
        return False
    width = max(1, len(engines) // 60)
    if engines:
        xs, rates = zip(*engines, strict=True)
        ax.plot(xs, rates, color=BLUE, alpha=0.3, linewidth=0.8)
        ax.plot(xs, smooth(rates, width), color=BLUE, linewidth=2, label="engines")
    if learner:
        xs, rates = zip(*learner, strict=True)
        ax.plot(
            xs,
            smooth(rates, max(1, len(learner) // 30)),
            color=PURPLE,
            linewidth=2,
            label="learner",
        )
    ax.set_ylim(bottom=0)
    _start_up(ax, recorded.points)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _end_labels(ax)
    return True


def _start_up(ax: Axes, points: Sequence[SnapshotPoint]) -> None:
    """Shades the time from launch to the first rollouts."""
    began = next((point.seconds / 60 for point in points if point.phase == TRAINING), None)
    if not began:
        return
    ax.set_xlim(left=0)
    ax.axvspan(0, began, color=GRID, alpha=0.5, linewidth=0)
    ax.text(
        began / 2,
        0.5,
        "start",
        transform=ax.get_xaxis_transform(),
        ha="center",
        rotation=90,
        color=FAINT,
        fontsize=9,
    )


def draw_waits(ax: Axes, points: list[SnapshotPoint]) -> bool:
    _title(ax, "Waits in training (share of time)", TIME_AXIS)
    training = [point for point in points if point.phase == TRAINING]
    found = {cause for point in training for cause in point.waits}
    causes = [cause for cause in WAIT_CAUSES if cause in found] + sorted(found - set(WAIT_CAUSES))
    xs, shares = wait_series(training, causes)
    if not xs or not causes:
        return False
    ax.stackplot(xs, shares, colors=WAIT_COLOURS, labels=causes, alpha=0.75, linewidth=0)
    top = max(sum(column) for column in zip(*shares, strict=True))
    ax.set_ylim(0, max(0.2, top * 1.5))
    ax.set_xlim(xs[0], xs[-1])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend(ax, "upper right", columns=2)
    return True


def wait_series(
    points: Sequence[SnapshotPoint], causes: Sequence[str]
) -> tuple[list[float], list[list[float]]]:
    """Minutes, and per cause the share of time waited, in at most 40 stretches of equal numbers of snapshots."""
    stride = max(1, (len(points) - 1) // 40)
    marks = list(points[::stride])
    xs: list[float] = []
    shares: list[list[float]] = [[] for _ in causes]
    for before, after in itertools.pairwise(marks):
        span = after.seconds - before.seconds
        if span <= 0:
            continue
        xs.append(after.seconds / 60)
        for series, cause in zip(shares, causes, strict=True):
            series.append(max(0.0, after.waits.get(cause, 0.0) - before.waits.get(cause, 0.0)) / span)
    return xs, shares


def draw_mismatch(ax: Axes, steps: list[StepFacts]) -> bool:
    _title(ax, "Engine/learner |logprob difference|", STEP_AXIS)
    measured = [step for step in steps if step.mismatch_tokens > 0]
    drawn = False
    for name, label, colour in (("max", "max", ORANGE), ("p95", "p95", PURPLE), ("mean", "mean", BLUE)):
        pairs = [(step.step, getattr(step, f"mismatch_{name}")) for step in measured]
        pairs = [(x, y) for x, y in pairs if math.isfinite(y) and y > 0]
        if pairs:
            ax.plot(
                *zip(*pairs, strict=True), color=colour, linewidth=2 if name == "mean" else 1.2, label=label
            )
            drawn = True
    if drawn:
        ax.set_yscale("log")
        _end_labels(ax)
    return drawn


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of the finite values at most `width // 2` places away from each place; NaN where none is finite."""
    smoothed = []
    for place in range(len(values)):
        around = values[max(0, place - width // 2) : place + width // 2 + 1]
        window = [value for value in around if math.isfinite(value)]
        smoothed.append(sum(window) / len(window) if window else math.nan)
    return smoothed


def style(ax: Axes) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=FAINT, labelsize=9, length=0, which="both")
    ax.margins(x=0.02)


def _title(ax: Axes, title: str, x_label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=9)
    ax.set_xlabel(x_label, fontsize=9, color=FAINT, labelpad=3)
    if x_label == STEP_AXIS:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _legend(ax: Axes, place: Literal["best", "upper right"], columns: int = 1) -> None:
    ax.legend(
        loc=place,
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.4,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def _end_labels(ax: Axes) -> None:
    """Names each labelled line at its right end instead of in a legend; call it when the y limits are set."""
    low, high = ax.get_xlim()
    ax.set_xlim(low, high + (high - low) * 0.11)
    ends: list[tuple[Any, Any, str]] = []
    for line in ax.get_lines():
        points: Any = line.get_xydata()
        if not str(line.get_label()).startswith("_") and len(points):
            ends.append((points[-1], line, str(line.get_label())))
    points_per_pixel = 72 / ax.figure.dpi
    heights = [float(ax.transData.transform(end)[1]) * points_per_pixel for end, _, _ in ends]
    for (end, line, label), height, place in zip(ends, heights, spread(heights, LABEL_POINTS), strict=True):
        ax.annotate(
            label,
            end,
            xytext=(6, place - height),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=line.get_color(),
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """`heights` moved up as little as is needed, from the lowest on, for each to be `gap` from the next."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=lambda index: moved[index])
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    return moved


def say_empty(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("")
    ax.spines["bottom"].set_visible(False)
    ax.set_facecolor("#f8f9fa")
    ax.text(
        0.5,
        0.5,
        "nothing recorded",
        transform=ax.transAxes,
        ha="center",
        va="center",
        color=FAINT,
        fontsize=10,
    )
