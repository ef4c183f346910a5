"""Packed attention against the formula written out, rollout by rollout, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from asyncrl.learner import attention
from asyncrl.learner.attention import Packing, packed_attention


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], window: int | None
) -> torch.Tensor:
    """[1, positions, heads, size]"""
    share = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(share, dim=1) for tensor in (key, value))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(owner))
    distance = place[:, None] - place[None, :]
    seen = (owner[:, None] == owner[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def inputs(
    lengths: tuple[int, ...], heads: int, key_heads: int, seed: int, size: int = 8
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, sum(lengths))
    return [
        torch.randn(*shape, count, size, generator=generator, dtype=torch.float64)
        .transpose(1, 2)
        .requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.none() | st.integers(1, 50),
    st.integers(0, 99),
)
def test_attention_and_its_gradients_are_those_of_each_rollout_alone(
    lengths: list[int], heads: tuple[int, int], window: int | None, seed: int
) -> None:
    whole = tuple(lengths)
    tensors = inputs(whole, *heads, seed)
    got, weights = packed_attention(
        nn.Module(), *tensors, None, packing=Packing.of(whole), sliding_window=window
    )
    want = reference(*tensors, whole, window)
    assert weights is None
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(got, tensors, pull), torch.autograd.grad(want, tensors, pull), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [1, 7, 16, 40])
def test_a_window_is_the_same_in_chunks_of_any_size(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW_CHUNK", 16)
    lengths = (50, 50, 33, 16, 5)
    tensors = inputs(lengths, 4, 2, seed=1)
    got, _ = packed_attention(nn.Module(), *tensors, None, packing=Packing.of(lengths), sliding_window=window)
    torch.testing.assert_close(got, reference(*tensors, lengths, window), rtol=1e-9, atol=1e-9)


def test_neighbours_of_equal_length_are_one_run() -> None:
    packing = Packing.of((9, 9, 9, 4, 9, 2, 2))
    assert list(packing.runs()) == [(3, 9), (1, 4), (1, 9), (2, 2)]
    assert packing.starts.tolist() == [0, 9, 18, 27, 31, 40, 42, 44]


@pytest.mark.parametrize(
    ("wish", "named"),
    [
        ({"softcap": 50.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "no causality"),
        ({"dropout": 0.1}, "dropout"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_a_model_would_have_done_beside_is_refused(wish: dict[str, object], named: str) -> None:
    tensors = inputs((3, 2), 4, 4, seed=0)
    with pytest.raises(ValueError, match=f"Module hands its attention {named}, which"):
        packed_attention(nn.Module(), *tensors, None, packing=Packing.of((3, 2)), **wish)  # type: ignore[arg-type]


def test_a_mask_or_a_module_that_sees_the_future_is_refused() -> None:
    tensors = inputs((3, 2), 4, 4, seed=0)
    with pytest.raises(ValueError, match="attention_mask"):
        packed_attention(nn.Module(), *tensors, torch.ones(1), packing=Packing.of((3, 2)))
    encoder = nn.Module()
    encoder.is_causal = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no causality"):
        packed_attention(encoder, *tensors, None, packing=Packing.of((3, 2)))
    packed_attention(encoder, *tensors, None, packing=Packing.of((3, 2)), is_causal=True)
