"""What a learner sends, as whole tensors: its pieces put together as engines do."""

from __future__ import annotations

import torch

from asyncrl.learner.step import Learner
from asyncrl.weight_sync.pieces import whole
from asyncrl.weight_sync.plan import Plan


def gathered(learner: Learner, plan: Plan) -> dict[str, torch.Tensor]:
    """Every tensor of `plan` by name, on the host, in the wire dtype; empty on a rank that does not send. A collective."""
    version = torch.zeros(plan.total_bytes, dtype=torch.uint8)
    if not write_version(version, learner, plan):
        return {}
    return {spec.name: whole(version, spec) for spec in plan.tensors}


def write_version(version: torch.Tensor, learner: Learner, plan: Plan) -> int:
    """Puts what this rank sends to its place in `version`, and returns how many pieces that was. A collective."""
    written = 0
    for bucket in plan.buckets:
        for piece, values in zip(bucket.pieces, learner.gather(plan, bucket), strict=False):
            dtype = getattr(torch, plan.tensors[piece.tensor].dtype)
            assert values.shape == (piece.count,)
            version[piece.offset : piece.offset + piece.size].view(dtype).copy_(values)
            written += 1
    return written
