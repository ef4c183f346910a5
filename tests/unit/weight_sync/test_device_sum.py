"""The device's checksum against its definition, word by word in plain Python; and what must change it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.weight_sync import device_sum
from asyncrl.weight_sync.device_sum import bucket_sum
from asyncrl.weight_sync.plan import Bucket, Piece, Plan, make_plan

MASK = 2**64 - 1


def mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def by_definition(version: bytes, bucket: Bucket) -> int:
    words: list[int] = []
    for run in bucket.runs:
        part = version[run.offset : run.offset + run.size]
        part += bytes(-len(part) % 8)
        words += [int.from_bytes(part[i : i + 8], "little") for i in range(0, len(part), 8)]
    total = mix(sum(run.size for run in bucket.runs))
    return (total + sum(mix((w + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i, w in enumerate(words))) & MASK


def tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def one_run(size: int, offset: int = 0) -> Bucket:
    piece = Piece(tensor=0, start=offset, count=size, offset=offset, size=size, ends=True)
    return Bucket(index=0, sender=0, size=size, pieces=(piece,))


def shared() -> Plan:
    """Two senders: the buckets of either are several runs, and pieces that begin where no word does."""
    specs = [
        ("a", "bfloat16", (13,)),
        ("b", "uint8", (77,)),
        ("c", "float32", (33,)),
        ("d", "bfloat16", (40,)),
    ]
    shares = {
        "a": ((0, 5), (5, 8)),
        "b": ((0, 39), (39, 38)),
        "c": ((0, 17), (17, 16)),
        "d": ((0, 21), (21, 19)),
    }
    return make_plan(specs, 4096, shares=shares)


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=400), offset=st.integers(0, 9), block=st.sampled_from([1, 3, 2**20])
)
def test_it_is_the_definition(data: bytes, offset: int, block: int) -> None:
    bucket = one_run(len(data), offset)
    version = bytes(offset) + data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_sum, "_BLOCK", block)  # so that short data is several blocks
        assert bucket_sum(tensor(version), bucket) == by_definition(version, bucket)


def test_runs_that_are_not_neighbours() -> None:
    plan = shared()
    version = random.Random(1).randbytes(plan.total_bytes)
    assert plan.senders == 2 and all(len(bucket.runs) > 1 for bucket in plan.buckets)
    assert any(run.offset % 8 for bucket in plan.buckets for run in bucket.runs)
    for bucket in plan.buckets:
        assert bucket_sum(tensor(version), bucket) == by_definition(version, bucket)


def test_bytes_of_other_buckets_do_not_matter() -> None:
    plan = shared()
    version = bytearray(random.Random(2).randbytes(plan.total_bytes))
    before = [bucket_sum(tensor(version), bucket) for bucket in plan.buckets]
    version[plan.buckets[1].runs[0].offset] ^= 1
    after = [bucket_sum(tensor(version), bucket) for bucket in plan.buckets]
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)


def test_every_single_flipped_bit_is_noticed() -> None:
    version = bytearray(random.Random(3).randbytes(45))
    bucket = one_run(45)
    expected = bucket_sum(tensor(version), bucket)
    for bit in range(8 * 45):
        version[bit // 8] ^= 1 << bit % 8
        assert bucket_sum(tensor(version), bucket) != expected, bit
        version[bit // 8] ^= 1 << bit % 8


def test_words_that_change_places_are_noticed() -> None:
    data = random.Random(4).randbytes(64)
    words = [data[i : i + 8] for i in range(0, 64, 8)]
    expected = bucket_sum(tensor(data), one_run(64))
    for first in range(8):
        for second in range(first):
            swapped = list(words)
            swapped[first], swapped[second] = words[second], words[first]
            assert bucket_sum(tensor(b"".join(swapped)), one_run(64)) != expected


def test_signs_that_change_together_are_noticed() -> None:
    """Sums without a mix cancel there: the top bits of two words are the same multiple of 2^63."""
    weights = torch.randn(4096, dtype=torch.float32)
    bucket = one_run(4 * 4096)
    assert bucket_sum(weights.view(torch.uint8), bucket) != bucket_sum((-weights).view(torch.uint8), bucket)


def test_zeros_of_two_lengths_differ() -> None:
    sums = {bucket_sum(torch.zeros(size, dtype=torch.uint8), one_run(size)) for size in range(0, 40)}
    assert len(sums) == 40


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"
)
def test_it_is_the_same_on_the_gpu() -> None:
    plan = shared()
    version = tensor(random.Random(5).randbytes(plan.total_bytes))
    for bucket in plan.buckets:
        assert bucket_sum(version.cuda(), bucket) == bucket_sum(version, bucket)
