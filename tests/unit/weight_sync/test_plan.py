"""The bucket plan over random models."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from random_plans import bucket_sizes, models, shared

from asyncrl.weight_sync.plan import ALIGNMENT, DTYPE_BYTES, Adapter, Fused, Tied, make_plan
from asyncrl.weight_sync.wire import Offer, Propose, SharedFile, decode_for_engine, encode


@given(models, bucket_sizes)
def test_every_tensor_has_its_own_aligned_bytes_in_the_order_given(specs, bucket_bytes):
    plan = make_plan(specs, bucket_bytes)
    assert [(t.name, t.dtype, t.shape) for t in plan.tensors] == specs
    end = 0
    for tensor in plan.tensors:
        assert tensor.offset % ALIGNMENT == 0
        assert end <= tensor.offset < end + ALIGNMENT
        assert tensor.size == math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        end = tensor.offset + tensor.size
    assert plan.total_bytes == end


@given(shared(), bucket_sizes)
def test_each_element_is_in_one_piece_and_each_sender_has_its_own(model, bucket_bytes):
    specs, shares = model
    plan = make_plan(specs, bucket_bytes, shares=shares)
    found = {spec.name: np.zeros(math.prod(spec.shape), int) for spec in plan.tensors}
    for bucket in plan.buckets:
        for piece in bucket.pieces:
            spec = plan.tensors[piece.tensor]
            item = DTYPE_BYTES[spec.dtype]
            assert (piece.offset, piece.size) == (spec.offset + piece.start * item, piece.count * item)
            first, count = shares[spec.name][bucket.sender]
            assert (first <= piece.start and piece.start + piece.count <= first + count) or not piece.count
            found[spec.name][piece.start : piece.start + piece.count] += 1
    assert all((times == 1).all() for times in found.values())
    assert [bucket.index for bucket in plan.buckets] == list(range(len(plan.buckets)))
    assert sum(len(plan.of(sender)) for sender in range(plan.senders)) == len(plan.buckets)


@given(shared(), bucket_sizes)
def test_no_bucket_is_larger_than_the_bound_and_none_could_take_the_next_piece(model, bucket_bytes):
    plan = make_plan(*model[:1], bucket_bytes, shares=model[1])
    for bucket in plan.buckets:
        assert bucket.size == sum(run.size for run in bucket.runs) <= bucket_bytes
    for sender in range(plan.senders):
        for bucket, following in itertools.pairwise(plan.of(sender)):
            more = msgspec.structs.replace(bucket, pieces=(*bucket.pieces, following.pieces[0]))
            assert sum(run.size for run in more.runs) > bucket_bytes


@given(shared(), bucket_sizes)
def test_the_runs_are_the_pieces_and_the_gaps_between_neighbours(model, bucket_bytes):
    plan = make_plan(*model[:1], bucket_bytes, shares=model[1])
    tensors = np.zeros(plan.total_bytes, bool)
    for spec in plan.tensors:
        tensors[spec.offset : spec.offset + spec.size] = True
    for bucket in plan.buckets:
        inside, pieces = np.zeros(plan.total_bytes, bool), np.zeros(plan.total_bytes, bool)
        for run in bucket.runs:
            assert not inside[run.offset : run.offset + run.size].any()
            inside[run.offset : run.offset + run.size] = True
        for piece in bucket.pieces:
            pieces[piece.offset : piece.offset + piece.size] = True
        assert (inside & tensors == pieces).all() and inside.sum() == bucket.size


@given(shared(), bucket_sizes)
def test_the_same_on_every_rank(model, bucket_bytes):
    specs, shares = model
    assert make_plan(specs, bucket_bytes, shares=shares) == make_plan(
        list(specs), bucket_bytes, shares=dict(shares)
    )


def test_what_is_cast_tied_and_fused_is_declared():
    specs = [
        ("e", "bfloat16", (4, 2)),
        ("q", "bfloat16", (2, 2)),
        ("k", "bfloat16", (2, 2)),
        ("n", "float32", (2,)),
    ]
    names = {"tied": [Tied(name="head", of="e")], "fused": [Fused(name="qk", parts=("q", "k"))]}
    plan = make_plan(specs, 1024, cast_from={"e": "float32", "n": "float32"}, **names)
    assert [spec.cast_from for spec in plan.tensors] == ["float32", "", "", ""]
    assert plan.tied == tuple(names["tied"]) and plan.fused == tuple(names["fused"])
    for wrong, message in [
        ({"tied": [Tied(name="q", of="e")]}, "'q' is tied to 'e'"),
        ({"tied": [Tied(name="head", of="nothing")]}, "tied to 'nothing'"),
        ({"fused": [Fused(name="ek", parts=("e", "k"))]}, "'ek' is fused of"),
        ({"fused": [Fused(name="x", parts=("x",))]}, "'x' is fused of"),
        ({"fused": [Fused(name="x", parts=())]}, "'x' is fused of"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_plan(specs, 1024, **wrong)


@pytest.mark.parametrize(
    "shares",
    [{"w": ((0, 3),)}, {"w": ((0, 2), (1, 3))}, {"w": ((1, 3),)}, {"v": ((0, 4),)}, {"w": ((0, 5),)}],
)
def test_shares_that_are_not_each_element_once_are_refused(shares):
    with pytest.raises(ValueError, match="expected"):
        make_plan([("w", "float32", (2, 2))], 64, shares=shares)


@pytest.mark.parametrize("name", sorted(DTYPE_BYTES))
def test_dtype_sizes_are_those_of_torch(name):
    assert getattr(torch, name).itemsize == DTYPE_BYTES[name]


@pytest.mark.parametrize(
    ("specs", "bucket_bytes", "message"),
    [
        ([("w", "float32", (2,)), ("w", "float32", (2,))], 64, "'w' is given twice"),
        ([("w", "float42", (2,))], 64, "'w': unknown dtype 'float42'"),
        ([("w", "float32", (2, -1))], 64, "'w': expected dimensions of at least 0"),
        ([("w", "float32", (2,))], 0, "bucket_bytes: expected at least 64, got 0"),
        ([], 64, "got none"),
    ],
)
def test_refuses(specs, bucket_bytes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(specs, bucket_bytes)


def test_an_adapter_s_plan_says_so_on_the_wire():
    adapter = Adapter(rank=4, alpha=6.5)
    plan = make_plan([("base_model.model.q_proj.lora_A.weight", "float32", (4, 8))], 64, adapter)
    assert plan.adapter == adapter and make_plan([("q", "float32", (4, 8))], 64).adapter is None
    offer = Offer(version=0, source=SharedFile(path="/dev/shm/x"), plan=plan, checksums=(1,))
    sent = encode(Propose(attempt=1, offer=offer, timeout_s=1.0))
    assert decode_for_engine(sent).offer.plan == plan
    assert msgspec.convert(msgspec.to_builtins(offer), Offer) == offer
