"""Which bytes of a version an engine asks the learner's chunk server for next. Pure.

Invariants: every byte of every bucket is asked for until it came, and none that came is asked for again; an answer that was not
asked for changes nothing; at most `chunks.WINDOW` questions are open; the buckets under way take at most twice the memory of the
largest. Called by `pulling` and `arriving`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from asyncrl.weight_sync import chunks
from asyncrl.weight_sync.checksum import version_digest
from asyncrl.weight_sync.plan import Plan


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of an answer belong."""

    bucket: int
    start: int
    """In the version, or in the bucket's delta."""
    size: int
    delta: bool
    complete: bool
    """These were the last of the bucket."""


class Pull:
    """The questions of one version, from the first to the last bucket."""

    def __init__(
        self,
        plan: Plan,
        checksums: Sequence[int],
        version: int,
        base: tuple[int, str] | None,
        first_question: int = 0,
    ) -> None:
        """`base`: version and digest of the bytes to which deltas may be applied; None: none. `first_question`: from it on questions
        are numbered; far from those of the fetch before, whose answers may come yet, to the same name."""
        self.bytes_asked = 0
        """Asked for so far, questions that were put again not counted."""
        self.delta_sizes: dict[int, int] = {}
        """Bucket under way -> bytes of its delta."""
        self._plan = plan
        self._version = version
        self._digest = version_digest(checksums)
        self._base = base
        self._buckets = deque(plan.buckets)
        self._ready: deque[chunks.Question] = deque()
        """To be asked, once there is credit."""
        self._asked: dict[int, chunks.Question] = {}
        self._of: dict[int, int] = {}
        """Question -> bucket, until it is answered."""
        self._missing: dict[int, int] = {}
        """Bucket under way -> bytes of it that have not come."""
        self._room = 2 * max((bucket.size for bucket in plan.buckets), default=0)
        self._next = first_question

    @property
    def done(self) -> bool:
        """Every bucket came and was settled."""
        return not self._buckets and not self._missing

    def questions(self) -> Iterator[chunks.Question]:
        """What to ask now, within the credit."""
        while len(self._asked) < chunks.WINDOW and (self._ready or self._begun()):
            if self._ready:
                question = self._ready.popleft()
                self._asked[question.question] = question
                yield question

    def is_open(self, question: int) -> bool:
        """Whether it was asked here, and not answered."""
        return question in self._asked

    def again(self) -> list[chunks.Question]:
        """What was asked and not answered, for a new connection."""
        return list(self._asked.values())

    def found(self, answer: chunks.Found) -> None:
        """The length of a delta, or that there is none."""
        if not isinstance(self._asked.get(answer.question), chunks.Find):
            return
        del self._asked[answer.question]
        index = self._of.pop(answer.question)
        if 0 < answer.delta_bytes <= self._plan.buckets[index].size:
            self.delta_sizes[index] = answer.delta_bytes
            self._missing[index] = answer.delta_bytes
            self._want(index, [(0, answer.delta_bytes)], delta=index)
        else:
            self._want_whole(index)

    def arrived(self, question: int, size: int) -> Arrival | None:
        """`size` bytes came for a question; None if they are not what was asked for, or came before."""
        asked = self._asked.get(question)
        if not isinstance(asked, chunks.Get) or asked.size != size:
            return None
        del self._asked[question]
        index = self._of.pop(question)
        self._missing[index] -= size
        return Arrival(
            bucket=index,
            start=asked.start,
            size=size,
            delta=asked.delta >= 0,
            complete=not self._missing[index],
        )

    def settled(self, bucket: int) -> None:
        """A complete bucket is in its place: its memory is free for others."""
        del self._missing[bucket]
        self.delta_sizes.pop(bucket, None)

    def in_full(self, bucket: int) -> None:
        """A complete bucket came as a delta that does not lead to the right bytes: ask for all of it."""
        del self.delta_sizes[bucket]
        self._want_whole(bucket)

    def _begun(self) -> bool:
        """Whether one more bucket is under way now."""
        under_way = sum(self._plan.buckets[index].size for index in self._missing)
        if not self._buckets or (self._missing and under_way + self._buckets[0].size > self._room):
            return False
        bucket = self._buckets.popleft()
        if self._base is None or not bucket.size:
            self._want_whole(bucket.index)
        else:
            self._missing[bucket.index] = bucket.size
            self._add(
                bucket.index,
                chunks.Find(
                    question=self._number(),
                    version=self._version,
                    digest=self._digest,
                    base=self._base[0],
                    base_digest=self._base[1],
                    bucket=bucket.index,
                ),
            )
        return True

    def _want_whole(self, index: int) -> None:
        bucket = self._plan.buckets[index]
        if not bucket.size:
            return  # nothing of it travels
        self._missing[index] = bucket.size
        self._want(index, [(run.offset, run.size) for run in bucket.runs])

    def _want(self, index: int, ranges: Sequence[tuple[int, int]], delta: int = -1) -> None:
        for offset, length in ranges:
            for start in range(offset, offset + length, chunks.CHUNK_BYTES):
                size = min(chunks.CHUNK_BYTES, offset + length - start)
                self.bytes_asked += size
                self._add(
                    index,
                    chunks.Get(
                        question=self._number(),
                        version=self._version,
                        digest=self._digest,
                        start=start,
                        size=size,
                        delta=delta,
                    ),
                )

    def _add(self, index: int, question: chunks.Question) -> None:
        self._of[question.question] = index
        self._ready.append(question)

    def _number(self) -> int:
        self._next += 1
        return self._next
