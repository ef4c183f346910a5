"""Settings of held-out evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0)]


class EvaluationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[evaluation]`: held-out prompts, answered by the run's own engines before, during and after training
    (`docs/evaluation.md`). Fields, template and task settings are those of `[prompts]`."""

    source: str = ""
    """Held-out prompts, named like `prompts.source`; empty: nothing is evaluated."""
    prompts: Positive = 256
    """How many, fewer where the source has fewer."""
    every_steps: NonNegative = 0
    """Also after every so many steps; 0: before the first and after the last alone."""
    rollouts_per_prompt: Positive = 1
    """Answers to each prompt."""
    k: list[Positive] = []
    """Of which k pass@k and maj@k are told; empty: of `rollouts_per_prompt`, where that is more than 1."""
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """0: greedy."""
    max_new_tokens: NonNegative = 0
    """0: `sampling.max_new_tokens`."""
    correct_reward: float = 1.0
    """An answer is right when its reward is at least that."""
    one_version: bool = False
    """The learner waits with its next step until all is answered: every token is of one version. Else an evaluation during
    training goes on across weight updates, as rollouts do, and says which versions answered."""
    slots_per_engine: Positive = 32
    """Answers that an engine works on at once beside its rollouts; `max_concurrency` of its pool while it has none."""
    timeout_s: PositiveSeconds = 1800.0
    """Of one evaluation. Past it the one before training ends the run, any other is given up and noted."""

    @property
    def counts(self) -> list[int]:
        """The k of pass@k and maj@k, ascending."""
        return sorted(set(self.k)) or ([self.rollouts_per_prompt] if self.rollouts_per_prompt > 1 else [])


def broken_evaluation_rules(
    config: EvaluationConfig, max_context_tokens: int
) -> Iterator[tuple[str, str, str]]:
    """(key path, value, way out) of what does not go together. Pure."""
    n = config.rollouts_per_prompt
    if config.k and max(config.k) > n:
        yield (
            "evaluation.k",
            str(config.k),
            f"pass@{max(config.k)} takes at least {max(config.k)} answers to a prompt, and there are {n} "
            "(evaluation.rollouts_per_prompt): lower the one or raise the other",
        )
    if config.temperature == 0 and n > 1:
        yield (
            "evaluation.rollouts_per_prompt",
            str(n),
            "with evaluation.temperature = 0 every answer to a prompt is the same: set 1, or a temperature",
        )
    if config.max_new_tokens >= max_context_tokens:
        yield (
            "evaluation.max_new_tokens",
            str(config.max_new_tokens),
            f"leaves no room for a prompt within model.max_context_tokens = {max_context_tokens}",
        )
