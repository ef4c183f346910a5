"""Versions of random weights, sent by one learner rank or by several, each a thread of this process. Used by the tests of the
`collective` transport.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from asyncrl.weight_sync.checksum import bucket_checksum
from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.collective_share import CollectiveShare
from asyncrl.weight_sync.pieces import cut, put_all
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.report import SyncReport

RANKS_S = 30.0


def tensors_of(plan: Plan, seed: int) -> dict[str, torch.Tensor]:
    """Values for every tensor of `plan`, float32 where it floats."""
    made = torch.Generator().manual_seed(seed)
    values = {}
    for spec in plan.tensors:
        dtype: torch.dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            values[spec.name] = torch.randn(spec.shape, generator=made)
        else:
            values[spec.name] = torch.randint(0, 127, spec.shape, generator=made).to(dtype)
    return values


def checksums_of(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Of each bucket, as an engine that has these very bytes finds them."""
    version = torch.zeros(plan.total_bytes, dtype=torch.uint8)
    for bucket in plan.buckets:
        put_all(version, plan, bucket, cut(plan, bucket, tensors))
    return [bucket_checksum(version.numpy().data, bucket) for bucket in plan.buckets]


class ThreadRanks:
    """`Ranks` of threads."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, words: list[bytes]) -> None:
        self.rank, self.size = rank, size
        self._meeting, self._words = meeting, words

    def share(self, message: bytes) -> bytes:
        return self.collect(message)[0]

    def collect(self, message: bytes) -> list[bytes]:
        self._words[self.rank] = message
        self._meeting.wait(RANKS_S)
        said = list(self._words)
        self._meeting.wait(RANKS_S)
        return said


def thread_ranks(size: int) -> list[ThreadRanks]:
    meeting, words = threading.Barrier(size), [b""] * size
    return [ThreadRanks(rank, size, meeting, words) for rank in range(size)]


Sender = CollectivePublisher | CollectiveShare


def send(
    plan: Plan,
    senders: list[Sender],
    version: int,
    *,
    seed: int | None = None,
    again: bool = False,
    halfway: Callable[[int], None] = lambda rank: None,
) -> SyncReport:
    """Every sender sends its share of `version` (random weights of `seed`, by default its number); the report is rank 0's.

    `halfway` is called by each, with its rank, before the second half of its buckets. Raises what rank 0 raises, after all ended;
    AssertionError if another rank raised otherwise.
    """
    tensors = tensors_of(plan, version if seed is None else seed)

    def one(rank: int) -> Any:
        sender, buckets = senders[rank], plan.of(rank)
        sender.resend(version) if again else sender.begin(version)
        for index, bucket in enumerate(buckets):
            if index == len(buckets) // 2:
                halfway(rank)
            sender.write(bucket, cut(plan, bucket, tensors))
        return sender.commit()

    with ThreadPoolExecutor(len(senders)) as threads:
        results = [threads.submit(one, rank) for rank in range(len(senders))]
    errors = [type(result.exception()) for result in results]
    assert len(set(errors)) == 1, [result.exception() for result in results]
    return results[0].result()
