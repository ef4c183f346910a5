"""Weights in float8 with a scale for each block: the cast against its definition in float64, and its bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gathered import gathered
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from asyncrl.learner.float8_blocks import LARGEST, block_scales, dequantise, quantise
from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.step import Learner
from asyncrl.weight_sync.float8 import BLOCK, misfits, scale_name, scale_shape

E4M3 = sorted(
    {
        sign * value
        for sign in (1.0, -1.0)
        for value in (
            *(mantissa / 8 * 2.0**-6 for mantissa in range(8)),
            *(
                (1 + mantissa / 8) * 2.0**exponent
                for exponent in range(-6, 9)
                for mantissa in range(8)
                if (exponent, mantissa) != (8, 7)
            ),
        )
    }
)
"""Every finite number of the type, written out from its definition: 4 exponent bits with bias 7, 3 mantissa bits."""


def nearest(value: float) -> float:
    """Of all the type's numbers, which the cast to it is held against."""
    return min(E4M3, key=lambda number: abs(number - value))


def reference(weight: torch.Tensor) -> torch.Tensor:
    """What the weight becomes, block by block and element by element in float64."""
    found = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(0, weight.shape[0], BLOCK):
        for column in range(0, weight.shape[1], BLOCK):
            block = weight[row : row + BLOCK, column : column + BLOCK].double()
            scale = float(block.abs().max()) / 448.0
            if scale:
                flat = [nearest(float(each) / scale) * scale for each in block.flatten()]
                found[row : row + BLOCK, column : column + BLOCK] = torch.tensor(flat).view(block.shape)
    return found


@pytest.mark.parametrize("shape", [(3, 5), (128, 128), (130, 7), (5, 257)])
def test_the_cast_is_the_nearest_number_of_the_type(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got, expected = dequantise(*quantise(weight)).double(), reference(weight)
    # Where a quotient falls in the middle between two numbers, float32 and float64 may fall to either side.
    close = torch.isclose(got, expected, rtol=1e-6, atol=0.0)
    step = (weight.double().abs() / 8).clamp_min(float(weight.abs().max()) / 448.0 / 512)
    assert close.float().mean() > 0.99 and bool(((got - expected).abs() <= step * (1 + 1e-6)).all())


@given(
    rows=st.integers(1, 2 * BLOCK + 3),
    columns=st.integers(1, 2 * BLOCK + 3),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_the_error_is_bounded_by_the_element_or_by_its_block(rows, columns, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    # Of very different sizes within a block, so that some come out below the type's smallest normal number.
    sizes = torch.exp2(torch.randint(-20, 1, (rows, columns), generator=generator).float())
    weight = torch.randn(rows, columns, generator=generator) * sizes * 2.0**exponent
    codes, scales = quantise(weight)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == weight.shape
    assert scales.dtype == torch.float32 and tuple(scales.shape) == scale_shape(weight.shape)
    each = scales.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    error = (dequantise(codes, scales).double() - weight.double()).abs()
    bound = torch.maximum(weight.double().abs() / 16, each / 1024) * (1 + 1e-6)
    assert bool((error <= bound).all())


def test_the_largest_of_a_block_keeps_its_place_and_blocks_do_not_see_each_other():
    weight = torch.full((BLOCK + 1, BLOCK + 1), 0.5)
    weight[0, 0], weight[BLOCK, BLOCK] = 1000.0, -1e-3
    codes, scales = quantise(weight)
    assert scales.flatten().tolist() == pytest.approx([1000 / 448, 0.5 / 448, 0.5 / 448, 1e-3 / 448])
    assert float(codes[0, 0]) == LARGEST and float(codes[BLOCK, BLOCK]) == -LARGEST
    assert float(codes[0, BLOCK]) == LARGEST


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 3e38])
def test_the_ends_of_float32_are_no_faults(value):
    codes, scales = quantise(torch.full((4, 4), value))
    back = dequantise(codes, scales)
    assert bool(torch.isfinite(back).all()) and bool((scales > 0).all())
    assert back.double() == pytest.approx(value, rel=1e-6, abs=2.0**-126 / 1024)


def test_a_weight_that_is_no_number_stays_none():
    weight = torch.ones(2, 2)
    weight[1, 1] = math.nan
    assert bool(dequantise(*quantise(weight)).isnan()[1, 1])


def test_bfloat16_masters_give_the_same_as_their_float32_copies():
    weight = torch.randn(200, 150, generator=torch.Generator().manual_seed(3)).bfloat16()
    one, other = quantise(weight), quantise(weight.float())
    assert torch.equal(one[0].view(torch.uint8), other[0].view(torch.uint8)) and torch.equal(one[1], other[1])


def test_names_and_shapes_are_those_of_fp8_checkpoints():
    assert scale_name("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight_scale_inv"
    assert scale_shape((129, 256)) == (2, 2)
    with pytest.raises(ValueError, match="matrices"):
        scale_shape((4,))
    assert tuple(block_scales(torch.ones(129, 256)).shape) == (2, 2)


@pytest.mark.parametrize(
    ("name", "shape", "ranks", "misfit"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (256, 256), 1, ""),
        ("model.layers.0.self_attn.q_proj.weight", (192, 256), 1, "192 rows"),
        ("model.layers.0.self_attn.v_proj.weight", (64, 256), 1, ""),
        ("model.layers.0.self_attn.v_proj.weight", (64, 256), 2, "32 rows on each of 2 ranks"),
        ("model.layers.0.mlp.gate_proj.weight", (300, 256), 1, "300 rows"),
        ("model.layers.0.mlp.up_proj.weight", (300, 256), 1, ""),
        ("model.layers.0.mlp.down_proj.weight", (256, 300), 1, ""),
        ("model.layers.0.mlp.down_proj.weight", (256, 384), 2, "192 columns"),
        ("model.layers.0.self_attn.q_proj.bias", (192,), 1, ""),
        ("model.embed_tokens.weight", (41, 64), 2, ""),
    ],
)
def test_what_engines_cannot_hold_in_blocks_is_named(name, shape, ranks, misfit):
    found = misfits([(name, shape)], ranks)
    assert ([name] if misfit else []) == [each.split(":")[0] for each in found]
    assert not misfit or misfit in found[0]


def _layers(name: str) -> bool:
    return name.endswith("_proj.weight")


def test_a_learner_sends_linear_weights_as_codes_and_scales(
    model_folder: Path, learner: Callable[..., Learner]
) -> None:
    opened = learner()
    plan = opened.plan(4096, "float8")
    sent = gathered(opened, plan)
    masters = dict(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).named_parameters())
    assert sent.keys() == {*masters, *(scale_name(name) for name in masters if _layers(name))}
    for name, weight in masters.items():
        if _layers(name):
            codes, scales = quantise(weight.detach())
            assert torch.equal(sent[name].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(sent[scale_name(name)], scales)
        else:
            assert sent[name].dtype == torch.bfloat16 and torch.equal(sent[name], weight.detach().bfloat16())
    assert {spec.cast_from for spec in plan.tensors} == {"float32", ""}
    assert [spec.name for spec in plan.tensors if not spec.cast_from and spec.dtype != "float32"] == []
    linear = sum(weight.numel() for name, weight in masters.items() if _layers(name))
    halved = opened.plan(4096, "bfloat16").total_bytes - plan.total_bytes
    assert linear * 0.95 < halved <= linear
    assert gathered(opened, opened.plan(4096)).keys() == masters.keys(), "another plan is another plan"


def test_merged_adapters_are_merged_before_the_cast(
    model_folder: Path, learner: Callable[..., Learner]
) -> None:
    opened = learner(lora=LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj"], sync="merged"))
    whole, sent = (
        gathered(opened, opened.plan(4096, "float32")),
        gathered(opened, opened.plan(4096, "float8")),
    )
    for name in filter(_layers, whole):
        assert torch.equal(sent[name].view(torch.uint8), quantise(whole[name])[0].view(torch.uint8))
