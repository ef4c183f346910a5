"""Which shard has what, and the rounds that bring a bucket together: every element once, in place, within the bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.learner.send_order import arranged
from asyncrl.learner.shares import STEP, Wanted, divided, held, rounds
from asyncrl.weight_sync.plan import Fused

SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple)


@given(SHAPES, st.integers(1, 6))
def test_a_shard_has_the_rows_that_fsdp_gives_it(shape: tuple[int, ...], shards: int) -> None:
    found = held(shape, shards)
    elements = torch.arange(math.prod(shape)).reshape(shape or (1,))
    chunks = list(torch.chunk(elements, shards)) if elements.shape[0] else []
    chunks += [elements[:0]] * (shards - len(chunks))
    assert [
        elements.flatten()[first : first + count].tolist() for first, count in found
    ] == [  # as `torch.chunk`, which FSDP2 cuts with
        chunk.flatten().tolist() for chunk in chunks
    ]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 7))
def test_replicas_divide_a_share(start: int, count: int, parts: int) -> None:
    found = divided((start, count), parts)
    assert len(found) == parts
    assert sum(number for _, number in found) == count
    assert all(first == start + sum(n for _, n in found[:at]) for at, (first, _) in enumerate(found))
    assert max(n for _, n in found) - min(n for _, n in found) <= 1


@st.composite
def buckets(draw: st.DrawFn) -> tuple[int, list[Wanted]]:
    shards = draw(st.integers(1, 5))
    wanted = []
    for piece in range(draw(st.integers(0, 6))):
        shape = draw(st.lists(st.integers(0, 7), min_size=1, max_size=2))
        elements = math.prod(shape)
        start = draw(st.integers(0, elements))
        count = draw(st.integers(0, elements - start))
        item = draw(st.sampled_from([1, 2, 4, 8]))
        wanted.append(Wanted(piece, start, count, item, held(shape, shards)))
    return shards, wanted


@given(buckets(), st.integers(1, 64), st.integers(0, 64))
def test_rounds_bring_every_element_once_within_their_bounds(
    bucket: tuple[int, list[Wanted]], large: int, more: int
) -> None:
    _, wanted = bucket
    most = large + more
    by_piece = {each.piece: each for each in wanted}
    brought: list[tuple[int, int]] = []
    for each in rounds(wanted, large, most):
        assert each.parts
        if each.in_place:  # one range of one piece, its owners in its order: it can be received as it lies
            assert len({part.piece for part in each.parts}) == 1
            assert [part.owner for part in each.parts] == sorted({part.owner for part in each.parts})
            ends = [part.at + part.count for part in each.parts]
            assert [part.at for part in each.parts[1:]] == ends[:-1]
            assert sum(part.size for part in each.parts) <= max(most, each.parts[0].item)
        else:
            pieces = {part.piece for part in each.parts}
            room = sum(part.room for part in each.parts)
            # One small piece always fits; what it takes beyond its bytes is the padding of its parts.
            assert room <= most or len(pieces) == 1
        for part in each.parts:
            piece = by_piece[part.piece]
            first, count = piece.held[part.owner]
            assert part.start >= 0 and part.start + part.count <= count
            assert first + part.start == piece.start + part.at
            assert part.size <= part.room < part.size + STEP
            brought += [(part.piece, part.at + offset) for offset in range(part.count)]
    assert sorted(brought) == [(each.piece, at) for each in wanted for at in range(each.count)]


QWEN = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.k_proj.bias",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.0.self_attn.v_proj.bias",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
]


def test_parts_of_a_fused_parameter_are_neighbours_within_their_layer() -> None:
    ordered, fused = arranged(QWEN)
    assert [name.removeprefix("model.layers.0.self_attn.") for name in ordered[1:8]] == [
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "q_proj.bias",
        "k_proj.bias",
        "v_proj.bias",
        "o_proj.weight",
    ]
    assert ordered[0] == QWEN[0] and ordered[8:] == QWEN[8:]
    prefix = "model.layers.0."
    assert [(each.name.removeprefix(prefix), len(each.parts)) for each in fused] == [
        ("self_attn.qkv_proj.weight", 3),
        ("self_attn.qkv_proj.bias", 3),
        ("mlp.gate_up_proj.weight", 2),  # layer 1 has no gate: nothing is fused there
    ]
    assert fused[2] == Fused(
        name=prefix + "mlp.gate_up_proj.weight",
        parts=(prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"),
    )


@given(st.permutations(QWEN))
def test_whatever_the_order_every_name_is_there_once(names: list[str]) -> None:
    ordered, fused = arranged(names)
    assert sorted(ordered) == sorted(QWEN)
    for each in fused:
        at = ordered.index(each.parts[0])
        assert tuple(ordered[at : at + len(each.parts)]) == each.parts


@pytest.mark.parametrize("names", [[], ["lm_head.weight"], ["self_attn.qkv_proj.weight"]])
def test_where_nothing_is_to_be_fused_nothing_is(names: list[str]) -> None:
    assert arranged(names) == (names, [])
