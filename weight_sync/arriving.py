"""One version on its way into an engine's memory, as it is pulled.

Invariant: a bucket is verified (xxh3_64 of the offer) before it counts as there. One that came as a delta and does not come out
right is to be pulled once more in full; one that came in full and is wrong is an error. Made and called by `pulling`.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

from asyncrl.weight_sync import chunks, delta
from asyncrl.weight_sync.checksum import bucket_checksum, version_digest
from asyncrl.weight_sync.errors import ChecksumError, MalformedDelta, WeightSyncError
from asyncrl.weight_sync.memory_file import MemoryFile
from asyncrl.weight_sync.opened import gathered
from asyncrl.weight_sync.plan import Bucket
from asyncrl.weight_sync.pull import Pull
from asyncrl.weight_sync.wire import Offer

logger = logging.getLogger(__name__)


class Arriving:
    """From the first question to the last bucket."""

    def __init__(self, memory: MemoryFile, offer: Offer, base: Offer | None) -> None:
        known = (base.version, version_digest(base.checksums)) if base is not None else None
        # What a fetch that was called off asked for is still answered, on this engine's next connection.
        self.pull = Pull(offer.plan, offer.checksums, offer.version, known, secrets.randbits(62))
        self.connected = 0
        """How often the connection was made."""
        self._memory = memory
        self._offer = offer
        self._base = base
        self._deltas: dict[int, bytearray] = {}
        self._came = 0

    def take(self, answer: chunks.Answer, body: memoryview) -> int | None:
        """Put what came in its place; a bucket that is complete by that, to be settled."""
        if isinstance(answer, chunks.Refused):
            if not self.pull.is_open(answer.question):
                return None
            raise WeightSyncError(
                f"version {self._offer.version}: the learner's chunk server refused: {answer.reason}"
            )
        if isinstance(answer, chunks.Found):
            self.pull.found(answer)
            return None
        arrival = self.pull.arrived(answer.question, body.nbytes)
        if arrival is None:
            return None
        self._came += arrival.size
        if arrival.delta:
            size = self.pull.delta_sizes[arrival.bucket]
            place: Any = self._deltas.setdefault(arrival.bucket, bytearray(size))
        else:
            place = self._memory.map
        place[arrival.start : arrival.start + arrival.size] = body
        return arrival.bucket if arrival.complete else None

    def settle(self, index: int) -> bool:
        """Patch and verify a complete bucket; False if it is to be pulled in full. Runs in a thread. Raises `ChecksumError`."""
        bucket, patch = self._offer.plan.buckets[index], self._deltas.pop(index, None)
        if patch is not None:
            try:
                self._patch(bucket, patch)
            except MalformedDelta as error:
                logger.warning("version=%d bucket=%d not patched: %s", self._offer.version, index, error)
                return False
        expected, got = self._offer.checksums[index], bucket_checksum(self._memory.map, bucket)
        if got != expected and patch is None:
            raise ChecksumError(self._offer.version, index, expected, got, str(self._memory.path))
        if got != expected:
            logger.warning("version=%d bucket=%d patched wrongly, pulled in full", self._offer.version, index)
        return got == expected

    def describe(self) -> str:
        if not self.connected:
            return "never connected (nobody there, or not with this run's key)"
        return f"{self._came} of {self.pull.bytes_asked} asked for came over {self.connected} connections"

    def _patch(self, bucket: Bucket, patch: bytearray) -> None:
        assert self._base is not None
        fits = (self._base.checksums[bucket.index], self._offer.checksums[bucket.index])
        if delta.sums(patch) != fits:
            raise MalformedDelta(f"delta of sums {delta.sums(patch)}: expected {fits}")
        with memoryview(self._memory.map) as whole, whole[: self._memory.size] as version:
            runs = bucket.runs
            if len(runs) == 1:
                with version[runs[0].offset : runs[0].offset + runs[0].size] as part:
                    delta.apply(part, patch)
                return
            joined = bytearray(gathered(version, bucket))
            delta.apply(memoryview(joined), patch)
            at = 0
            for run in runs:
                version[run.offset : run.offset + run.size] = joined[at : at + run.size]
                at += run.size
