"""What a run came to: `Summary`, made from its recorded facts, kept as `summary.json`.

`summarise` is pure and reads the facts once, in order, so a run of any length is summarised in little memory; it
also works on the facts of a run that failed before its first step. What was not measured is None (`null` in the
file), never 0. The supervisor calls it when a run ends; `summary_table` shows it, the report reads it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from asyncrl.generators.estimates import Estimate
from asyncrl.runtime.facts import PHASES, BufferFacts, Evaluation, Fact
from asyncrl.runtime.summary_totals import Step, Totals

WILSON_Z = 1.959963984540054
"""The normal distribution's 97.5 % point: intervals of 95 %."""


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out accuracy with its 95 % interval (`accuracy_interval`)."""

    step: int
    version: int
    oldest_version: int
    accuracy: float
    """avg@k."""
    low: float
    high: float
    prompts: int
    rollouts_per_prompt: int
    pass_at: dict[int, Estimate]
    maj_at: dict[int, Estimate]
    tokens: float
    """Mean length of an answer."""
    truncated: float
    """Share of answers that their budget ended."""
    failed: int
    """Answers that could not be scored, and count as wrong."""


class Conservation(msgspec.Struct, frozen=True, kw_only=True):
    """Every admitted rollout, by where it ended: admitted = trained + dropped + failed + live."""

    admitted: int
    trained: int
    dropped: dict[str, int]
    failed: dict[str, int]
    live: int
    holds: bool


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """|Engine's logprob - learner's| over tokens of the version that the learner held."""

    tokens: int
    max: float
    mean: float
    p95: float
    """The largest p95 of any step: at least 95 % of all the tokens compared lie at or below it."""
    steps_not_finite: int
    """Steps left out of the figures above because theirs were NaN or infinite: 0 in a sound run."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Mean and maximum of one quantity."""

    mean: float
    max: float


class BufferUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the run asked of its buffer."""

    memory_bytes: int
    """The budget for tokens of live rollouts."""
    held_bytes_max: int
    recoveries: int
    """Processes that died and were started again."""
    quarantined_prompts: int
    drops_by_length_decile: list[int]
    """Dropped rollouts per decile of answer length, the shortest first; empty where none was dropped."""


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a run before it starts."""

    name: str
    model: str
    folder: str
    steps: int
    max_staleness_versions: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run, ended. Rates are tokens per second; times are seconds."""

    run: RunIdentity
    outcome: str
    """`finished`, `stopped`, or `failed: ` and why."""
    steps_done: int
    seconds: float
    """From launch to the last fact."""
    reward_first: float | None
    """Mean reward of the first step; `reward_last` of the last."""
    reward_last: float | None
    held_out_before: Accuracy | None
    held_out_after: Accuracy | None
    evaluations: int
    evaluations_missed: int
    """Due, and left out or given up."""
    versions_published: int
    """Syncs after the first one, which only brings the engines the model that the run starts from."""
    rollouts_trained: int
    rollouts_over_versions: int
    """Trained rollouts with tokens of two or more versions."""
    versions_in_rollout_max: int
    tokens_trained: int
    tokens_masked: int
    tokens_past_bound: int
    """Trained tokens past the staleness bound: 0, or the bound is broken."""
    staleness: Spread | None
    """Over the answer tokens handed to the learner, masked ones included."""
    conservation: Conservation
    buffer: BufferUse
    mismatch: Mismatch | None
    engine_tokens_per_s: float | None
    """Answer tokens of all engines, over the time of the training phase."""
    learner_tokens_per_s: float | None
    """Prompt and answer tokens, over the time in which the learner trained."""
    waits: dict[str, float]
    """Seconds waited by cause."""
    phase_seconds: dict[str, float]
    weight_sync_seconds: Spread | None
    lag_wait_seconds: Spread | None
    """Of them: the learner waited for engines that were `max_lag_versions` behind."""
    engine_stall_seconds: Spread | None
    packages: dict[str, str]


def summarise(
    run: RunIdentity,
    facts: Iterable[Fact],
    *,
    outcome: str,
    phase_seconds: Mapping[str, float],
    packages: Mapping[str, str],
) -> Summary:
    """The summary of one run from its facts in the order of time.

    Conservation is that of the last snapshot: write one when all parts have ended. "Before" is the first evaluation
    at step 0, "after" the last one at a later step. Of steps and rollouts that were done twice (a resumed run) both
    are counted, but `steps_done` is the number of the last step.
    """
    totals = Totals()
    for fact in facts:
        totals.add(fact)
    steps = totals.steps
    return Summary(
        run=run,
        outcome=outcome,
        steps_done=steps[-1].step if steps else 0,
        seconds=totals.seconds,
        reward_first=_finite(steps[0].reward) if steps else None,
        reward_last=_finite(steps[-1].reward) if steps else None,
        held_out_before=_accuracy(totals.before),
        held_out_after=_accuracy(totals.after),
        evaluations=totals.evaluations,
        evaluations_missed=totals.evaluations_missed,
        versions_published=max(0, totals.version),
        rollouts_trained=totals.buffer.trained,
        rollouts_over_versions=sum(step.rollouts_over_versions for step in steps),
        versions_in_rollout_max=max((step.versions_in_rollout_max for step in steps), default=0),
        tokens_trained=sum(step.tokens_trained for step in steps),
        tokens_masked=sum(step.tokens_masked for step in steps),
        tokens_past_bound=sum(step.tokens_past_bound for step in steps),
        staleness=_staleness(steps),
        conservation=conservation(totals.buffer),
        buffer=_buffer_use(totals),
        mismatch=_mismatch(steps),
        engine_tokens_per_s=totals.generated / totals.generating_s if totals.generating_s else None,
        learner_tokens_per_s=_mean([(step.learner_tokens_per_s, step.train_s) for step in steps]),
        waits=totals.waits,
        phase_seconds=_in_order(phase_seconds),
        weight_sync_seconds=_spread([step.publish_s for step in steps]),
        lag_wait_seconds=_spread([step.lag_wait_s for step in steps]),
        engine_stall_seconds=_spread([step.engine_stall_s for step in steps]),
        packages=dict(sorted(packages.items())),
    )


def wilson(share: float, n: float) -> tuple[float, float]:
    """95 % score interval of a proportion of `n` draws (Wilson 1927, JASA 22:209, equation for the limits); (0, 1) if n is 0."""
    if not (0 <= share <= 1 and n >= 0):
        raise ValueError(f"wilson: expected 0 <= share <= 1 and n >= 0, got share={share}, n={n}")
    if n == 0:
        return 0.0, 1.0
    z2 = WILSON_Z**2
    centre = share + z2 / (2 * n)
    half = WILSON_Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def accuracy_interval(evaluation: Evaluation) -> tuple[float, float]:
    """95 % interval of avg@k. Answers to one prompt go together: they count as so many independent ones as would have the
    standard error that was found over prompts (effective sample size; Kish 1965, Survey Sampling, 8.2), at least one for each
    prompt."""
    share, error = evaluation.accuracy.value, evaluation.accuracy.standard_error
    n = float(evaluation.prompts)
    if evaluation.rollouts_per_prompt > 1 and error > 0 and 0 < share < 1:
        n = max(n, min(share * (1 - share) / error**2, n * evaluation.rollouts_per_prompt))
    return wilson(share, n)


def conservation(buffer: BufferFacts) -> Conservation:
    """The ledger's equation, with `holds` worked out from the counts."""
    ended = buffer.trained + sum(buffer.dropped.values()) + sum(buffer.failed.values())
    return Conservation(
        admitted=buffer.admitted,
        trained=buffer.trained,
        dropped=buffer.dropped,
        failed=buffer.failed,
        live=buffer.live,
        holds=buffer.admitted == ended + buffer.live,
    )


def write_summary(summary: Summary, path: Path) -> None:
    """Writes `path` whole: a reader sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    os.replace(partial, path)


def read_summary(path: Path) -> Summary:
    """The summary written to `path`. Raises `ValueError` that names the file if it holds something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summary)
    except msgspec.DecodeError as error:
        raise ValueError(
            f"{path}: expected a run's summary: {error}; was it written by another version of asyncrl?"
        ) from error


def _buffer_use(totals: Totals) -> BufferUse:
    last = totals.buffer
    return BufferUse(
        memory_bytes=last.memory_bytes,
        held_bytes_max=totals.held_bytes,
        recoveries=last.recoveries,
        quarantined_prompts=last.quarantined_prompts,
        drops_by_length_decile=last.drops_by_length_decile,
    )


def _accuracy(evaluation: Evaluation | None) -> Accuracy | None:
    if evaluation is None:
        return None
    low, high = accuracy_interval(evaluation)
    return Accuracy(
        step=evaluation.step,
        version=evaluation.version,
        oldest_version=evaluation.oldest_version,
        accuracy=evaluation.accuracy.value,
        low=low,
        high=high,
        prompts=evaluation.prompts,
        rollouts_per_prompt=evaluation.rollouts_per_prompt,
        pass_at=evaluation.pass_at,
        maj_at=evaluation.maj_at,
        tokens=evaluation.tokens.value,
        truncated=evaluation.truncated.value,
        failed=evaluation.failed,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(pairs: list[tuple[float, float]]) -> float | None:
    """Mean of (value, weight) pairs, those that are not finite or weigh nothing left out; None if none is left."""
    kept = [(value, weight) for value, weight in pairs if math.isfinite(value) and weight > 0]
    if not kept:
        return None
    return sum(value * weight for value, weight in kept) / sum(weight for _, weight in kept)


def _spread(values: list[float]) -> Spread | None:
    finite = [value for value in values if math.isfinite(value)]
    return Spread(mean=sum(finite) / len(finite), max=max(finite)) if finite else None


def _staleness(steps: list[Step]) -> Spread | None:
    mean = _mean([(step.staleness_mean, step.tokens_trained + step.tokens_masked) for step in steps])
    return None if mean is None else Spread(mean=mean, max=max(step.staleness_max for step in steps))


def _mismatch(steps: list[Step]) -> Mismatch | None:
    measured = [step for step in steps if step.mismatch_tokens > 0]
    sound = [
        step
        for step in measured
        if all(map(math.isfinite, (step.mismatch_max, step.mismatch_mean, step.mismatch_p95)))
    ]
    if not measured:
        return None
    return Mismatch(
        tokens=sum(step.mismatch_tokens for step in sound),
        max=max((step.mismatch_max for step in sound), default=0.0),
        mean=_mean([(step.mismatch_mean, step.mismatch_tokens) for step in sound]) or 0.0,
        p95=max((step.mismatch_p95 for step in sound), default=0.0),
        steps_not_finite=len(measured) - len(sound),
    )


def _in_order(phase_seconds: Mapping[str, float]) -> dict[str, float]:
    """Known phases in the order of a run, others after them."""
    known = {name: phase_seconds[name] for name in PHASES if name in phase_seconds}
    return known | {name: value for name, value in phase_seconds.items() if name not in known}
