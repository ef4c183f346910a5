"""The bucket plan: which bytes travel together, in which order. Pure, and the same on every rank.

A plan is derived once from the names, dtypes and shapes of the parameters as they will be sent (checkpoint names,
wire dtype), so sender and receiver never negotiate. Called by the learner (gather order) and by every receiver.

Invariants of `make_plan`: the order of the tensors is the order given; every tensor starts at a multiple of
`ALIGNMENT`; no two overlap; a bucket is no larger than `bucket_bytes` unless it holds one tensor that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

ALIGNMENT: Final = 64
"""Bytes. A cache line, and enough for every dtype and for vectorised copies."""

DTYPE_BYTES: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""Bytes per element of the dtypes that may travel."""


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


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """Says that the tensors are a LoRA adapter's, in the names of peft's adapter folders, to be put on a base that engines
    have: W x + alpha / rank B (A x)."""

    rank: int
    alpha: float


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Every bucket of one model, in sending order."""

    buckets: tuple[Bucket, ...]
    total_bytes: int
    adapter: Adapter | None = None
    """None: the tensors are the whole model, in checkpoint names."""


def make_plan(
    specs: Sequence[tuple[str, str, Sequence[int]]], bucket_bytes: int, adapter: Adapter | None = None
) -> Plan:
    """Lay the tensors `(name, dtype name, shape)` out in the order given and cut them into buckets.

    A tensor begins a new bucket when it would take the present one past `bucket_bytes`. Raises `ValueError` for no
    tensors, a name given twice, an unknown dtype, a negative dimension, or `bucket_bytes` below 1.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes: expected at least 1, got {bucket_bytes}")
    if not specs:
        raise ValueError("a plan of no tensors: expected at least one parameter to send, got none")
    buckets: list[Bucket] = []
    pending: list[TensorSpec] = []
    for tensor in _laid_out(specs):
        if pending and tensor.offset + tensor.size - pending[0].offset > bucket_bytes:
            buckets.append(_bucket(len(buckets), pending))
            pending = []
        pending.append(tensor)
    buckets.append(_bucket(len(buckets), pending))
    total_bytes = buckets[-1].start + buckets[-1].size
    return Plan(buckets=tuple(buckets), total_bytes=total_bytes, adapter=adapter)


def _laid_out(specs: Sequence[tuple[str, str, Sequence[int]]]) -> Iterator[TensorSpec]:
    offset = 0
    seen: set[str] = set()
    for name, dtype, shape in specs:
        if name in seen:
            raise ValueError(f"tensor {name!r} is given twice: tied parameters are sent once, under one name")
        seen.add(name)
        size = _tensor_bytes(name, dtype, shape)
        yield TensorSpec(name=name, dtype=dtype, shape=tuple(shape), offset=offset, size=size)
        offset = -(-(offset + size) // ALIGNMENT) * ALIGNMENT


def _tensor_bytes(name: str, dtype: str, shape: Sequence[int]) -> int:
    if dtype not in DTYPE_BYTES:
        raise ValueError(
            f"tensor {name!r}: unknown dtype {dtype!r}, expected one of {', '.join(DTYPE_BYTES)}"
        )
    if any(length < 0 for length in shape):
        raise ValueError(f"tensor {name!r}: expected dimensions of at least 0, got shape {tuple(shape)}")
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _bucket(index: int, tensors: list[TensorSpec]) -> Bucket:
    start = tensors[0].offset
    end = tensors[-1].offset + tensors[-1].size
    return Bucket(index=index, start=start, size=end - start, tensors=tuple(tensors))
