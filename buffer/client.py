"""How the other parts talk to the buffer, whatever its number of shards: one asynchronous client (engines, feeder), and in
`reader` the blocking one of the learner.

A rollout's shard is its id modulo the number of shards. Bodies of some size go through the client's arena where client
and shard are on one host, else through the socket. Both wait with deadlines, go on after a restart of the buffer, and raise
the buffer's own errors by name.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Self, TypeVar

import msgspec
import numpy as np
import xxhash

from asyncrl.buffer import wire
from asyncrl.buffer.arena import Arena
from asyncrl.buffer.connection import BufferAddress, Connection
from asyncrl.buffer.errors import ArenaUnknown
from asyncrl.buffer.leasing import UNKNOWN_ROOM
from asyncrl.buffer.records import Counts, PromptRow, Segment
from asyncrl.buffer.reports import add_counts, add_reports

logger = logging.getLogger(__name__)

_ARENA_BYTES = 64 * 2**20
_IN_ARENA_BYTES = 16 * 1024
"""Shorter bodies cost less in a frame."""
_LOOK_ROUND_S = 0.25
"""How long a lease waits at one shard before it asks the next."""
_T = TypeVar("_T")


class BufferClient:
    """Asynchronous. Use as `async with BufferClient(address) as buffer`, on one event loop."""

    def __init__(self, address: BufferAddress) -> None:
        self._shards = [Connection(endpoint, address.keys) for endpoint in address.endpoints]
        self.shards = len(self._shards)
        self._arena: Arena | None = None
        self._attached: dict[int, bool] = {}
        self._last_lease: dict[tuple[int, str], int] = defaultdict(int)
        self._turns = itertools.count()

    async def __aenter__(self) -> Self:
        for connection in self._shards:
            connection.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._shards:
            await connection.close()
        if self._arena is not None:
            self._arena.close()

    async def ask(
        self,
        shard: int,
        request: wire.Request,
        body: bytes | memoryview | None = None,
        timeout_s: float = 0.0,
    ) -> Any:
        """The reply of one shard. Raises BufferUnreachable, DiskFull, LeaseLost or BadRequest."""
        return (await self._shards[shard].ask(request, body, timeout_s)).reply

    async def _ask_all(self, request: wire.Request, timeout_s: float = 0.0) -> list[Any]:
        return await _together(self.ask(s, request, timeout_s=timeout_s) for s in range(self.shards))

    # ---- admission ---------------------------------------------------------------------------------------------

    async def capacity(self, timeout_s: float) -> list[int]:
        """Prompts that each shard may admit now; waits until one may."""
        if self.shards == 1:
            return [(await self.ask(0, wire.Capacity(timeout_s=timeout_s), timeout_s=timeout_s)).value]
        now = [reply.value for reply in await self._ask_all(wire.Capacity(timeout_s=0.0))]
        if any(now):
            return now
        turn, wait_s = next(self._turns) % self.shards, min(timeout_s, _LOOK_ROUND_S * self.shards)
        found = await self.ask(turn, wire.Capacity(timeout_s=wait_s), timeout_s=wait_s)
        return [found.value if shard == turn else 0 for shard in range(self.shards)]

    async def admit(self, shard: int, prompts: Sequence[PromptRow], timeout_s: float = 60.0) -> wire.Admitted:
        """Raises BadRequest past the shard's capacity."""
        request = wire.Admit(
            positions=[p.position for p in prompts],
            prompt_ids=[p.prompt_id for p in prompts],
            payloads=[p.payload for p in prompts],
            lengths=[len(p.tokens) for p in prompts],
            timeout_s=timeout_s,
        )
        body = b"".join(np.asarray(p.tokens, np.int32).tobytes() for p in prompts)
        reply: wire.Admitted = await self.ask(shard, request, body, timeout_s)
        return reply

    # ---- rollouts ----------------------------------------------------------------------------------------------

    async def lease(
        self, engine_id: str, limit: int, timeout_s: float, kv_free_tokens: int = UNKNOWN_ROOM
    ) -> list[wire.Leased]:
        """Up to `limit` rollouts to work on; none when there was nothing to do for `timeout_s`. One call at a time for
        each engine: the last lease that it got says what it knows of.

        `kv_free_tokens`: room in the engine's KV cache beside what it holds. Partial rollouts that are longer go to engines
        with more room, for some seconds; -1 where it is not known. With several shards each gives by all of the room.
        """
        first = next(self._turns)
        found: list[wire.Leased] = []
        if self.shards > 1:
            for shard in range(first, first + self.shards):
                if len(found) < limit:
                    left = limit - len(found)
                    found += await self._lease_at(shard % self.shards, engine_id, left, 0.0, kv_free_tokens)
        deadline = asyncio.get_running_loop().time() + timeout_s
        step_s = timeout_s if self.shards == 1 else min(timeout_s, _LOOK_ROUND_S)
        # Waits at one shard after the other for work; ends with some, or at the deadline.
        for shard in itertools.count(first):
            if found:
                break
            found = await self._lease_at(shard % self.shards, engine_id, limit, step_s, kv_free_tokens)
            if asyncio.get_running_loop().time() >= deadline:
                break
        return found

    async def _lease_at(
        self, shard: int, engine_id: str, limit: int, timeout_s: float, kv_free_tokens: int
    ) -> list[wire.Leased]:
        last = self._last_lease[shard, engine_id]
        request = wire.Lease(
            engine_id=engine_id, limit=limit, after=last, timeout_s=timeout_s, kv_free_tokens=kv_free_tokens
        )
        found: list[wire.Leased] = (await self.ask(shard, request, timeout_s=timeout_s)).rollouts
        self._last_lease[shard, engine_id] = max([last, *(lease.lease_id for lease in found)])
        return found

    async def append(self, engine_id: str, segments: Sequence[Segment]) -> list[int]:
        """Returns the rollouts whose lease is lost."""
        parts = self._by_shard(segments, lambda s: s.rollout_id)
        refused = await _together(self._append_at(shard, engine_id, part) for shard, part in parts.items())
        return [rollout_id for ids in refused for rollout_id in ids]

    async def _append_at(self, shard: int, engine_id: str, segments: Sequence[Segment]) -> list[int]:
        lengths = [len(s.tokens) for s in segments]
        nbytes = 8 * sum(lengths)
        arena = await self._arena_at(shard) if nbytes >= _IN_ARENA_BYTES else None
        region = arena.allocate(nbytes) if arena else None
        body = arena.view(region) if arena and region else memoryview(bytearray(nbytes))
        _fill(body, segments, lengths)
        request = wire.Append(
            engine_id=engine_id,
            rollout_ids=[s.rollout_id for s in segments],
            lease_ids=[s.lease_id for s in segments],
            starts=[s.start for s in segments],
            versions=[s.version for s in segments],
            lengths=lengths,
            finish_reasons=[s.finish_reason for s in segments],
            region=region,
            body_hash=xxhash.xxh3_64_intdigest(body) if region else 0,
        )
        try:
            reply = await self.ask(shard, request, None if region else body)
        except ArenaUnknown:
            # The service was started anew, and may be again at any moment. This body goes in a frame; the next one
            # that is long enough has the arena shown again.
            self._attached.pop(shard, None)
            in_frame = msgspec.structs.replace(request, region=None, body_hash=0)
            reply = await self.ask(shard, in_frame, bytes(body))
        if arena and region:
            arena.free(region)  # not in `finally`: after an error the request may still be read
        refused: list[int] = reply.rollout_ids
        return refused

    async def _arena_at(self, shard: int) -> Arena | None:
        """The arena, once the shard has mapped it; None where it cannot."""
        if self._arena is None:
            self._arena = Arena(_ARENA_BYTES)
        if shard not in self._attached:
            reply = await self.ask(shard, wire.Attach(location=self._arena.location))
            self._attached[shard] = not reply.refused
            if reply.refused:
                logger.info("shard %d: bodies go through the socket: %s", shard, reply.refused)
        return self._arena if self._attached[shard] else None

    async def score(self, scored: Sequence[wire.Scored]) -> list[int]:
        """Returns the rollouts whose lease is lost."""
        parts = self._by_shard(scored, lambda s: s.rollout_id)
        replies = await _together(self.ask(s, wire.Score(rollouts=part)) for s, part in parts.items())
        return [rollout_id for reply in replies for rollout_id in reply.rollout_ids]

    async def fail(self, rollout_id: int, lease_id: int, reason: str) -> None:
        request = wire.Fail(rollout_id=rollout_id, lease_id=lease_id, reason=reason)
        await self.ask(rollout_id % self.shards, request)

    async def release(self, leases: Sequence[tuple[int, int]]) -> None:
        parts = self._by_shard(leases, lambda lease: lease[0])
        await _together(self.ask(s, wire.Release(leases=part)) for s, part in parts.items())

    async def heartbeat(self, engine_id: str) -> None:
        await self._ask_all(wire.Heartbeat(engine_id=engine_id))

    async def engine_lost(self, engine_id: str, *, for_good: bool = False) -> int:
        """Queues again what a dead engine held; returns how many rollouts that were. `for_good`: its id gets no lease any
        more, and who asks for one under it gets EngineBarred."""
        lost = wire.EngineLost(engine_id=engine_id, for_good=for_good)
        return sum(reply.value for reply in await self._ask_all(lost))

    def _by_shard(self, items: Iterable[_T], rollout_id: Any) -> dict[int, list[_T]]:
        if self.shards == 1:
            return {0: list(items)}
        parts: dict[int, list[_T]] = defaultdict(list)
        for item in items:
            parts[rollout_id(item) % self.shards].append(item)
        return parts

    # ---- the run -----------------------------------------------------------------------------------------------

    async def status(self) -> wire.Report:
        return add_reports(await self._ask_all(wire.Status()))

    async def stop(self) -> Counts:
        return add_counts([reply.counts for reply in await self._ask_all(wire.Stop())])


def _fill(body: memoryview, segments: Sequence[Segment], lengths: Sequence[int]) -> None:
    """Writes the columns of all segments: tokens int32, then logprobs float32."""
    total = sum(lengths)
    tokens = np.frombuffer(body, np.int32, total)
    logprobs = np.frombuffer(body, np.float32, total, 4 * total)
    if segments and all(type(s.tokens) is np.ndarray and type(s.logprobs) is np.ndarray for s in segments):
        np.concatenate([s.tokens for s in segments], out=tokens, casting="same_kind")
        np.concatenate([s.logprobs for s in segments], out=logprobs, casting="same_kind")
        return
    at = 0
    for segment, length in zip(segments, lengths, strict=True):
        tokens[at : at + length] = segment.tokens
        logprobs[at : at + length] = segment.logprobs
        at += length


async def _together(calls: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """All at once; with one call no task is made."""
    waiting = list(calls)
    if len(waiting) == 1:
        return [await waiting[0]]
    return list(await asyncio.gather(*waiting))
