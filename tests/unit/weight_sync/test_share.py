"""A share of a version beside rank 0's: two ranks as two threads, and what either refuses."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from thread_ranks import SOON_S, Meeting

from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import SharedMemoryError, WeightSyncError
from asyncrl.weight_sync.hosts import this_host
from asyncrl.weight_sync.plan import Plan, make_plan
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.share import ShareWriter
from asyncrl.weight_sync.shm import slot_path

SHAPES = {"embed": (13, 8), "bias": (5,), "empty": (0, 4), "scale": (1,)}
PLAN = make_plan(
    [(name, "bfloat16", shape) for name, shape in SHAPES.items()],
    64,
    shares={
        "embed": [(0, 56), (56, 48)],
        "bias": [(0, 3), (3, 2)],
        "empty": [(0, 0)] * 2,
        "scale": [(0, 1), (1, 0)],
    },
)


class Two:
    """A publisher and the writer of the other rank."""

    def __init__(self, host: str) -> None:
        self.run_id = f"test-{uuid.uuid4().hex[:12]}"
        meeting = Meeting(2)
        config = WeightSyncConfig(timeout_s=SOON_S)
        self.first = Publisher(config, self.run_id, PLAN, ranks=meeting.rank(0))
        self.second = ShareWriter(PLAN, meeting.rank(1), host)
        self.threads = ThreadPoolExecutor(2)

    def both(self, *calls: Callable[[], object]) -> list[Exception | None]:
        """What each call raised; both end."""
        return [each.exception(timeout=2 * SOON_S) for each in [self.threads.submit(call) for call in calls]]

    def begin(self, version: int) -> list[Exception | None]:
        return self.both(lambda: self.first.begin(version), lambda: self.second.begin(version))

    def write(self, values: torch.Tensor, ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank, writer in enumerate((self.first, self.second)):
            for bucket in PLAN.of(rank) if rank in ranks else ():
                writer.write(bucket, _pieces(PLAN, bucket.pieces, values))

    def commit(self) -> list[Exception | None]:
        return self.both(self.first.commit, self.second.commit)

    def close(self) -> None:
        self.threads.shutdown()
        self.second.close()
        self.first.close()


def _pieces(plan: Plan, pieces: tuple, values: torch.Tensor) -> list[torch.Tensor]:
    """From one long row of values: each tensor begins at its offset."""
    starts = [plan.tensors[piece.tensor].offset + piece.start for piece in pieces]
    return [values[start : start + piece.count] for start, piece in zip(starts, pieces, strict=True)]


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two(this_host())
    yield made
    made.close()


def test_the_file_holds_what_both_wrote_and_the_offer_both_checksums(two: Two) -> None:
    for version in range(5):
        values = torch.randn(1024)
        assert two.begin(version) == [None, None]
        two.write(values)
        assert two.commit() == [None, None]
        data = slot_path(two.run_id, version % 2).read_bytes()
        for spec in PLAN.tensors:
            found = torch.frombuffer(bytearray(data), dtype=torch.uint8)[
                spec.offset : spec.offset + spec.size
            ]
            want = values[spec.offset : spec.offset + spec.size // 2].bfloat16()
            assert torch.equal(found.view(torch.bfloat16), want), spec.name
        live = two.first._live
        assert live is not None and len(live.checksums) == len(PLAN.buckets) and live.is_intact()


def test_a_file_that_was_replaced_is_mapped_anew(two: Two) -> None:
    for version in range(6):
        if version >= 2:
            two.first._slots.oldest.retire()
        assert two.begin(version) == [None, None]
        two.write(torch.full((1024,), float(version)))
        assert two.commit() == [None, None]
        live = two.first._live
        assert (
            live is not None and live.is_intact()
        )  # by its checksums, read from the file that has the name now


def test_a_rank_that_did_not_write_all_is_everyones_error(two: Two) -> None:
    two.begin(0)
    two.write(torch.zeros(1024), ranks=(0,))
    found = two.commit()
    assert all(isinstance(error, WeightSyncError) for error in found)
    assert all("learner rank 1: expected" in str(error) for error in found)
    two.first.abandon()
    assert two.begin(0) == [None, None]
    two.write(torch.zeros(1024))
    assert two.commit() == [None, None]


def test_what_rank_0_cannot_begin_the_others_do_not(two: Two) -> None:
    two.begin(3)
    two.write(torch.zeros(1024))
    two.commit()
    own, others = two.begin(3)
    assert "expected one above 3" in str(own)
    assert "learner rank 0 could not begin it" in str(others) and "expected one above 3" in str(others)
    with pytest.raises(WeightSyncError, match="no version is begun"):
        two.second.write(PLAN.of(1)[0], [])


def test_a_rank_of_another_host_is_told_what_to_set() -> None:
    elsewhere = Two("another/host")
    try:
        own, others = elsewhere.begin(0)
        assert own is None
        assert isinstance(others, SharedMemoryError) and 'set it to "one"' in str(others)
    finally:
        elsewhere.close()


def test_buckets_come_in_order_and_are_the_ranks_own(two: Two) -> None:
    two.begin(0)
    with pytest.raises(WeightSyncError, match="out of order"):
        two.second.write(PLAN.of(0)[0], [])
    with pytest.raises(WeightSyncError, match="out of order"):
        two.second.write(PLAN.of(1)[1], [])


def test_a_plan_of_more_senders_than_ranks_is_refused() -> None:
    with pytest.raises(WeightSyncError, match="a rank for each of 2 senders"):
        Publisher(WeightSyncConfig(), f"test-{uuid.uuid4().hex[:12]}", PLAN)
