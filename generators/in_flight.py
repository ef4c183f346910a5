"""What becomes of the KV cache of running requests when new weights arrive: which of them have it computed anew. Pure.

`keep` costs nothing, and what is sampled later is sampled by new weights over old keys. `recompute` prefills every running
request's tokens again. `auto` weighs the two for each request, in decoded tokens:

    cost = prefix_tokens * PREFILL_SHARE
    gain = expected_tokens * min(1, drift * LOSS_PER_VERSION)        recompute where gain >= cost

`prefix_tokens` are to be prefilled, `drift` is the count of versions since the cache was begun. `expected_tokens`, still to be
sampled, comes from the mean length m of the answers that this engine finished: m - a for a request that has a < m/2 tokens,
and a for one that has more (whatever has lasted that long tends to last as long again: lengths have long tails), never more
than its budget has left. So young requests and long ones with far to go are recomputed, and those near their end are not.

Both shares are choices, not measurements. Called by the engines, on their event loop.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

InFlight = Literal["keep", "recompute", "auto"]

PREFILL_SHARE: Final = 1 / 32
"""Time of a prefilled token over that of a decoded one: decoding is bound by memory, and a prefill is not."""
LOSS_PER_VERSION: Final = 0.05
"""Share of a token's worth for training that each version of age of its KV cache costs."""
_WEIGHT: Final = 1 / 64
"""Of the newest answer in the running mean of lengths."""


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One running request at the moment of an update."""

    prefix_tokens: int
    """Prompt and answer so far: what a recomputation prefills."""
    answered_tokens: int
    """Of them the answer (of this turn)."""
    left_tokens: int
    """Budget that is left."""
    drift_versions: int
    """The version that arrives minus the one under which the KV cache was begun."""


class AnswerLengths:
    """Running mean of the lengths of finished answers, the recent ones weighing most."""

    def __init__(self) -> None:
        self.mean_tokens: float | None = None
        self._weight = 1.0

    def add(self, tokens: int) -> None:
        self._weight = (
            max(_WEIGHT, self._weight / (1 + self._weight)) if self.mean_tokens is not None else 1.0
        )
        before = self.mean_tokens or 0.0
        self.mean_tokens = before + self._weight * (tokens - before)


def expected_tokens(facts: RequestFacts, mean_tokens: float | None) -> float:
    """Tokens that the request is likely to sample yet; its whole budget while no answer has finished."""
    if mean_tokens is None:
        return facts.left_tokens
    return min(facts.left_tokens, max(mean_tokens - facts.answered_tokens, facts.answered_tokens))


def is_recomputed(policy: InFlight, facts: RequestFacts, mean_tokens: float | None) -> bool:
    """Whether the request's KV cache is computed anew under the arriving weights."""
    if policy != "auto":
        return policy == "recompute"
    cost = facts.prefix_tokens * PREFILL_SHARE
    return expected_tokens(facts, mean_tokens) * min(1.0, facts.drift_versions * LOSS_PER_VERSION) >= cost
