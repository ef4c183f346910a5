"""Settings of checkpoints, as they stand in a recipe."""

from __future__ import annotations

from typing import Annotated

import msgspec


class CheckpointsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[checkpoints]`: what `asyncrl resume` goes on from (`docs/checkpoints.md`)."""

    every_steps: Annotated[int, msgspec.Meta(ge=0)] = 25
    """A checkpoint after each so many learner steps. 0: at the run's end and at an orderly stop alone, where there is one in
    any case."""
    keep: Annotated[int, msgspec.Meta(ge=1)] = 2
    """How many stay; an older one goes when a newer one is whole."""
