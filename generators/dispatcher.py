"""Keeps one engine busy: leases rollouts, streams their tokens to the buffer, has them scored.

Invariants:
- Every lease ends in exactly one of: scored, failed with a reason, released with its prefix, or lost (the buffer took
  it back, and nothing more is sent for it).
- At most `concurrency` rollouts are generated at once; an answer that is being scored holds no slot, and at most
  `_SCORING_PER_SLOT` x concurrency answers wait for their score before leasing pauses.
- After `flush_tokens` tokens, at a version change and at the end a segment goes out: a crash loses no more than that.
- A buffer that is started again is waited for by its client, which sends again what was not acknowledged: every call here
  is one that may be repeated, so nothing is lost or doubled. Longer than that, and the buffer's error ends the run.
Runs in the engine's process, on one event loop; started by `runtime.engine_part`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np

from asyncrl.buffer import BufferClient, Segment
from asyncrl.buffer.wire import Leased, Scored
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.engine import Chunk, Engine, GenerationRequest
from asyncrl.generators.outbox import Outbox
from asyncrl.generators.reward_pool import RewardFailed, Score

logger = logging.getLogger(__name__)

_LEASE_WAIT_S = 5.0
_HEARTBEAT_S = 10.0
_SCORING_PER_SLOT = 8


class Scorer(Protocol):
    async def score(self, answer_text: str, payload: str) -> Score: ...


class Dispatcher:
    """`run` works until `stop` or a fault; `concurrency` may be changed while it does."""

    def __init__(
        self,
        *,
        engine: Engine,
        engine_id: str,
        buffer: BufferClient,
        scorer: Scorer,
        sampling: SamplingConfig,
        concurrency: int,
        stop_token_ids: tuple[int, ...],
        decode: Callable[[list[int]], str],
    ) -> None:
        self._engine = engine
        self._engine_id = engine_id
        self._buffer = buffer
        self._scorer = scorer
        self._sampling = sampling
        self.concurrency = concurrency
        self._stop_token_ids = stop_token_ids
        self._decode = decode
        self._outbox = Outbox(buffer, engine_id)
        self._generating: set[str] = set()
        self._scoring = 0
        self._room = asyncio.Event()
        self._stopping = False

    @property
    def slots_used(self) -> int:
        return len(self._generating)

    async def run(self) -> None:
        """Ends after `stop`, when every lease has ended; raises the first fault (EngineDead, BufferUnreachable)."""
        async with asyncio.TaskGroup() as tasks:
            outbox = tasks.create_task(self._outbox.run(), name="outbox")
            heartbeat = tasks.create_task(self._heartbeats(), name="heartbeat")
            async with asyncio.TaskGroup() as rollouts:
                await self._lease_all(rollouts)
            outbox.cancel()
            heartbeat.cancel()

    async def stop(self) -> None:
        """Hands everything back: partial rollouts return to the queue with their prefix."""
        self._stopping = True
        self._room.set()
        await self._engine.abort(sorted(self._generating))

    # ---- leasing -----------------------------------------------------------------------------------------------

    def _free(self) -> int:
        if self._scoring >= _SCORING_PER_SLOT * self.concurrency:
            return 0
        return self.concurrency - len(self._generating)

    async def _lease_all(self, rollouts: asyncio.TaskGroup) -> None:
        """Waits for a free slot (a rollout of ours ends), then for the buffer to have work; ends on `stop`."""
        while not self._stopping:
            if self._free() <= 0:
                self._room.clear()
                await self._room.wait()
                continue
            for lease in await self._buffer.lease(self._engine_id, self._free(), _LEASE_WAIT_S):
                self._generating.add(_request_id(lease))
                rollouts.create_task(self._carry_out(lease), name=f"rollout-{lease.rollout_id}")

    async def _heartbeats(self) -> None:
        """Tells the buffer that the engine lives, so that slow prefills keep their leases; ends when cancelled."""
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            await self._buffer.heartbeat(self._engine_id)

    # ---- one rollout -------------------------------------------------------------------------------------------

    async def _carry_out(self, lease: Leased) -> None:
        try:
            answer = await self._generate(lease)
        finally:
            self._generating.discard(_request_id(lease))
            self._room.set()
        if answer is None:
            return
        self._scoring += 1
        try:
            await self._score(lease, answer)
        finally:
            self._scoring -= 1
            self._room.set()

    async def _generate(self, lease: Leased) -> list[int] | None:
        """The whole answer once the buffer has all of it; None when the lease ended otherwise."""
        stream = RolloutStream(lease, self._outbox, self._sampling.flush_tokens)
        left = self._sampling.max_new_tokens - len(stream.answer)
        if lease.finish_reason or left <= 0:
            return stream.answer if await stream.finish(lease.finish_reason or "length") else None
        if self._stopping:
            await self._buffer.release([(lease.rollout_id, lease.lease_id)])
            return None
        request = GenerationRequest(
            request_id=_request_id(lease),
            tokens=[*_tokens(lease.prompt_tokens), *stream.answer],
            max_new_tokens=left,
            temperature=self._sampling.temperature,
            stop_token_ids=self._stop_token_ids,
        )
        async for chunk in self._engine.generate(request):
            if not await stream.add(chunk):
                logger.info("rollout %d: lease %d is lost", lease.rollout_id, lease.lease_id)
                await self._engine.abort([request.request_id])
                return None
            if chunk.finish_reason == "abort":
                if await stream.flush():
                    await self._buffer.release([(lease.rollout_id, lease.lease_id)])
                return None
            if chunk.finish_reason:
                return stream.answer if await stream.finish(chunk.finish_reason) else None
        raise RuntimeError(
            f"engine {self._engine_id}: stream of {request.request_id} ended without a finish reason"
        )

    async def _score(self, lease: Leased, answer: list[int]) -> None:
        text = self._decode([t for t in answer if t not in self._stop_token_ids])
        try:
            score = await self._scorer.score(text, lease.payload)
        except RewardFailed as error:
            logger.warning("rollout %d: %s", lease.rollout_id, error)
            await self._buffer.fail(lease.rollout_id, lease.lease_id, f"reward: {error.reason}")
            return
        await self._buffer.score([Scored(lease.rollout_id, lease.lease_id, score.reward)])


class RolloutStream:
    """Cuts one rollout's chunks into segments and sees each acknowledged before the next is sent."""

    def __init__(self, lease: Leased, outbox: Outbox, flush_tokens: int) -> None:
        self._lease = lease
        self._outbox = outbox
        self._flush_tokens = flush_tokens
        self.answer = _tokens(lease.tokens)
        self._sent = len(self.answer)
        self._logprobs: list[float] = []
        self._version = 0
        self._taken: asyncio.Future[bool] | None = None

    async def add(self, chunk: Chunk) -> bool:
        """False when the lease is lost."""
        for token, logprob, version in zip(chunk.tokens, chunk.logprobs, chunk.versions, strict=True):
            if version != self._version:
                if self._logprobs and not await self._send():
                    return False
                self._version = version
            self.answer.append(token)
            self._logprobs.append(logprob)
        return len(self._logprobs) < self._flush_tokens or await self._send()

    async def flush(self) -> bool:
        """Sends what is left and waits for the buffer; False when the lease is lost."""
        if self._logprobs and not await self._send():
            return False
        return await self._acknowledged()

    async def finish(self, reason: str) -> bool:
        """Sends the last segment, which may be empty; False when the lease is lost."""
        return await self._send(reason) and await self._acknowledged()

    async def _acknowledged(self) -> bool:
        return self._taken is None or await self._taken

    async def _send(self, finish_reason: str = "") -> bool:
        if not await self._acknowledged():
            return False
        segment = Segment(
            rollout_id=self._lease.rollout_id,
            lease_id=self._lease.lease_id,
            start=self._sent,
            version=self._version,
            tokens=self.answer[self._sent :],
            logprobs=self._logprobs,
            finish_reason=finish_reason,
        )
        self._sent, self._logprobs = len(self.answer), []
        self._taken = self._outbox.put(segment)
        return True


def _tokens(int32: bytes) -> list[int]:
    found: list[int] = np.frombuffer(int32, np.int32).tolist()
    return found


def _request_id(lease: Leased) -> str:
    return f"{lease.rollout_id}.{lease.lease_id}"
