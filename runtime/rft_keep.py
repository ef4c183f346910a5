"""Which sampled answers are imitated. Pure. Called by `rft`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from asyncrl.generators.prompts import permuted
from asyncrl.recipes.rft_config import RFTConfig


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One scored rollout."""

    rollout_id: int
    prompt_id: str
    prompt_tokens: Sequence[int]
    tokens: Sequence[int]
    """The whole answer, with the token that ended it."""
    sampled: Sequence[bool]
    """Of each of `tokens`: whether the model said it; the others are the environment's and are not imitated."""
    reward: float
    finish_reason: str


def kept(samples: Iterable[Sample], config: RFTConfig) -> list[Sample]:
    """Those that ended by themselves and score, different ones alone, at most `max_per_prompt` of a prompt.

    The order is that of prompt ids and answers: whatever order they were sampled in, the same samples give the same list.
    """
    good: dict[str, dict[tuple[int, ...], Sample]] = defaultdict(dict)
    for sample in sorted(samples, key=lambda sample: sample.rollout_id):
        if sample.finish_reason == "stop" and sample.reward >= config.min_reward and any(sample.sampled):
            good[sample.prompt_id].setdefault(tuple(sample.tokens), sample)
    chosen = []
    for prompt_id in sorted(good):
        answers = [good[prompt_id][tokens] for tokens in sorted(good[prompt_id])]
        chosen += _choose(answers, prompt_id, config)
    return chosen


def _choose(answers: list[Sample], prompt_id: str, config: RFTConfig) -> list[Sample]:
    if len(answers) <= config.max_per_prompt:
        return answers
    if config.choose == "shortest":
        return sorted(answers, key=lambda answer: len(answer.tokens))[: config.max_per_prompt]
    key = f"{config.seed}/{prompt_id}"
    places = sorted(permuted(i, len(answers), key) for i in range(config.max_per_prompt))
    return [answers[place] for place in places]
