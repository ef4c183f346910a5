"""Walks the prompt frontier into the buffer, as fast as the staleness bound allows and no faster.

Called by the supervisor, on its event loop.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from asyncrl.buffer import BufferClient
from asyncrl.buffer.columns import list_array
from asyncrl.buffer.schema import PROMPTS, TOKENS
from asyncrl.generators.prompts import Frontier, Prompt

_WAIT_S = 5.0


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


async def feed(buffer: BufferClient, frontier: Frontier) -> None:
    """Waits for the buffer to have room, admits as many prompts, and again; ends when cancelled."""
    while True:
        room = await buffer.capacity(_WAIT_S)
        if room:
            await buffer.admit(prompt_rows(frontier.take(room)))
