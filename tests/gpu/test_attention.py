"""Packed attention on CUDA against the CPU's: the kernel for ragged rows (16 bits), and PyTorch's own in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from asyncrl.learner.attention import Packing, packed_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

LENGTHS = (300, 128, 128, 64, 33, 1)


def run(
    tensors: list[torch.Tensor], device: str, dtype: torch.dtype, window: int | None
) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value, in float32 on the CPU."""
    own = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
    packing = Packing.of(LENGTHS).to(torch.device(device))
    out, _ = packed_attention(nn.Module(), *own, None, packing=packing, sliding_window=window)
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return [tensor.float().cpu() for tensor in (out, *torch.autograd.grad(out, own, pull))]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-4)])
def test_as_on_the_cpu(dtype: torch.dtype, tolerance: float, key_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, sum(LENGTHS), heads, 64, generator=generator).to(dtype).float().transpose(1, 2)
        for heads in (8, key_heads, key_heads)
    ]
    got = run(tensors, "cuda", dtype, window)
    want = run(tensors, "cpu", torch.float32, window)
    for mine, theirs in zip(got, want, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=tolerance)


def test_a_rollout_does_not_feel_what_runs_before_it() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, sum(LENGTHS), 4, 64, generator=generator).transpose(1, 2).to("cuda", torch.bfloat16)
        for _ in range(3)
    ]
    packing = Packing.of(LENGTHS).to(torch.device("cuda"))
    before, _ = packed_attention(nn.Module(), *tensors, None, packing=packing)
    for tensor in tensors:
        tensor[:, :, : LENGTHS[0]] = 7.0
    after, _ = packed_attention(nn.Module(), *tensors, None, packing=packing)
    assert torch.equal(before[:, LENGTHS[0] :], after[:, LENGTHS[0] :])
    assert not torch.equal(before[:, : LENGTHS[0]], after[:, : LENGTHS[0]])
