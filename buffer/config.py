"""Settings of the buffer and of staleness, as they stand in a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]


class BufferConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[buffer]`: the process that holds every rollout of the run."""

    lease_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 120.0
    """A lease without an append or a heartbeat for so long is taken back; its rollout keeps its prefix."""
    max_attempts: Positive = 3
    """How often one rollout may fail before its group is given up and replaced by another prompt."""


class StalenessConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[staleness]`: how old a token may be when the learner gets it."""

    max_staleness_versions: NonNegative = 2
    """Bound on (version at hand-over - version of the token), for every trained token."""
    over_stale: Literal["mask", "wait", "drop"] = "mask"
    """Past the bound: mask the tokens, let the reader wait so that none gets there, or drop the group."""
