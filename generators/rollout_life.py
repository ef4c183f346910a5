"""One rollout under one lease, from the prefix that the lease carries to its score, or back to the queue.

    sample a turn --stop--> [ask the environment --tokens--> sample a turn ...] --end--> finish --> score
         |  recalled, engine dead                    |  failed
         +--> flush, release                         +--> failed with its reason

Invariants:
- The lease ends in exactly one of: scored, failed with a reason, released with its prefix, or lost (the buffer took it
  back, and nothing more is sent for it).
- Whatever interrupts it, every token that reached this process is in the buffer before the lease is released; nothing is
  sampled twice. What goes on elsewhere has the budget that is left, whether it was interrupted once or often.
- It holds a slot only while the engine samples for it.
- A baseline is sampled greedily by every engine that it comes to; for the rest it is a rollout like any other.
Called by the dispatcher, one task for each.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from asyncrl.buffer import BufferClient
from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.buffer.wire import Leased, Scored
from asyncrl.generators.config import SamplingConfig
from asyncrl.generators.engine import Engine, EngineDead, GenerationRequest
from asyncrl.generators.outbox import Outbox
from asyncrl.generators.rollout_stream import RolloutStream
from asyncrl.generators.score import RewardFailed, Score
from asyncrl.generators.turns import EnvironmentFailed, fits

logger = logging.getLogger(__name__)


_GO_ON: Final = "go on"
_ENDED: Final = "ended"
_OVER: Final = ""
"""Where a rollout is between two steps: to be sampled, at the end of a turn, or out of our hands. Anything else is a finish
reason."""


class Scorer(Protocol):
    async def score(self, answer_text: str, payload: str) -> Score: ...


class TurnTaker(Protocol):
    """The environment, see `turns`."""

    async def next_turn(
        self,
        prompt_tokens: Sequence[int],
        answer_tokens: Sequence[int],
        versions: Sequence[int],
        payload: str,
    ) -> list[int] | None: ...


class Seats(Protocol):
    """Who gives out the slots."""

    def step_out(self, key: str) -> None: ...

    def line_up(self, key: str) -> None:
        """`RolloutLife.grant` is called when there is a slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """What every rollout of one engine needs."""

    engine: Engine
    buffer: BufferClient
    outbox: Outbox
    scorer: Scorer
    turns: TurnTaker | None
    seats: Seats
    sampling: SamplingConfig
    seed: int | None
    """Of the run, where it is to be made again bit for bit."""
    stop_token_ids: tuple[int, ...]
    decode: Callable[[list[int]], str]


class RolloutLife:
    """`answer`, then `score` what it returned. `recall` asks it to go back to the queue, at any time."""

    def __init__(self, lease: Leased, kit: Kit) -> None:
        self.key = f"{lease.rollout_id}.{lease.lease_id}"
        """Names it in the engine and among the slots."""
        loop = asyncio.get_running_loop()
        self.left: asyncio.Future[None] = loop.create_future()
        """Done when it needs the engine no more: `answer` is over."""
        self._lease = lease
        self._kit = kit
        self._stream = RolloutStream(lease, kit.outbox, kit.sampling.flush_tokens)
        self._recall: asyncio.Future[None] = loop.create_future()
        self._grant: asyncio.Future[None] = loop.create_future()

    def recall(self) -> None:
        """Go back to the queue. The caller aborts the engine's stream."""
        if not self._recall.done():
            self._recall.set_result(None)

    def grant(self) -> None:
        """It has a slot again."""
        self._grant.set_result(None)

    async def answer(self) -> list[int] | None:
        """The whole answer once the buffer has all of it; None when the lease has ended otherwise.

        Raises `EngineDead` after everything that there was has been handed back.
        """
        if self._lease.finish_reason:
            return self._stream.answer
        step = _ENDED if self._awaits_environment() else _GO_ON
        # Ends with a finish reason (the budget runs out at the latest), or with the lease.
        while step in (_GO_ON, _ENDED):
            step = await (self._sample() if step == _GO_ON else self._ask())
        if step == _OVER:
            return None
        if await self._stream.finish(step):
            return self._stream.answer
        self._lost()
        return None

    @property
    def _budget(self) -> int:
        return self._kit.sampling.max_new_tokens - len(self._stream.answer)

    # ---- the model's turn --------------------------------------------------------------------------------------

    async def _sample(self) -> str:
        if self._budget <= 0:
            return "length"
        if self._recall.done():
            return await self._hand_back()
        # No suspension from here to the engine's own bookkeeping: an abort finds the request.
        try:
            async for chunk in self._kit.engine.generate(self._request()):
                self._stream.add(chunk)
                if chunk.finish_reason == "abort":
                    return await self._hand_back()
                if chunk.finish_reason:
                    return (
                        _ENDED if chunk.finish_reason == "stop" and self._kit.turns else chunk.finish_reason
                    )
                if self._stream.due and not await self._stream.send():
                    await self._kit.engine.abort([self.key])
                    return self._lost()
        except EngineDead:
            await self._hand_back()
            raise
        raise RuntimeError(f"the engine's stream of rollout {self.key} ended without a finish reason")

    def _request(self) -> GenerationRequest:
        sampling, stream = self._kit.sampling, self._stream
        return GenerationRequest(
            request_id=self.key,
            tokens=[*stream.prompt, *stream.answer],
            max_new_tokens=self._budget,
            temperature=0.0 if self._lease.greedy else sampling.temperature,
            stop_token_ids=self._kit.stop_token_ids,
            seed=None if self._kit.seed is None else (self._kit.seed, self._lease.rollout_id),
            answered_tokens=stream.turn_tokens,
            chunk_tokens=max(1, sampling.flush_tokens // 4),
        )

    # ---- the environment's turn --------------------------------------------------------------------------------

    def _awaits_environment(self) -> bool:
        """The prefix ends in a turn that was not answered: the engine before got no further."""
        answer, versions = self._stream.answer, self._stream.versions
        return (
            self._kit.turns is not None
            and bool(answer)
            and answer[-1] in self._kit.stop_token_ids
            and versions[-1] != ENVIRONMENT
        )

    async def _ask(self) -> str:
        """Waits, without a slot, for the environment (its own deadline ends that) or for the recall."""
        kit, lease, stream = self._kit, self._lease, self._stream
        assert kit.turns is not None
        if not await stream.flush():
            return self._lost()
        kit.seats.step_out(self.key)
        asked = asyncio.ensure_future(
            kit.turns.next_turn(stream.prompt, stream.answer, stream.versions, lease.payload)
        )
        try:
            waited: set[asyncio.Future[Any]] = {asked, self._recall}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                return await self._hand_back()
            reply = asked.result()
        except EnvironmentFailed as error:
            logger.warning("rollout %d: %s", lease.rollout_id, error)
            await kit.buffer.fail(lease.rollout_id, lease.lease_id, f"environment: {error.reason}")
            return _OVER
        finally:
            asked.cancel()
        if reply is None:
            return "stop"
        if not fits(reply, self._budget):
            return "length"
        stream.add_environment(reply)
        return await self._step_in()

    async def _step_in(self) -> str:
        """Waits in line for a slot, which the end of another rollout or a higher limit gives, or for the recall."""
        if not await self._stream.send():
            return self._lost()
        self._grant = asyncio.get_running_loop().create_future()
        self._kit.seats.line_up(self.key)
        await asyncio.wait({self._grant, self._recall}, return_when=asyncio.FIRST_COMPLETED)
        return await self._hand_back() if self._recall.done() else _GO_ON

    # ---- the end -----------------------------------------------------------------------------------------------

    async def _hand_back(self) -> str:
        if await self._stream.flush():
            await self._kit.buffer.release([(self._lease.rollout_id, self._lease.lease_id)])
            return _OVER
        return self._lost()

    def _lost(self) -> str:
        logger.info("rollout %d: lease %d is lost", self._lease.rollout_id, self._lease.lease_id)
        return _OVER

    async def score(self, answer: Sequence[int]) -> None:
        kit, lease = self._kit, self._lease
        text = kit.decode([t for t in answer if t not in kit.stop_token_ids])
        try:
            score = await kit.scorer.score(text, lease.payload)
        except RewardFailed as error:
            logger.warning("rollout %d: %s", lease.rollout_id, error)
            await kit.buffer.fail(lease.rollout_id, lease.lease_id, f"reward: {error.reason}")
            return
        await kit.buffer.score([Scored(lease.rollout_id, lease.lease_id, score.reward, score.cost)])
