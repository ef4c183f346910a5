"""Settings of the way back: how new weights reach the engines."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class WeightSyncConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[weight_sync]`."""

    transport: Literal["auto", "shm"] = "auto"
    """`shm`: through shared memory of one host. `auto` picks by where learner and engines were placed."""
    bucket_bytes: Annotated[int, msgspec.Meta(ge=1)] = 256 * 2**20
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    """One sync, from begin to the last engine's confirmation."""
    in_flight: Literal["keep", "recompute", "auto"] = "keep"
    """What becomes of the KV cache of rollouts under way when new weights arrive. `keep`: they go on with it. `recompute`:
    it is computed anew under the new weights. `auto`: by how much is left to sample and how old the cache is."""
    prefix_cache: bool = True
    """Engines reuse the KV cache of a common prefix. Never across versions, whichever `in_flight` is."""
    verify: Literal["first", "always", "never"] = "first"
    """Compare a probe's logprobs between engine and learner: after the first two versions, each version, or never.
    (Version 0 shows that loading works, version 1 that replacing does.)"""
    verify_tolerance: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    """Largest |difference| of a probe token's logprob; raise it to about 0.1 for bfloat16 engines."""
