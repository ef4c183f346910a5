"""What the buffer and the learner report, as facts of the run. Pure but for `Waits`, which adds up. Called by `observer`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from asyncrl.buffer import staleness
from asyncrl.buffer.wire import Report
from asyncrl.learner.metrics import StepMetrics
from asyncrl.runtime import facts
from asyncrl.runtime.learner_part import StepOutcome


class Waits:
    """Seconds waited since launch, by cause, from what the buffer's processes counted since they started."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}
        self.mean_s: dict[str, float] = {}
        """Engines wait side by side: their seconds are shared out, so that no cause grows faster than time."""

    def add(self, waits_s: Mapping[str, float], engines: int) -> None:
        """`engines`: how many there are now. A count that went down is that of a process that was started again: it began
        from 0."""
        for cause, seconds in waits_s.items():
            before = self._seen.get(cause, 0.0)
            grown = seconds - before if seconds >= before else seconds
            self._seen[cause] = seconds
            mean = grown / engines if cause == facts.ENGINES_WAIT else grown
            self.mean_s[cause] = self.mean_s.get(cause, 0.0) + mean


def buffer_facts(report: Report, recoveries: int) -> facts.BufferFacts:
    """What the ledger and the memory of all shards report."""
    states, counts = report.states, report.counts
    drops = staleness.drops_by_length_decile(report.lengths, report.dropped_lengths)
    return facts.BufferFacts(
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
        quarantined_prompts=report.quarantined,
        held_bytes=report.held_bytes,
        memory_bytes=report.memory_bytes,
        drops_by_length_decile=drops if any(drops) else [],
        recoveries=recoveries,
    )


def step_facts(
    step: int,
    outcome: StepOutcome,
    waited_s: float,
    seconds: float,
    groups: int,
    checkpoint_stall_s: float,
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
        lag_wait_s=outcome.sync.wait_s,
        checkpoint_stall_s=checkpoint_stall_s,
        engine_stall_s=max(report.max_stall_s for report in outcome.reports),
        learner_tokens_per_s=metrics.tokens_per_s,
        learner={
            "learning_rate": metrics.learning_rate,
            "entropy": metrics.entropy,
            "clip_fraction": metrics.clip_fraction,
            "importance_mean": metrics.importance_mean,
            "importance_capped": metrics.importance_capped,
            **part_figures(metrics),
            "drift_k3": _number(metrics.drift_k3),
            "drift_max": _number(metrics.drift_max),
            "tokens_padded": metrics.tokens_padded,
            "tokens_environment": metrics.tokens_environment,
            "forward_s": metrics.forward_s,
            "backward_s": metrics.backward_s,
            "optimizer_s": metrics.optimizer_s,
            "gather_s": metrics.gather_s,
        },
    )


def part_figures(metrics: StepMetrics) -> dict[str, float]:
    """Of critic, reference and costs, where the objective has them."""
    names = ("value_loss", "critic_grad_norm", "critic_learning_rate", "explained_variance", "kl_reference")
    known = {name: value for name in names if not math.isnan(value := getattr(metrics, name))}
    if not math.isnan(metrics.cost_multiplier):
        known |= {"cost_mean": metrics.cost_mean, "cost_multiplier": metrics.cost_multiplier}
    return known


def _number(value: float) -> float:
    return value if math.isfinite(value) else math.nan
