"""What a summary keeps of a run's facts while it reads them once, in order. Called by `summary`."""

from __future__ import annotations

import math
from typing import NamedTuple

from asyncrl.runtime.facts import (
    TRAINING,
    BufferFacts,
    Evaluation,
    EvaluationMissed,
    Fact,
    Snapshot,
    StepFacts,
)


class Step(NamedTuple):
    """What a summary needs of one step: a run has few enough of them to keep this much of each."""

    step: int
    reward: float
    rollouts_over_versions: int
    versions_in_rollout_max: int
    tokens_trained: int
    tokens_masked: int
    tokens_past_bound: int
    staleness_mean: float
    staleness_max: int
    mismatch_tokens: int
    mismatch_max: float
    mismatch_mean: float
    mismatch_p95: float
    learner_tokens_per_s: float
    train_s: float
    publish_s: float
    lag_wait_s: float
    engine_stall_s: float


class Totals:
    """Takes facts in one by one."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        self.evaluations = 0
        self.evaluations_missed = 0
        self.buffer = BufferFacts()
        self.held_bytes = 0
        self.waits: dict[str, float] = {}
        self.seconds = 0.0
        self.version = 0
        self.generated = 0.0
        self.generating_s = 0.0
        self._previous: Snapshot | None = None

    def add(self, fact: Fact) -> None:
        self.seconds = max(self.seconds, fact.seconds)
        self.version = max(self.version, fact.version)
        if isinstance(fact, StepFacts):
            self.steps.append(
                Step(fact.step, fact.reward_mean, *(getattr(fact, name) for name in Step._fields[2:]))
            )
        elif isinstance(fact, Snapshot):
            self._add_snapshot(fact)
        elif isinstance(fact, EvaluationMissed):
            self.evaluations_missed += 1
        elif fact.step > 0:
            self.evaluations += 1
            self.after = fact
        elif self.before is None:
            self.evaluations += 1
            self.before = fact

    def _add_snapshot(self, now: Snapshot) -> None:
        self.buffer, self.waits = now.buffer, now.waits
        self.held_bytes = max(self.held_bytes, now.buffer.held_bytes)
        previous, self._previous = self._previous, now
        if previous is None or now.phase != TRAINING or previous.phase != TRAINING:
            return
        span = now.seconds - previous.seconds
        if span > 0 and math.isfinite(now.engine_tokens_per_s):
            self.generated += now.engine_tokens_per_s * span
            self.generating_s += span
