"""The bucket plan: which bytes travel together, in which order. Pure, and the same on every rank.

A plan is derived once from the names, dtypes and shapes of the parameters as they will be sent (checkpoint names,
wire dtype), so sender and receiver never negotiate. Called by the learner (gather order) and by every receiver.
"""

from __future__ import annotations

import msgspec


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor on the wire: contiguous, row-major, little-endian."""

    name: str
    dtype: str
    """A torch dtype's name without the `torch.`: `float32`, `bfloat16`, ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the version's bytes."""
    size: int
    """Bytes."""


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive tensors; one checksum covers the bytes [start, start + size)."""

    index: int
    start: int
    size: int
    tensors: tuple[TensorSpec, ...]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Every bucket of one model, in sending order."""

    buckets: tuple[Bucket, ...]
    total_bytes: int
