"""A deterministic engine for tests and benchmarks: it speaks nonsense, at a set speed, with scripted faults, and takes
weights the way a real engine does.

Invariants (beside those of `engine.py`)
----------
- The next token, its logprob and the end of an answer are pure functions of (seed, all tokens so far): a rollout cut
  at any token and continued on any other `FakeEngine` of the same seed equals the uninterrupted one. The weights do
  not change the tokens; they change what `probe` answers.
- At temperature 0 the seed has no say: greedy answers are the same on every `FakeEngine` of one vocabulary and lengths.
- One task steps all slots; versions are stamped there, and weights change between two steps.
- KV cache is counted, not kept: how many tokens fit (`fake_batch`), and under which version each stream's was begun, so
  that preemptions and the `in_flight` policy can be seen.
- `stage` maps and verifies the offer's bytes; `apply` reads every byte again, as a copy would.
Used where `pools.engine = "fake"`, from one event loop; imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final, Literal

import msgspec

from asyncrl.generators.engine import Chunk, EngineDead, EngineStats, GenerationRequest
from asyncrl.generators.fake_batch import Batch, Stream
from asyncrl.generators.fake_speech import GREEDY_SEED, Lengths, Speech, probe_logprobs, weights_digest
from asyncrl.generators.hearing import Hearing
from asyncrl.generators.in_flight import AnswerLengths, InFlight, RequestFacts, is_recomputed
from asyncrl.weight_sync.checksum import bucket_checksum
from asyncrl.weight_sync.shm import map_version
from asyncrl.weight_sync.wire import Offer

logger = logging.getLogger(__name__)

_BREATH: Final = 64
"""After so many tokens in a row the event loop has its turn."""


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One thing that goes wrong once."""

    kind: Literal["raise", "hang", "die"]
    """raise: an `InjectedFault`, the engine goes on. hang: nothing comes any more. die: `EngineDead` for everything."""
    where: Literal["token", "stage", "apply"]
    at: int
    """`token`: instead of the at-th token (from 1) that this engine generates. Otherwise: at this version."""


class InjectedFault(RuntimeError):
    """A fault that the script of a `FakeEngine` asked for."""


class FakeEngine:
    """The deterministic engine. Satisfies `Engine`."""

    def __init__(
        self,
        *,
        seed: int = 0,
        vocab_size: int = 1024,
        slots: int = 64,
        step_s: float = 0.0,
        tokens_per_step: int = 1,
        lengths: Lengths | None = None,
        kv_capacity_tokens: int = 2**24,
        in_flight: InFlight = "keep",
        faults: Sequence[Fault] = (),
        version: int = -1,
    ) -> None:
        """Each step takes `step_s` and gives each of at most `slots` streams `tokens_per_step` tokens; further
        streams wait in line. `version` 0 or above: weights are there from the start, for use without weight sync."""
        self._seed = seed
        self._vocab_size = vocab_size
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._lengths = lengths or Lengths()
        self._faults = list(faults)
        self._version = version
        self._digest = weights_digest(())
        self._batch = Batch(slots, kv_capacity_tokens)
        self._kv_capacity_tokens = kv_capacity_tokens
        self._in_flight: InFlight = in_flight
        self._lengths_seen = AnswerLengths()
        self._recomputed = 0
        self._staged: tuple[Offer, mmap.mmap] | None = None
        self._work = asyncio.Event()
        self._boundary = asyncio.Lock()
        """Held by a step, and by `apply` between two steps."""
        self._stepping: asyncio.Task[None] | None = None
        self._dead: str | None = None
        self._hearing = Hearing()
        self._generated = 0
        self._stall_s = 0.0

    async def start(self) -> None:
        """Start the step loop."""
        self._check_alive()
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step_forever(), name="fake-engine-steps")

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """See `Engine`. Raises `EngineDead` or `InjectedFault`, after the tokens that were generated before."""
        self._check_alive()
        if self._stepping is None or self._version < 0:
            raise RuntimeError(f"request {request.request_id}: start the engine and apply weights first")
        if request.request_id in self._batch or request.max_new_tokens < 1:
            raise ValueError(
                f"request {request.request_id}: expected an id that is not running and max_new_tokens of at least 1, "
                f"got {request.max_new_tokens}"
            )
        seed = self._seed if request.temperature else GREEDY_SEED
        speech = Speech(seed, self._vocab_size, self._lengths, request.stop_token_ids, request.tokens)
        stream = Stream(request, speech)
        self._batch.add(stream)
        self._work.set()
        try:
            # Waits for: tokens, and leave to say them. Unblocked by: the step loop, abort, `release`, or the engine's death.
            # Ends: with the stream.
            while True:
                await stream.ready.wait()
                stream.ready.clear()
                chunk = stream.take()
                await self._hearing.heard()
                if chunk.tokens or chunk.finish_reason:
                    yield chunk
                if chunk.finish_reason:
                    return
                if stream.error:
                    raise stream.error
        finally:
            # After an abort the id may be another stream's by now.
            if self._batch.get(request.request_id) is stream:
                self._batch.remove(request.request_id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """See `Engine`."""
        for request_id in request_ids:
            if stream := self._batch.remove(request_id):
                stream.end(finish="abort")

    def stats(self) -> EngineStats:
        """See `Engine`."""
        used = min(self._batch.kv_used_tokens, self._kv_capacity_tokens)
        return EngineStats(
            version=self._version,
            running=len(self._batch),
            waiting=self._batch.waiting,
            generated_tokens=self._generated,
            preemptions=self._batch.preemptions,
            kv_capacity_tokens=self._kv_capacity_tokens,
            kv_free_tokens=self._kv_capacity_tokens - used,
            kv_used_fraction=used / self._kv_capacity_tokens,
            update_stall_s=self._stall_s,
            stale_kv=sum(stream.kv_version != self._version for stream in self._batch.running.values()),
            recomputed=self._recomputed,
        )

    async def shutdown(self) -> None:
        """See `Engine`. May be called twice."""
        self.die("the engine was shut down")
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait({self._stepping}, timeout=5.0)
        self._unmap()

    def die(self, reason: str) -> None:
        """As if the engine's processes ended: every open stream and every later call raises `EngineDead`."""
        self._dead = self._dead or reason
        self._hearing.end(self._dead)
        for stream in self._batch.clear():
            stream.end(error=EngineDead(self._dead))
        self._work.set()

    async def stage(self, offer: Offer) -> None:
        """See `WeightTarget`. The pass over the bytes runs in a thread, while streams go on."""
        self._check_alive()
        await self._strike("stage", offer.version)
        mapped = await asyncio.to_thread(map_version, offer)
        self._unmap()
        self._staged = (offer, mapped)

    async def apply(self, offer: Offer) -> float:
        """See `WeightTarget`."""
        self._check_alive()
        if self._staged is None or self._staged[0].version != offer.version:
            raise RuntimeError(f"version {offer.version} is not staged")
        async with self._boundary:
            started = time.monotonic()
            await self._strike("apply", offer.version)
            self._digest = await asyncio.to_thread(_digest_of, *self._staged)
            self._renew_caches(offer.version)
            self._version = offer.version
            stall_s = time.monotonic() - started
        self._stall_s += stall_s
        self._unmap()
        return stall_s

    async def discard(self, version: int) -> None:
        """See `WeightTarget`."""
        if self._staged is not None and self._staged[0].version == version:
            self._unmap()

    def hold(self) -> None:
        """See `WeightTarget`."""
        self._hearing.hold()

    def release(self) -> None:
        """See `WeightTarget`."""
        self._hearing.release()

    async def probe(self, tokens: Sequence[int]) -> list[float]:
        """See `WeightTarget`: `probe_logprobs` of the bytes last applied."""
        self._check_alive()
        return probe_logprobs(self._digest, tokens)

    async def _step_forever(self) -> None:
        """Waits for: streams. Unblocked by: `generate`, `die`. Ends: when the engine is dead or shut down."""
        try:
            while self._dead is None:
                await self._work.wait()
                async with self._boundary:
                    await asyncio.sleep(self._step_s)
                    self._batch.schedule(self._version, self._tokens_per_step)
                    for _ in range(self._tokens_per_step):
                        await self._step()
                if not self._batch:
                    self._work.clear()
        except EngineDead:
            logger.info("step loop ends: %s", self._dead)
        finally:
            self.die("the step loop ended")

    async def _step(self) -> None:
        """One token for each stream that runs."""
        for index, stream in enumerate(list(self._batch.running.values()), 1):
            if index % _BREATH == 0:
                await asyncio.sleep(0)
            if self._batch.running.get(stream.request_id) is not stream:
                continue
            try:
                if self._faults:
                    await self._strike("token", self._generated + 1)
            except InjectedFault as fault:
                stream.end(error=fault)
            else:
                stream.add(*stream.speech.speak(), self._version)
                self._generated += 1
            if stream.finish or stream.error:
                self._batch.remove(stream.request_id)
            if stream.finish:
                self._lengths_seen.add(stream.answered)

    def _renew_caches(self, version: int) -> None:
        """What the `in_flight` policy does to the running streams' KV cache; recomputing takes the fake engine no time."""
        for stream in self._batch.running.values():
            facts = RequestFacts(
                prefix_tokens=stream.context,
                answered_tokens=stream.answered,
                left_tokens=stream.left,
                drift_versions=version - stream.kv_version,
            )
            if is_recomputed(self._in_flight, facts, self._lengths_seen.mean_tokens):
                stream.kv_version = version
                self._recomputed += 1

    async def _strike(self, where: str, at: int) -> None:
        """Carry out the fault that is scripted for here and now, if any."""
        fault = next((fault for fault in self._faults if fault.where == where and fault.at == at), None)
        if fault is None:
            return
        self._faults.remove(fault)
        reason = f"scripted: {fault.kind} at {where} {at}"
        logger.info("fake engine fault %s", reason)
        if fault.kind == "hang":
            # Waits for nothing; ends when the caller is cancelled, as by `shutdown`.
            await asyncio.Event().wait()
        if fault.kind == "die":
            self.die(reason)
            raise EngineDead(reason)
        raise InjectedFault(reason)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead)

    def _unmap(self) -> None:
        # Not closed: a thread whose caller was cancelled may read it still, and its end frees the mapping.
        self._staged = None


def _digest_of(offer: Offer, mapped: mmap.mmap) -> int:
    return weights_digest([bucket_checksum(mapped, bucket) for bucket in offer.plan.buckets])
