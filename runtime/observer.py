"""Turns what the parts report into facts, and hands them to the view and the metrics log.

The supervisor calls it, on its event loop; it decides nothing but whether the run still moves.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from asyncrl.buffer.wire import Report
from asyncrl.generators.evaluation import Evaluation
from asyncrl.recipes import Recipe
from asyncrl.runtime import facts
from asyncrl.runtime.learner_part import StepOutcome
from asyncrl.runtime.metrics import MetricsLog
from asyncrl.runtime.view import View


class RunStalled(RuntimeError):
    """Nothing was generated and no step was made for too long."""


class Observer:
    """`learner_state` is set by the supervisor, which is the one who knows."""

    def __init__(self, recipe: Recipe, view: View, metrics: MetricsLog, began: float) -> None:
        self.learner_state: facts.LearnerState = "starting"
        self.phase_seconds: dict[str, float] = defaultdict(float)
        self._recipe, self._view, self._metrics, self._began = recipe, view, metrics, began
        self._phase = ""
        self._step = 0
        self._version = -1
        self._learner_tokens_per_s = 0.0
        self._engines: list[facts.EngineFacts] = []
        self._waits: dict[str, float] = {}
        self._moved = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows and times a phase; the same name may come again."""
        self._phase = name
        self._view.phase(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self.phase_seconds[name] += time.monotonic() - began

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def note(self, text: str) -> None:
        self._view.note(text)

    def evaluated(self, step: int, parts: list[Evaluation]) -> None:
        rewards = [reward for part in parts for reward in part.rewards]
        fact = facts.Evaluation(
            seconds=self.seconds,
            step=step,
            version=min(part.version for part in parts),
            correct=sum(reward >= 1.0 for reward in rewards),
            prompts=len(rewards),
        )
        self._metrics.write(fact)
        share = fact.correct / fact.prompts
        self._view.note(
            f"held-out accuracy at version {fact.version}: {share:.3f} ({fact.correct}/{fact.prompts})"
        )

    def stepped(self, step: int, outcome: StepOutcome, waited_s: float) -> None:
        self._step, self._version = step, outcome.sync.version
        self._learner_tokens_per_s = outcome.metrics.tokens_per_s
        self._moved = time.monotonic()
        fact = step_facts(step, outcome, waited_s, self.seconds, self._recipe.prompts.prompts_per_step)
        self._metrics.write(fact)
        self._view.step(fact)

    def snapshot(self, report: Report, engines: list[facts.EngineFacts]) -> None:
        self._engines = engines
        self._version = max(self._version, report.version)
        if any(engine.tokens_per_s > 0 for engine in engines):
            self._moved = time.monotonic()
        self.buffer_report(report)

    def buffer_report(self, report: Report) -> None:
        """A snapshot with the engines as they were last seen."""
        fact = self._snapshot(report)
        self._waits = fact.waits
        self._metrics.write(fact)
        self._view.update(fact)

    def check_progress(self, timeout_s: float) -> None:
        """Raises RunStalled with who waits for whom when nothing has moved for `timeout_s`."""
        still_s = time.monotonic() - self._moved
        if still_s <= timeout_s:
            return
        waits = ", ".join(f"{cause} ({seconds:.0f} s)" for cause, seconds in self._waits.items())
        engines = ", ".join(f"{e.engine_id} {e.state} {e.slots_used}/{e.slots} slots" for e in self._engines)
        raise RunStalled(
            f"nothing was generated and no step was made for {still_s:.0f} s (run.stall_timeout_s): {waits}; {engines}"
        )

    def _snapshot(self, report: Report) -> facts.Snapshot:
        states, counts = report.states, report.counts
        return facts.Snapshot(
            seconds=self.seconds,
            phase=self._phase,
            step=self._step,
            steps=self._recipe.run.steps,
            version=self._version,
            engines=self._engines,
            buffer=facts.BufferFacts(
                queued=states["queued"],
                leased=states["leased"],
                complete=states["complete"],
                scored=states["scored"],
                batched=states["batched"],
                trained=counts.trained,
                dropped=counts.dropped,
                failed=counts.failed,
                admitted=counts.admitted,
                held_groups=report.held_groups,
                capacity_groups=report.held_groups + report.capacity_groups,
            ),
            learner_state=self.learner_state,
            learner_tokens_per_s=self._learner_tokens_per_s,
            engine_tokens_per_s=sum(engine.tokens_per_s for engine in self._engines),
            waits=self._mean_waits(report.waits_s),
        )

    def _mean_waits(self, waits_s: dict[str, float]) -> dict[str, float]:
        """Engines wait side by side: their seconds are shared out, so that no cause grows faster than time."""
        engines = max(1, self._recipe.engines)
        return {cause: s / engines if cause == facts.ENGINES_WAIT else s for cause, s in waits_s.items()}


def step_facts(
    step: int, outcome: StepOutcome, waited_s: float, seconds: float, groups: int
) -> facts.StepFacts:
    """One step's record from what rank 0 reported."""
    selection, batch, metrics = outcome.selection, outcome.handover, outcome.metrics
    return facts.StepFacts(
        step=step,
        version=outcome.sync.version,
        seconds=seconds,
        reward_mean=metrics.reward_mean,
        loss=metrics.loss,
        grad_norm=metrics.grad_norm,
        response_tokens_mean=metrics.response_length_mean,
        response_tokens_max=int(metrics.response_length_max),
        rollouts=len(selection.rollout_ids),
        rollouts_over_versions=batch.spanning_rollouts,
        versions_in_rollout_max=batch.versions_in_rollout_max,
        groups_without_spread=round(metrics.groups_without_signal * groups),
        staleness_min=batch.staleness_min,
        staleness_mean=batch.staleness_mean,
        staleness_max=batch.staleness_max,
        staleness_in_flight_mean=selection.in_flight_mean,
        staleness_in_queue_mean=selection.in_queue_mean,
        tokens_trained=batch.trained_tokens,
        tokens_masked=selection.tokens - batch.trained_tokens,
        tokens_past_bound=batch.tokens_past_bound,
        mismatch_tokens=int(metrics.mismatch_tokens),
        mismatch_max=metrics.mismatch_max,
        mismatch_mean=metrics.mismatch_mean,
        mismatch_p95=metrics.mismatch_p95,
        mismatch_kl=metrics.mismatch_k3,
        wait_s=waited_s,
        train_s=outcome.train_s,
        publish_s=outcome.publish_s,
        engine_stall_s=outcome.sync.max_stall_s,
        learner_tokens_per_s=metrics.tokens_per_s,
        learner={
            "learning_rate": metrics.learning_rate,
            "entropy": metrics.entropy,
            "clip_fraction": metrics.clip_fraction,
            "importance_mean": metrics.importance_mean,
            "importance_capped": metrics.importance_capped,
            "drift_k3": _number(metrics.drift_k3),
            "drift_max": _number(metrics.drift_max),
            "tokens_padded": metrics.tokens_padded,
            "forward_s": metrics.forward_s,
            "backward_s": metrics.backward_s,
            "optimizer_s": metrics.optimizer_s,
            "gather_s": metrics.gather_s,
        },
    )


def _number(value: float) -> float:
    return value if math.isfinite(value) else math.nan
