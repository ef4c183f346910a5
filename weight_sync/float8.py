"""What float8 weights are called and how they are laid out, as the `fp8` checkpoints of Hugging Face have them. Pure.

A linear layer's `weight` [out, in] travels as float8_e4m3fn, and beside it `weight_scale_inv` [ceil(out / 128), ceil(in / 128)]
in float32: each block of 128 x 128 elements is multiplied by its own scale. Embeddings, norms, biases and the output head
keep the engines' type. Called by the learner (which casts before it sends) and by whoever sets engines up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from asyncrl.weight_sync.plan import FUSED_LAYERS

BLOCK: Final = 128
"""Rows, and columns, of a block."""
SCALE_DTYPE: Final = "float32"
_SUFFIX: Final = "_scale_inv"
_SPLIT_BY_ROWS: Final = frozenset(layer for parts in FUSED_LAYERS.values() for layer in parts)
_FOLLOWED: Final = frozenset(layer for parts in FUSED_LAYERS.values() for layer in parts[:-1])
"""Engines put the next part of their matrix below: a block must not reach from one into the next."""
_SPLIT_BY_COLUMNS: Final = frozenset({"o_proj", "down_proj"})


def scale_name(weight: str) -> str:
    """The checkpoint name of the scales of `weight`."""
    return weight + _SUFFIX


def scale_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Of the scales of a weight [out, in]. Raises ValueError for anything but a matrix."""
    if len(shape) != 2:
        raise ValueError(f"float8 weights are matrices, got shape {tuple(shape)}")
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def quantization_config() -> dict[str, Any]:
    """What stands under `quantization_config` in such a checkpoint's config.json. Activations are cast as they come."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }


def misfits(shapes: Iterable[tuple[str, Sequence[int]]], tensor_parallel: int) -> list[str]:
    """Layers among `(checkpoint name, shape)` that engines of `tensor_parallel` ranks cannot hold in float8, each with why: a rank's
    part, and each but the last part of a fused matrix, is whole blocks."""
    found = []
    for name, shape in shapes:
        parts = name.split(".")
        if len(shape) != 2 or parts[-1] != "weight" or len(parts) < 2:
            continue
        layer = parts[-2]
        rows = shape[0] // tensor_parallel
        if (layer in _FOLLOWED or (tensor_parallel > 1 and layer in _SPLIT_BY_ROWS)) and rows % BLOCK:
            found.append(f"{name}: {rows} rows{_per_rank(tensor_parallel)}, expected a multiple of {BLOCK}")
        columns = shape[1] // tensor_parallel
        if tensor_parallel > 1 and layer in _SPLIT_BY_COLUMNS and columns % BLOCK:
            found.append(
                f"{name}: {columns} columns{_per_rank(tensor_parallel)}, expected a multiple of {BLOCK}"
            )
    return found


def _per_rank(tensor_parallel: int) -> str:
    return f" on each of {tensor_parallel} ranks" if tensor_parallel > 1 else ""
