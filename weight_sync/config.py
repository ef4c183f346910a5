"""Settings of the way back: how new weights reach the engines."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from asyncrl.weight_sync.topology import Transport

Senders = Literal["one", "all"]


class WeightSyncConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[weight_sync]`."""

    transport: Transport = "auto"
    """`shm`: engines read the learner's shared memory, on one host. `tcp`: they pull it in chunks over ZMQ. `ipc`: they read the
    memory of the GPU that they share with the learner. `collective`: it is broadcast to all of them at once, by NCCL between
    GPUs, else by gloo. `auto` picks by where learner and engines are: `docs/weight_sync.md` has the table."""
    bucket_bytes: Annotated[int, msgspec.Meta(ge=2**12)] = 256 * 2**20
    """What is gathered, sent and checked at once. Sending takes two of them beside the model."""
    senders: Senders = "one"
    """`one`: learner rank 0 sends all. `all`: each learner rank sends the rows that it holds, and nothing is gathered."""
    max_lag_versions: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """How far an engine may be behind while the learner goes on. 0: the learner waits until every engine has the version. From 1
    on each engine takes the newest version when it can, and the learner waits only for one that is further behind. Left out: 1
    where `staleness.max_staleness_versions` is 2 or more and the transport is not `collective`, else 0."""
    delta: bool = True
    """Over `tcp`, send what changed since the version before, bit for bit, where that is less."""
    wire_dtype: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """What weights travel as; the learner casts them before. `auto`: as engines compute. `float8`: Linear weights as float8_e4m3fn
    in blocks of 128 x 128, each with its scale."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    """One sync, from begin to the last engine's confirmation."""
    in_flight: Literal["keep", "recompute", "auto"] = "keep"
    """What becomes of the KV cache of rollouts under way when new weights arrive. `keep`: they go on with it. `recompute`:
    it is computed anew under the new weights. `auto`: by how much is left to sample and how old the cache is."""
    prefix_cache: bool = True
    """Engines reuse the KV cache of a common prefix. Never across versions, whichever `in_flight` is."""
    verify: Literal["first", "always", "never"] = "first"
    """Compare a probe's logprobs between engine and learner before a token of a version leaves the engine: at the first two
    versions that an engine takes (one shows that loading works, the other that replacing does), at each version, or never."""
    verify_tolerance: Annotated[float, msgspec.Meta(gt=0)] = 1e-3
    """Largest |difference| of a probe token's logprob; raise it to about 0.1 for bfloat16 engines."""
