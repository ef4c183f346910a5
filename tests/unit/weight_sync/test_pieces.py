"""Writing a version: the checksum that is made on the way is the checksum of what lies there afterwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from random_plans import bucket_sizes, shared

from asyncrl.weight_sync.checksum import bucket_checksum
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.pieces import PART_BYTES, cut, put_all, put_summed
from asyncrl.weight_sync.plan import make_plan


def random_weights(plan):
    return {spec.name: (torch.randn(spec.shape) * 3).to(getattr(torch, spec.dtype)) for spec in plan.tensors}


@given(shared(), bucket_sizes)
def test_the_sum_on_the_way_is_that_of_the_bytes_of_every_sender_s_buckets(model, bucket_bytes):
    specs, shares = model
    plan = make_plan(specs, bucket_bytes, shares=shares)
    weights = random_weights(plan)
    summed, plain = (
        torch.zeros(plan.total_bytes, dtype=torch.uint8),
        torch.zeros(plan.total_bytes, dtype=torch.uint8),
    )
    for bucket in plan.buckets:
        pieces = cut(plan, bucket, weights)
        put_all(plain, plan, bucket, pieces)
        assert put_summed(summed, plan, bucket, pieces) == bucket_checksum(memoryview(plain.numpy()), bucket)
    assert torch.equal(summed, plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tensors_larger_than_what_is_summed_at_once(dtype):
    elements = 5 * PART_BYTES // 4 + 3
    plan = make_plan(
        [("small", dtype, (5,)), ("large", dtype, (elements,)), ("last", dtype, (7,))], 64 * PART_BYTES
    )
    weights = {spec.name: torch.randn(spec.shape) for spec in plan.tensors}
    version = torch.zeros(plan.total_bytes, dtype=torch.uint8)
    (bucket,) = plan.buckets
    found = put_summed(version, plan, bucket, cut(plan, bucket, weights))
    assert found == bucket_checksum(memoryview(version.numpy()), bucket)
    large = plan.tensors[1]
    there = version[large.offset : large.offset + large.size].view(getattr(torch, dtype))
    assert torch.equal(there, weights["large"].to(there.dtype))


def test_nothing_of_a_piece_that_does_not_fit_is_written():
    plan = make_plan([("a", "float32", (4,)), ("b", "float32", (4,))], 1024)
    version = torch.zeros(plan.total_bytes, dtype=torch.uint8)
    (bucket,) = plan.buckets
    with pytest.raises(WeightSyncError, match="'b': expected 4 elements"):
        put_summed(version, plan, bucket, [torch.ones(4), torch.ones(5)])
    with pytest.raises(WeightSyncError, match="'b': expected dtype"):
        put_summed(version, plan, bucket, [torch.ones(4), torch.ones(4, dtype=torch.int32)])
    assert not version[plan.tensors[1].offset :].any()
    with pytest.raises(WeightSyncError, match="expected 2 pieces, got 1"):
        put_summed(version, plan, bucket, [torch.ones(4)])
