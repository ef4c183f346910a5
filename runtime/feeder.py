"""Walks the prompt frontier into the buffer, as fast as the staleness bound allows and no faster.

Called by the supervisor, on its event loop.
"""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa

from asyncrl.buffer import BufferClient
from asyncrl.buffer.columns import list_array
from asyncrl.buffer.schema import PROMPTS, TOKENS
from asyncrl.generators.prompts import Frontier, Prompt

logger = logging.getLogger(__name__)

_WAIT_S = 5.0
_MOST_PASSED_OVER = 1000


def prompt_rows(prompts: list[Prompt]) -> pa.RecordBatch:
    """`schema.PROMPTS` rows."""
    return pa.record_batch(
        [
            pa.array([p.prompt_id for p in prompts], pa.string()),
            list_array([np.asarray(p.tokens, np.int32) for p in prompts], TOKENS),
            pa.array([p.payload for p in prompts], pa.string()),
        ],
        schema=PROMPTS,
    )


class NoPromptFits(RuntimeError):
    """Prompt after prompt leaves no room for an answer."""


def take_fitting(frontier: Frontier, count: int, longest_tokens: int) -> list[Prompt]:
    """The next `count` prompts of at most `longest_tokens`; longer ones are passed over, and logged."""
    taken: list[Prompt] = []
    passed_over = 0
    # Ends with enough prompts, or when far more than could be chance do not fit.
    while len(taken) < count:
        for prompt in frontier.take(count - len(taken)):
            if len(prompt.tokens) <= longest_tokens:
                taken.append(prompt)
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
    """Waits for the buffer to have room, admits as many prompts, and again; ends when cancelled."""
    while True:
        room = await buffer.capacity(_WAIT_S)
        if room:
            await buffer.admit(prompt_rows(take_fitting(frontier, room, longest_tokens)))
