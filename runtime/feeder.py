"""Walks the prompt frontier into the buffer, as fast as the staleness bound allows and no faster.

Invariants:
- A prompt's position is its place in the walk, and positions only rise. The next shard's prompts are drawn when the one
  before has acknowledged its own, so whatever lies before the buffer's frontier was admitted or passed over: a run that
  goes on begins there and asks for nothing twice.
- A prompt that is too long, or that the buffer refuses (quarantined), is passed over, and another takes its place.
Called by the supervisor, on its event loop.
"""

from __future__ import annotations

import logging

from asyncrl.buffer import BufferClient, PromptRow
from asyncrl.generators.prompts import Frontier

logger = logging.getLogger(__name__)

_WAIT_S = 5.0
_MOST_PASSED_OVER = 1000


class NoPromptFits(RuntimeError):
    """Prompt after prompt cannot be used."""


def take_fitting(frontier: Frontier, count: int, longest_tokens: int) -> list[PromptRow]:
    """The next `count` prompts of at most `longest_tokens`; longer ones are passed over, and logged."""
    taken: list[PromptRow] = []
    passed_over = 0
    # Ends with enough prompts, or when far more than could be chance do not fit.
    while len(taken) < count:
        first = frontier.cursor
        for position, prompt in enumerate(frontier.take(count - len(taken)), first):
            if len(prompt.tokens) <= longest_tokens:
                taken.append(
                    PromptRow(
                        prompt_id=prompt.prompt_id,
                        tokens=prompt.tokens,
                        payload=prompt.payload,
                        position=position,
                    )
                )
                continue
            passed_over += 1
            logger.warning(
                "passed over prompt %s: %d tokens, %d fit",
                prompt.prompt_id,
                len(prompt.tokens),
                longest_tokens,
            )
        if passed_over > _MOST_PASSED_OVER:
            raise NoPromptFits(
                f"{passed_over} prompts in a row have more than {longest_tokens} tokens (model.max_context_tokens - "
                "sampling.max_new_tokens): raise the one or lower the other"
            )
    return taken


async def feed(buffer: BufferClient, frontier: Frontier, longest_tokens: int) -> None:
    """Waits for a shard to have room, admits as many prompts, and again, from the buffer's frontier on.

    Ends when cancelled, or with NoPromptFits or one of the buffer's errors.
    """
    frontier.go_to((await buffer.status()).frontier)
    refused = 0
    while True:
        for shard, room in enumerate(await buffer.capacity(_WAIT_S)):
            if not room:
                continue
            prompts = take_fitting(frontier, room, longest_tokens)
            done = await buffer.admit(shard, prompts)
            refused = 0 if done.admitted else refused + done.passed_over
            if refused > _MOST_PASSED_OVER:
                raise NoPromptFits(
                    f"{refused} prompts in a row, the last {prompts[-1].prompt_id}, are quarantined: each failed "
                    "buffer.max_attempts times before (asyncrl inspect shows why); repair the reward or the prompts"
                )
