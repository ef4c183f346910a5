"""A float32 weight as float8_e4m3fn with one float32 scale per block of 128 x 128: the cast that the learner does before sending.

    scale = largest |w| of the block / 448        code = round(w / scale)        w is about code * scale

Rounding is to the nearest e4m3fn number: |w - code * scale| <= max(|w| / 16, scale / 1024), but for float32's own rounding of
w / scale. Deterministic, the same on every rank and device. Called by `outgoing`.
"""

from __future__ import annotations

import torch

from asyncrl.weight_sync.float8 import BLOCK, scale_shape

LARGEST = 448.0
"""Of e4m3fn."""


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [out, in] as codes [out, in] in float8_e4m3fn and scales [ceil(out / 128), ceil(in / 128)] in float32."""
    scales = block_scales(weight)
    codes = (weight.float() / _spread(scales, weight.shape)).clamp_(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), scales


def block_scales(weight: torch.Tensor) -> torch.Tensor:
    """[ceil(out / 128), ceil(in / 128)] float32; 1 for a block of zeros, and never below the smallest normal number."""
    rows, columns = scale_shape(weight.shape)
    out, wide = weight.shape
    padded = torch.nn.functional.pad(
        weight.detach().abs(), (0, columns * BLOCK - wide, 0, rows * BLOCK - out)
    )
    largest = padded.view(rows, BLOCK, columns, BLOCK).amax(dim=(1, 3)).float()
    scales = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(largest == 0, torch.ones_like(scales), scales)


def dequantise(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weight [out, in] that `codes` and `scales` stand for."""
    return codes.float() * _spread(scales, codes.shape)


def _spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each element's scale: [out, in]."""
    each = scales.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return each[: shape[0], : shape[1]]
