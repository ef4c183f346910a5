"""The bucket plan over random models."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.weight_sync.plan import ALIGNMENT, DTYPE_BYTES, Adapter, make_plan
from asyncrl.weight_sync.wire import Offer, Propose, decode_for_engine, encode

shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
models = st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes), min_size=1, max_size=30).map(
    lambda tensors: [(f"layer.{i}", dtype, shape) for i, (dtype, shape) in enumerate(tensors)]
)


@given(models, st.integers(1, 100_000))
def test_every_tensor_has_its_own_aligned_bytes_in_the_order_given(specs, bucket_bytes):
    plan = make_plan(specs, bucket_bytes)
    tensors = [tensor for bucket in plan.buckets for tensor in bucket.tensors]
    assert [(t.name, t.dtype, t.shape) for t in tensors] == specs
    end = 0
    for tensor in tensors:
        assert tensor.offset % ALIGNMENT == 0
        assert end <= tensor.offset < end + ALIGNMENT
        assert tensor.size == math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        end = tensor.offset + tensor.size
    assert plan.total_bytes == end


@given(models, st.integers(1, 100_000))
def test_buckets_hold_their_tensors_and_are_as_few_as_the_bound_allows(specs, bucket_bytes):
    plan = make_plan(specs, bucket_bytes)
    assert [bucket.index for bucket in plan.buckets] == list(range(len(plan.buckets)))
    for bucket in plan.buckets:
        first, last = bucket.tensors[0], bucket.tensors[-1]
        assert (bucket.start, bucket.start + bucket.size) == (first.offset, last.offset + last.size)
        assert bucket.size <= bucket_bytes or len(bucket.tensors) == 1
    for bucket, following in zip(plan.buckets, plan.buckets[1:], strict=False):
        head = following.tensors[0]
        assert head.offset + head.size - bucket.start > bucket_bytes


@given(models, st.integers(1, 100_000))
def test_the_same_on_every_rank(specs, bucket_bytes):
    assert make_plan(specs, bucket_bytes) == make_plan(list(specs), bucket_bytes)


@pytest.mark.parametrize("name", sorted(DTYPE_BYTES))
def test_dtype_sizes_are_those_of_torch(name):
    assert getattr(torch, name).itemsize == DTYPE_BYTES[name]


@pytest.mark.parametrize(
    ("specs", "bucket_bytes", "message"),
    [
        ([("w", "float32", (2,)), ("w", "float32", (2,))], 64, "'w' is given twice"),
        ([("w", "float42", (2,))], 64, "'w': unknown dtype 'float42'"),
        ([("w", "float32", (2, -1))], 64, "'w': expected dimensions of at least 0"),
        ([("w", "float32", (2,))], 0, "bucket_bytes: expected at least 1, got 0"),
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
    offer = Offer(version=0, transport="shm", location="/dev/shm/x", plan=plan, checksums=(1,))
    sent = encode(Propose(attempt=1, offer=offer, timeout_s=1.0))
    assert decode_for_engine(sent).offer.plan == plan
    assert msgspec.convert(msgspec.to_builtins(offer), Offer) == offer
