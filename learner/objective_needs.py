"""What an objective needs, and the rules that its settings break with the rest of a recipe. Pure; no torch.

Called by `recipes.recipe` (every rule) and by `step` and `training` (which parts to load, which logprobs to compute).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from asyncrl.learner.objective_config import (
    DAPO,
    PPO,
    VAPO,
    Decoupled,
    Masked,
    NoCorrection,
    Objective,
    ReMax,
)

Logprobs = Literal["behaviour", "proximal", "current", "reference"]
Part = Literal["critic", "greedy rollouts", "reference model", "costs"]
Rule = tuple[str, str, str]
"""Key path within the recipe, what was found there, advice."""

HERE = "learner.objective"


class Needs(msgspec.Struct, frozen=True):
    """What must be there for an objective's loss."""

    logprobs: frozenset[Logprobs]
    parts: frozenset[Part]
    entropy: bool
    """The entropy of each token's distribution, with its gradient."""
    early_proximal: bool
    """Proximal logprobs of the whole batch before the first minibatch's own pass: advantages are made of them."""
    several_rollouts: bool
    """At least two rollouts of each prompt."""


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of the rest of the recipe."""

    max_staleness_versions: int
    rollouts_per_prompt: int
    dynamic_sampling: bool
    max_new_tokens: int
    steps: int | None = None
    """Learner steps of the run."""
    critic_warmup_steps: int | None = None
    """None without `[learner.critic]`."""
    reference: bool = False
    """There is a `[learner.reference]`."""


def needs_of(objective: Objective) -> Needs:
    correction = objective.correction
    logprobs: set[Logprobs] = {"current"}
    if not isinstance(correction, NoCorrection):
        logprobs.add("behaviour")
    if not (isinstance(correction, Decoupled) and correction.proximal == "interpolated"):
        logprobs.add("proximal")
    parts: set[Part] = set()
    if isinstance(objective, PPO | VAPO):
        parts.add("critic")
    if isinstance(objective, ReMax):
        parts.add("greedy rollouts")
    if objective.kl is not None:
        parts.add("reference model")
        logprobs.add("reference")
    in_reward = objective.kl is not None and objective.kl.place == "reward"
    if in_reward:
        logprobs.add("proximal")
    if objective.cost is not None:
        parts.add("costs")
    return Needs(
        logprobs=frozenset(logprobs),
        parts=frozenset(parts),
        entropy=objective.entropy_bonus > 0,
        early_proximal=in_reward,
        several_rollouts=objective.compares_rollouts,
    )


def name_of(objective: Objective) -> str:
    """As the recipe writes it."""
    return str(objective.__struct_config__.tag)


def broken_rules(objective: Objective, around: Surroundings) -> Iterator[Rule]:
    """Every rule that the objective breaks, by itself or with the rest of the recipe."""
    yield from _correction_rules(objective, around)
    yield from _aggregation_rules(objective, around)
    yield from _sampling_rules(objective, around)
    yield from _part_rules(objective, around)
    if objective.kl is not None and objective.kl.estimator == "k1" and objective.kl.place == "loss":
        yield (
            f"{HERE}.kl.estimator",
            '"k1"',
            'has a gradient of mean 0 in the loss and holds nothing back: use "k2" or "k3", or place = "reward"',
        )


def _part_rules(objective: Objective, around: Surroundings) -> Iterator[Rule]:
    parts, warmup = needs_of(objective).parts, around.critic_warmup_steps
    if warmup is not None and "critic" not in parts:
        yield (
            "learner.critic",
            "",
            f'objective `{name_of(objective)}` has no critic: leave it out, or use type = "ppo" or "vapo"',
        )
    elif warmup is not None and around.steps is not None and warmup >= around.steps:
        yield (
            "learner.critic.warmup_steps",
            str(warmup),
            f"the policy would never train: the run has {around.steps} steps; set fewer",
        )
    if around.reference and "reference model" not in parts:
        yield (
            "learner.reference",
            "",
            "nothing is compared with it, as the objective has no `kl`: leave it out, or set learner.objective.kl",
        )


def _correction_rules(objective: Objective, around: Surroundings) -> Iterator[Rule]:
    correction, bound = objective.correction, around.max_staleness_versions
    if isinstance(correction, NoCorrection) and bound > 0:
        yield (
            f"{HERE}.correction",
            '{ type = "none" }',
            f"an asynchronous run trains tokens of up to {bound} versions ago, and nothing would tell the loss that another "
            'policy sampled them: use "truncated", "masked" or "decoupled", or set staleness.max_staleness_versions = 0',
        )
    if isinstance(correction, Masked) and not correction.low <= 1 <= correction.high:
        yield (
            f"{HERE}.correction",
            f"low {correction.low:g}, high {correction.high:g}",
            "masks tokens on which engine and learner agree, whose ratio is 1: set low <= 1 <= high",
        )


def _aggregation_rules(objective: Objective, around: Surroundings) -> Iterator[Rule]:
    if objective.aggregation == "fixed_divisor" and objective.divisor_tokens is None:
        yield (
            f"{HERE}.divisor_tokens",
            "",
            'is missing; aggregation = "fixed_divisor" divides by it: set the same number for all runs that you compare, '
            f"such as sampling.max_new_tokens = {around.max_new_tokens}",
        )
    if objective.aggregation != "fixed_divisor" and objective.divisor_tokens is not None:
        yield (
            f"{HERE}.divisor_tokens",
            str(objective.divisor_tokens),
            f'is for aggregation = "fixed_divisor" only, and it is "{objective.aggregation}": set the one or leave out the other',
        )


def _sampling_rules(objective: Objective, around: Surroundings) -> Iterator[Rule]:
    name, count, overlong = name_of(objective), around.rollouts_per_prompt, objective.overlong
    if needs_of(objective).several_rollouts and count < 2:
        yield (
            "prompts.rollouts_per_prompt",
            str(count),
            f"objective `{name}` compares the rollouts of one prompt: set at least 2, or use `reinforce_pp`, which does not",
        )
    if isinstance(objective, DAPO) and not around.dynamic_sampling:
        yield (
            f"{HERE}.type",
            '"dapo"',
            'samples dynamically: set buffer.dynamic_sampling = true, or type = "grpo", which is the same loss without it',
        )
    if overlong is not None and overlong.free_tokens >= around.max_new_tokens:
        yield (
            f"{HERE}.overlong.free_tokens",
            str(overlong.free_tokens),
            f"no answer is longer than sampling.max_new_tokens = {around.max_new_tokens}, so nothing would ever be punished: "
            "set less",
        )
