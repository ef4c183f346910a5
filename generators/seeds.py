"""Which random numbers a rollout is sampled with in a run that can be made again. Pure. Called by `rollout_life` and engines."""

from __future__ import annotations

import hashlib


def seed_at(run_seed: int, rollout_id: int, context_tokens: int) -> int:
    """For the tokens of a rollout behind a context (prompt and answer so far) of that length: 63 bits.

    The length is in it because whoever goes on from a prefix begins with fresh random numbers: with those that the first
    tokens were drawn from, the same draws would come again in the middle of the answer.
    """
    digest = hashlib.blake2b(f"{run_seed}/{rollout_id}/{context_tokens}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
