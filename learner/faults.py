"""Faults of the learner: what makes a step unfit to be published, and how it is told.

Pure: norms in, verdicts out. A fault is raised on every rank alike, as all of them judge the same figures; whoever runs the
learner can tell it from an error of the program by its class, or in a text by `fault_line`. Called by `step`.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from asyncrl.learner.batch import Batch

MARK = "learner fault: "
REMEMBERED_NORMS = 64
NORMS_BEFORE_A_MEDIAN = 8
"""With fewer steps behind it, a median says little."""
NAMED_ROLLOUTS = 8
"""How many rollouts a fault's text names; the object has all of them."""


@dataclass(frozen=True, slots=True)
class Culprits:
    """The rollouts that a faulty loss or gradient was computed from."""

    rollouts: tuple[int, ...]
    versions: tuple[tuple[int, int] | None, ...]
    """Of each rollout's sampled tokens, the lowest and the highest; None without a sampled token."""

    def __str__(self) -> str:
        """`rollouts 7 (versions 3-4), 9 (versions 4-4) and 12 more`: what to look up in the run's rollouts."""
        named = [
            f"{rollout} ({'no sampled tokens' if span is None else f'versions {span[0]}-{span[1]}'})"
            for rollout, span in zip(
                self.rollouts[:NAMED_ROLLOUTS], self.versions[:NAMED_ROLLOUTS], strict=True
            )
        ]
        more = len(self.rollouts) - len(named)
        return f"rollouts {', '.join(named)}" + (f" and {more} more" if more else "")


class LearnerFault(RuntimeError):
    """A step that must not be published. It was not counted, and where nothing else is said the weights are those before it.

    Its arguments are what it is made from again when it is pickled, so that it travels from a Ray actor as itself.
    """

    def __init__(self, what: str, culprits: Culprits) -> None:
        super().__init__(what, culprits)
        self.what, self.culprits = what, culprits

    @property
    def rollouts(self) -> tuple[int, ...]:
        return self.culprits.rollouts

    @property
    def versions(self) -> tuple[tuple[int, int] | None, ...]:
        return self.culprits.versions

    def __str__(self) -> str:
        return f"{MARK}{self.what}: {self.culprits}"


class NonFiniteLoss(LearnerFault):
    """A loss or a gradient is NaN or infinite."""


class ExplodingGradient(LearnerFault):
    """A gradient's norm is past the recipe's limits."""


class NonFiniteWeights(LearnerFault):
    """The optimizer step itself made a weight NaN or infinite. The weights are of no use: restore a checkpoint."""


def fault_line(text: str) -> str | None:
    """The line of a traceback, log or message that tells of a fault, from its mark on; None where there is none."""
    for line in text.splitlines():
        start = line.find(MARK)
        if start >= 0:
            return line[start:]
    return None


def culprits_of(batch: Batch, rows: np.ndarray) -> Culprits:
    """Args: rows [n], indices into the batch."""
    starts, spans = batch.sequences.answer_starts, []
    for row in rows:
        of_row = slice(starts[row], starts[row + 1])
        versions = batch.versions[of_row][batch.sampled[of_row]]
        spans.append((int(versions.min()), int(versions.max())) if len(versions) else None)
    return Culprits(tuple(int(batch.rollout_id[row]) for row in rows), tuple(spans))


@dataclass(frozen=True, slots=True)
class NormLimits:
    """0 in `absolute` or `ratio`: no such limit."""

    absolute: float
    ratio: float
    clip: float
    """The norm that gradients are scaled down to."""


@dataclass(slots=True)
class NormHistory:
    """Gradient norms of the last steps that were taken, oldest first."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_NORMS))

    def remember(self, norms: float | Iterable[float]) -> None:
        self.recent.extend([norms] if isinstance(norms, float) else norms)

    def verdict(self, norm: float, limits: NormLimits) -> str | None:
        """Why a gradient of this norm, before clipping, is a fault; None where it is none.

        The ratio's base is the median of the steps before, and at least the norm that gradients are clipped to: steps
        without a signal have next to no gradient, and after them a usual one is no explosion. A norm that is not finite is past any limit.
        """
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        if limits.absolute and norm > limits.absolute:
            return f"gradient norm is {norm:.4g}, past fault_grad_norm = {limits.absolute:g}"
        if not limits.ratio or len(self.recent) < NORMS_BEFORE_A_MEDIAN:
            return None
        median = statistics.median(self.recent)
        base = max(median, limits.clip)
        if norm <= limits.ratio * base:
            return None
        return (
            f"gradient norm is {norm:.4g}, past fault_grad_norm_ratio = {limits.ratio:g} times {base:.4g} "
            f"(median of the {len(self.recent)} steps before: {median:.4g}, max_grad_norm: {limits.clip:g})"
        )


def check_norm(
    name: str, norm: float, history: NormHistory, limits: NormLimits, culprits: Callable[[], Culprits]
) -> None:
    """Raises `NonFiniteLoss` or `ExplodingGradient`, which call the gradient that of `name`."""
    verdict = history.verdict(norm, limits)
    if verdict is not None:
        raise (ExplodingGradient if math.isfinite(norm) else NonFiniteLoss)(f"{name}: {verdict}", culprits())
