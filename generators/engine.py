"""What the dispatcher asks of an inference engine: the one interface behind which vLLM and the fake engine stand.

Invariants that `tests/contract` holds every engine to:
- `generate` yields each sampled token exactly once, in order, with the logprob under the distribution it was sampled
  from (temperature applied) and the version of the weights that sampled it, stamped by the engine.
- The last chunk, and only the last, carries a finish reason. `abort` ends a stream with the tokens sampled so far, and
  before a stream raises `EngineDead` it yields what the engine had sent by then.
- `apply` takes new weights between two decode steps; requests in flight go on, with their KV cache or with one computed
  anew, as the engine's `in_flight` policy says (`in_flight`). Their callers see no more of it than the versions.
- A request admitted after `apply(v)` never reads KV that other weights than v wrote.
Called from one event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

import msgspec

from asyncrl.weight_sync.receiver import WeightTarget

FinishReason = Literal["stop", "length", "abort"]


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout, or what is left of it. `tokens` is the prompt and every token of the answer so far."""

    request_id: str
    tokens: list[int]
    max_new_tokens: int
    temperature: float
    """0 is greedy (baselines): the likeliest token each time; logprobs are then those of temperature 1."""
    stop_token_ids: tuple[int, ...]
    answered_tokens: int = 0
    """How many of `tokens` at their end were sampled of this turn before; tells how much is to be expected yet."""
    seed: tuple[int, int] | None = None
    """(seed of the run, rollout): the tokens are to be the same ones each time (`seeds`). None: chance, as the engine draws it."""
    chunk_tokens: int = 1
    """The stream may hold tokens back until so many are there: whoever wants few large chunks saves time."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Newly sampled tokens of one request. The three lists are of one length, which may be 0 in the last chunk."""

    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: FinishReason | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine says of itself; counts since it started."""

    version: int
    """-1 before the first weights."""
    running: int
    """Requests that the engine has, waiting ones included."""
    waiting: int
    """Requests of these that compute nothing now, for lack of KV cache or of a place in the batch."""
    generated_tokens: int
    preemptions: int
    """How often a request lost its KV cache for lack of room, and had it computed anew later."""
    kv_capacity_tokens: int
    """Tokens that the KV cache holds."""
    kv_free_tokens: int
    """Tokens that fit in beside those of the requests at work; an idle prefix cache counts as free."""
    kv_used_fraction: float
    update_stall_s: float
    """Total time in which no decode step ran because of weight updates."""
    stale_kv: int
    """Running requests that go on with KV cache which older weights than the present ones wrote."""
    recomputed: int
    """How often an update made a running request's KV cache anew (`in_flight`)."""


class Engine(WeightTarget, Protocol):
    """`WeightTarget` (stage, apply, discard, probe) is how weights come in; the rest is how tokens come out."""

    async def start(self) -> None:
        """Load the model. Weights are undefined until the first `apply`; `generate` raises until then."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]: ...

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Ends these streams with finish reason `abort`; unknown ids are ignored (they may just have finished)."""

    def stats(self) -> EngineStats: ...

    async def shutdown(self) -> None:
        """Ends every process of the engine. Streams still open raise `EngineDead`."""


class EngineDead(RuntimeError):
    """The engine cannot go on; its rollouts must be continued elsewhere."""
