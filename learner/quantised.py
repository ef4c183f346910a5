"""A frozen linear layer in 4 bits (NF4), as the base of QLoRA.

Codes and scales are one flat parameter of bytes, so that FSDP shards them together, casts neither, and holds nothing else
whole: the `Params4bit` of bitsandbytes keeps its scales outside the parameter, where sharding loses them. Rounding and its
inverse are bitsandbytes'. Made by `lora`; imported only where a recipe asks for it, as bitsandbytes takes seconds to load.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import nn

BLOCK = 64
"""Weights that share a scale: arXiv:2305.14314, section 3."""
KIND = "nf4"
_SCALE_BYTES = 4


class Linear4Bit(nn.Linear):
    """y = x W^T + b with W [out_features, in_features] in 4 bits; the gradient flows to x alone."""

    def __init__(self, linear: nn.Linear) -> None:
        """Rounds the weight of `linear`; of one on the meta device only the sizes are taken over."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(pack(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = torch.Size((self.out_features, self.in_features))
        out: torch.Tensor = _Multiply.apply(x, self.weight, shape)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias

    def dequantised(self, packed: torch.Tensor) -> torch.Tensor:
        """W in float32, from this layer's whole `packed` weight."""
        return unpack(packed, torch.Size((self.out_features, self.in_features)), torch.float32)


class _Multiply(torch.autograd.Function):
    """Holds the packed weight for backward and unpacks it again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ unpack(packed, shape, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        (packed,) = ctx.saved_tensors
        return grad @ unpack(packed, ctx.shape, grad.dtype), None, None


def packed_bytes(elements: int) -> int:
    """Scales and codes of a weight of so many elements."""
    return _SCALE_BYTES * _blocks(elements) + -(-elements // 2)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`weight` rounded to NF4: [packed_bytes] uint8, the blocks' float32 scales first, as they need alignment."""
    size = packed_bytes(weight.numel())
    if weight.is_meta:
        return torch.empty(size, dtype=torch.uint8, device="meta")
    codes, state = bnb.quantize_4bit(weight.float().contiguous(), blocksize=BLOCK, quant_type=KIND)
    scales = state.absmax.contiguous().view(torch.uint8)
    packed = torch.cat([scales, codes.reshape(-1)])
    if len(packed) != size:
        raise ValueError(
            f"a weight of {weight.numel()} elements packed to {len(packed)} bytes, expected {size}"
        )
    return packed


def unpack(packed: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """The weight [shape] that `packed` stands for, in `dtype`."""
    split = _SCALE_BYTES * _blocks(shape.numel())
    # The CPU's kernel (0.50.2) takes wrong scales for rows whose length is a multiple of 16 and not of the block, and has none
    # for rows of an odd length. As blocks, or as one row, it takes any weight.
    elements = 2 * (len(packed) - split)
    rows = elements // BLOCK if elements % BLOCK == 0 else 1
    state = bnb.QuantState(  # type: ignore[no-untyped-call]
        absmax=packed[:split].view(torch.float32),
        shape=torch.Size((rows, elements // rows)),
        code=bnb.get_4bit_type(KIND, device=packed.device),  # type: ignore[no-untyped-call]
        blocksize=BLOCK,
        quant_type=KIND,
        dtype=dtype,
    )
    weight: torch.Tensor = bnb.dequantize_4bit(packed[split:].view(-1, 1), state)
    return weight.flatten()[: shape.numel()].view(shape)


def _blocks(elements: int) -> int:
    return -(-elements // BLOCK)
