"""One rollout's tokens on their way into the buffer: cut into segments of one version each, every one acknowledged before
the next is sent.

Invariants:
- `answer` is the whole answer so far, whoever sampled it; what the buffer has is a prefix of it.
- What an engine's death can cost is bounded by `flush_tokens`: a segment goes out at three quarters of it, so that it has
  arrived when so many are there.
Called by the dispatcher, one task for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyncrl.buffer import Segment
from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.buffer.wire import Leased
from asyncrl.generators.engine import Chunk
from asyncrl.generators.outbox import Outbox


@dataclass(slots=True)
class _Run:
    """Tokens of one version that the outbox does not have yet."""

    version: int
    start: int
    """Index in the answer."""
    logprobs: list[float]


class RolloutStream:
    """`add` takes what was sampled; where `due`, `flush` sends it. `finish` sends the last segment."""

    def __init__(self, lease: Leased, outbox: Outbox, flush_tokens: int) -> None:
        self._lease = lease
        self._outbox = outbox
        self._due_tokens = max(1, 3 * flush_tokens // 4)
        self.prompt: list[int] = _tokens(lease.prompt_tokens)
        self.answer: list[int] = _tokens(lease.tokens)
        self._spans: list[list[int]] = [[version, count] for version, count in lease.spans]
        self._sent = len(self.answer)
        self._runs: list[_Run] = []
        self._taken: asyncio.Future[bool] | None = None

    @property
    def versions(self) -> list[int]:
        """Of each token of the answer, `ENVIRONMENT` where no model sampled it."""
        return [version for version, count in self._spans for _ in range(count)]

    @property
    def turn_tokens(self) -> int:
        """Tokens sampled since the environment last spoke."""
        count = 0
        for version, tokens in reversed(self._spans):
            if version == ENVIRONMENT:
                break
            count += tokens
        return count

    @property
    def due(self) -> bool:
        return len(self._runs) > 1 or len(self.answer) - self._sent >= self._due_tokens

    def add(self, chunk: Chunk) -> None:
        if not chunk.tokens:
            return
        self._extend(chunk.tokens, chunk.logprobs, chunk.versions)

    def add_environment(self, tokens: Sequence[int]) -> None:
        """What the environment said: nobody sampled it, so its logprobs are 0."""
        self._extend(list(tokens), [0.0] * len(tokens), [ENVIRONMENT] * len(tokens))

    def _extend(self, tokens: list[int], logprobs: list[float], versions: list[int]) -> None:
        begin, count = 0, len(tokens)
        while begin < count:
            version, end = versions[begin], begin + 1
            while end < count and versions[end] == version:
                end += 1
            self._add_run(version, tokens[begin:end], logprobs[begin:end])
            begin = end

    def _add_run(self, version: int, tokens: list[int], logprobs: list[float]) -> None:
        if not self._runs or self._runs[-1].version != version:
            self._runs.append(_Run(version, len(self.answer), []))
        self._runs[-1].logprobs += logprobs
        self.answer += tokens
        if not self._spans or self._spans[-1][0] != version:
            self._spans.append([version, 0])
        self._spans[-1][1] += len(tokens)

    async def send(self) -> bool:
        """Hands what is there to the outbox once it has delivered what it got before; False when the lease is lost."""
        if not await self._acknowledged():
            return False
        self._put()
        return True

    async def flush(self) -> bool:
        """Sends what is left and waits for the buffer; False when the lease is lost."""
        return await self.send() and await self._acknowledged()

    async def finish(self, reason: str) -> bool:
        """Sends the last segment, which may be empty, and waits for the buffer; False when the lease is lost."""
        if not await self._acknowledged():
            return False
        self._put(reason)
        return await self._acknowledged()

    async def _acknowledged(self) -> bool:
        return self._taken is None or await self._taken

    def _put(self, finish_reason: str = "") -> None:
        runs, self._runs = self._runs, []
        if finish_reason and not runs:
            runs = [_Run(self._spans[-1][0] if self._spans else 0, len(self.answer), [])]
        if not runs:
            return
        segments = []
        for index, run in enumerate(runs):
            last = index + 1 == len(runs)
            segments.append(
                Segment(
                    rollout_id=self._lease.rollout_id,
                    lease_id=self._lease.lease_id,
                    start=run.start,
                    version=run.version,
                    tokens=self.answer[run.start : run.start + len(run.logprobs)],
                    logprobs=run.logprobs,
                    finish_reason=finish_reason if last else "",
                )
            )
        self._sent = len(self.answer)
        self._taken = self._outbox.put(segments)


def _tokens(int32: bytes) -> list[int]:
    found: list[int] = np.frombuffer(int32, np.int32).tolist()
    return found
