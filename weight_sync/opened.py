"""A version whose bytes the chunk server gives out, with the deltas that were made of it. Called by `open_versions`,
`answering` and `delta_maker`, under their locks.
"""

from __future__ import annotations

import zmq

from asyncrl.weight_sync import chunks, delta
from asyncrl.weight_sync.checksum import version_digest
from asyncrl.weight_sync.plan import DTYPE_BYTES, Bucket, Plan


class Opened:
    """One version that may be read."""

    def __init__(
        self, number: int, view: memoryview, plan: Plan, checksums: tuple[int, ...], base: Opened | None
    ) -> None:
        """`base`: the version against which deltas are made."""
        self.number = number
        self.view = view
        self.plan = plan
        self.checksums = checksums
        self.digest = version_digest(checksums)
        self.base = base
        """None once its bytes must not be read any more: what was made against it is good still."""
        self.deltas: dict[int, bytes] = {}
        """Bucket -> its delta, empty if it has none; those that were made."""
        self.sending: list[zmq.MessageTracker] = []
        """Pieces of its bytes that libzmq may read still."""
        self._based_on = (base.number, base.digest) if base is not None else None

    def is_based_on(self, number: int, digest: str) -> bool:
        """Whether its deltas fit these bytes."""
        return self._based_on == (number, digest)

    def part(self, question: chunks.Get) -> memoryview | str:
        """The bytes asked for, in place, or why there are none."""
        source = self.view if question.delta < 0 else memoryview(self.deltas.get(question.delta, b""))
        if 0 < question.size <= chunks.CHUNK_BYTES and 0 <= question.start <= source.nbytes - question.size:
            return source[question.start : question.start + question.size]
        return f"{question.size} bytes from {question.start} on, of {source.nbytes} bytes"

    def make(self, bucket: int, base: Opened) -> bytes:
        """The delta of one bucket, empty if it does not pay."""
        wanted = self.plan.buckets[bucket]
        found = delta.encode(
            gathered(base.view, wanted),
            gathered(self.view, wanted),
            item_bytes(self.plan, wanted),
            base_sum=base.checksums[bucket],
            new_sum=self.checksums[bucket],
        )
        return found or b""


def gathered(version: memoryview, bucket: Bucket) -> memoryview:
    """The bytes of a bucket as one range: in place where they lie so, else a copy."""
    runs = bucket.runs
    if len(runs) == 1:
        return version[runs[0].offset : runs[0].offset + runs[0].size]
    return memoryview(b"".join(version[run.offset : run.offset + run.size] for run in runs))


def item_bytes(plan: Plan, bucket: Bucket) -> int:
    """The width in which a delta of `bucket` looks at its bytes: that of its narrowest dtype, which divides all others."""
    return min((DTYPE_BYTES[plan.tensors[piece.tensor].dtype] for piece in bucket.pieces), default=1)
