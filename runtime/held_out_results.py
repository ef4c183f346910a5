"""From the answers to held-out prompts to an `Evaluation`. Pure. Called by `held_out`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from asyncrl.generators.estimates import Estimate, maj_at_k, over_prompts, pass_at_k
from asyncrl.generators.evaluation import NO_VERSION, HeldOutAnswer
from asyncrl.generators.evaluation_config import EvaluationConfig
from asyncrl.runtime.facts import Evaluation

Answers = Sequence[HeldOutAnswer]


class NothingScored(RuntimeError):
    """The environment or the reward failed on every answer: that says nothing of the model."""


def evaluation_of(
    config: EvaluationConfig, answers: Sequence[Answers], *, step: int, seconds: float, took_s: float
) -> Evaluation:
    """`answers` [prompts][rollouts_per_prompt], at least one prompt. Raises `NothingScored`."""
    every = [answer for row in answers for answer in row]
    failed = [answer for answer in every if answer.failure]
    if len(failed) == len(every):
        raise NothingScored(f"all {len(every)} held-out answers failed, the first with: {failed[0].failure}")
    sampled = [answer for answer in every if answer.newest_version != NO_VERSION]
    right = [[is_right(answer, config.correct_reward) for answer in row] for row in answers]
    finals = [[answer.final for answer in row] for row in answers]

    def mean(of: Callable[[HeldOutAnswer], float]) -> Estimate:
        return over_prompts([sum(map(of, row)) / len(row) for row in answers])

    return Evaluation(
        seconds=seconds,
        step=step,
        version=max(answer.newest_version for answer in sampled),
        oldest_version=min(answer.oldest_version for answer in sampled),
        answers_over_versions=sum(answer.newest_version != answer.oldest_version for answer in sampled),
        prompts=len(answers),
        rollouts_per_prompt=config.rollouts_per_prompt,
        accuracy=mean(lambda answer: float(is_right(answer, config.correct_reward))),
        pass_at={k: over_prompts([pass_at_k(len(row), sum(row), k) for row in right]) for k in config.counts},
        maj_at={
            k: over_prompts([maj_at_k(f, r, k) for f, r in zip(finals, right, strict=True)])
            for k in config.counts
        },
        reward=mean(lambda answer: answer.reward),
        tokens=mean(lambda answer: float(answer.tokens)),
        truncated=mean(lambda answer: float(answer.truncated)),
        failed=len(failed),
        took_s=took_s,
    )


def is_right(answer: HeldOutAnswer, correct_reward: float) -> bool:
    return not answer.failure and answer.reward >= correct_reward


def sentence(found: Evaluation) -> str:
    """One line for whoever watches the run."""
    versions = f"version {found.version}"
    if found.oldest_version != found.version:
        versions = f"versions {found.oldest_version} to {found.version} ({found.answers_over_versions} answers span several)"
    parts = [f"held-out accuracy at step {found.step}, {versions}: {shown(found.accuracy)}"]
    parts += [f"pass@{k} {shown(estimate)}" for k, estimate in found.pass_at.items()]
    parts += [f"maj@{k} {shown(estimate)}" for k, estimate in found.maj_at.items()]
    parts.append(f"{found.prompts} prompts x {found.rollouts_per_prompt}, {found.took_s:.1f} s")
    if found.failed:
        parts.append(f"{found.failed} answers could not be scored and count as wrong")
    return "; ".join(parts)


def shown(estimate: Estimate) -> str:
    """With its standard error, where there is one."""
    error = f" +- {estimate.standard_error:.3f}" if estimate.standard_error >= 0 else ""
    return f"{estimate.value:.3f}{error}"
