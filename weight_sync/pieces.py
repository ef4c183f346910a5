"""Tensors and the pieces that a plan cuts them into: both ways, as views. Called by the learner, by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
import xxhash

from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.plan import DTYPE_BYTES, Bucket, Piece, Plan, TensorSpec

PART_BYTES: Final = 2 * 2**20
"""What is written before it is summed. So much is still in the processor's cache then: measured at 988 MB in bfloat16, writing
and summing take 1.15 times the copy alone, against 1.45 with a second pass over the whole bucket; 256 KiB costs more calls than
it saves."""


def cut(plan: Plan, bucket: Bucket, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The pieces of `bucket`, each flat, in the plan's order, of whole tensors by name; tensors of other buckets are ignored.

    Views where the tensors are contiguous; no cast. Raises `WeightSyncError` for one that is missing or of another shape.
    """
    found = []
    for piece in bucket.pieces:
        spec = plan.tensors[piece.tensor]
        if spec.name not in tensors:
            raise WeightSyncError(
                f"tensor {spec.name!r} of bucket {bucket.index} is not among the {len(tensors)} tensors given"
            )
        tensor = tensors[spec.name]
        if tuple(tensor.shape) != spec.shape:
            raise WeightSyncError(
                f"tensor {spec.name!r}: expected shape {spec.shape}, got {tuple(tensor.shape)}"
            )
        found.append(tensor.detach().reshape(-1)[piece.start : piece.start + piece.count])
    return found


def put_all(version: torch.Tensor, plan: Plan, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
    """Copy `pieces`, one for each of the bucket's, to their places in a version's bytes (uint8, [total_bytes], any device). Raises
    `WeightSyncError` as `put_at` does, and for another number of pieces."""
    _check_number(bucket, pieces)
    for piece, values in zip(bucket.pieces, pieces, strict=True):
        put_at(version, piece.offset, plan, piece, values)


def put_summed(version: torch.Tensor, plan: Plan, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> int:
    """`put_all` into memory of the host, which returns the bucket's checksum: that of `checksum.bucket_checksum`, but made of each
    part as soon as it is written."""
    _check_number(bucket, pieces)
    written = version.numpy().data
    digest = xxhash.xxh3_64()
    summed = 0
    for place, piece, values in zip(bucket.places, bucket.pieces, pieces, strict=True):
        _check(plan, piece, values)
        gap = place - summed  # before it: see `Bucket.runs`
        digest.update(written[piece.offset - gap : piece.offset])
        item = DTYPE_BYTES[plan.tensors[piece.tensor].dtype]
        step = PART_BYTES // item
        for first in range(0, piece.count, step):
            some = values[first : first + step]
            offset = piece.offset + first * item
            _copy(version, offset, plan.tensors[piece.tensor], some)
            digest.update(written[offset : offset + len(some) * item])
        summed = place + piece.size
    return digest.intdigest()


def put_at(room: torch.Tensor, offset: int, plan: Plan, piece: Piece, values: torch.Tensor) -> None:
    """Copy `values` (any device, flat, [piece.count]) to the bytes of `room` (uint8, any device) from `offset` on: one copy, with
    the cast to the wire dtype in it, where `offset` is a multiple of the dtype's size; else two.

    Raises `WeightSyncError` for another number of elements, or for a cast between floating and other kinds.
    """
    _check(plan, piece, values)
    _copy(room, offset, plan.tensors[piece.tensor], values)


def _check_number(bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
    if len(pieces) != len(bucket.pieces):
        raise WeightSyncError(
            f"bucket {bucket.index}: expected {len(bucket.pieces)} pieces, got {len(pieces)}"
        )


def _check(plan: Plan, piece: Piece, values: torch.Tensor) -> None:
    spec = plan.tensors[piece.tensor]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if tuple(values.shape) != (piece.count,):
        raise WeightSyncError(
            f"tensor {spec.name!r}: expected {piece.count} elements, flat, of shape {spec.shape} from element "
            f"{piece.start} on, got shape {tuple(values.shape)}"
        )
    if values.dtype != dtype and not (values.is_floating_point() and dtype.is_floating_point):
        raise WeightSyncError(f"tensor {spec.name!r}: expected dtype {dtype}, got {values.dtype}")


def _copy(version: torch.Tensor, offset: int, spec: TensorSpec, values: torch.Tensor) -> None:
    """Of elements of `spec`, to the place that begins at byte `offset`."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    room = version[offset : offset + values.numel() * dtype.itemsize]
    if offset % dtype.itemsize:
        room.copy_(values.detach().to(dtype).contiguous().view(torch.uint8))
    else:
        room.view(dtype).copy_(values.detach())


def whole(version: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The view of one tensor in a version's bytes (uint8, [total_bytes])."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return version[spec.offset : spec.offset + spec.size].view(dtype).view(spec.shape)
