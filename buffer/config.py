"""Settings of the buffer and of staleness, as they stand in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]


class FullGroups(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="full"):
    """`{ type = "full" }`: a group is complete when each of its rollouts is scored."""

    @property
    def spare_rollouts_per_prompt(self) -> int:
        return 0


class FirstKGroups(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="first_k"):
    """`{ type = "first_k", spare_rollouts_per_prompt = 2 }`: more rollouts are sampled than a group needs, and the
    first `rollouts_per_prompt` that are scored make it; the rest are dropped as surplus.

    No straggler holds a group up, and a failed rollout has a stand-in. It favours short answers: prefer `full` where
    length and reward go together.
    """

    spare_rollouts_per_prompt: Positive


class BufferConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[buffer]`: the processes that hold every rollout of the run."""

    lease_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    """A lease without an append or a heartbeat for so long is taken back; its rollout keeps its prefix."""
    max_attempts: Positive = 3
    """How often one rollout may fail before it is given up. A prompt whose group cannot be filled any more is
    quarantined for the rest of the run and replaced by another."""
    group_policy: FullGroups | FirstKGroups = msgspec.field(default_factory=FullGroups)
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal (they have no advantage) and sample others instead, as DAPO does."""
    shards: Positive = 1
    """Processes that groups are dealt out to. One carries tens of thousands of rollouts per second."""
    memory_bytes: Annotated[int, msgspec.Meta(ge=2**20)] = 2 * 2**30
    """Budget for the tokens and logprobs of live rollouts (8 bytes a token), over all shards. They lie in the log's files:
    in the page cache as far as the system has memory, else on disk. At this size leases are held back for all groups but
    those that the next batch needs; what engines hold already is taken in any case."""
    durability: Literal["os", "fsync"] = "os"
    """Before a request is answered its rows are with the operating system ("os": survives the death of every process)
    or on the disk ("fsync": survives the loss of power too)."""
    rotate_bytes: Annotated[int, msgspec.Meta(ge=2**16)] = 512 * 2**20
    """Size at which a new file of the log is begun; what a recovery reads again at most."""
    keep_log: Literal["all", "needed"] = "all"
    """Keep every rollout of the run for inspection, or only the files that live rollouts or a checkpoint need."""


class StalenessConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[staleness]`: how old a token may be when the learner gets it."""

    max_staleness_versions: NonNegative = 2
    """Bound on (version at hand-over - version of the token), for every trained token."""
    over_stale: Literal["mask", "wait", "drop"] = "mask"
    """Past the bound: mask the tokens, let the reader wait so that none gets there, or drop the group."""
