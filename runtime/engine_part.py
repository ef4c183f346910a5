"""One engine's process: the engine, the receiver of its weights, its dispatcher and its reward workers.

Made by `placement` as an asynchronous Ray actor: `receive` and `dispatch` run for the life of the run and are watched
by the supervisor, the other calls are short. Everything lives on the actor's one event loop.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

from asyncrl.buffer import BufferAddress, BufferClient
from asyncrl.generators.config import PoolConfig
from asyncrl.generators.dispatcher import Dispatcher
from asyncrl.generators.engine import Engine
from asyncrl.generators.evaluation import Evaluation, evaluate
from asyncrl.generators.prompts import Prompt
from asyncrl.generators.reward_pool import RewardPool
from asyncrl.generators.tokens import decode_answer, load_tokenizer, stop_token_ids
from asyncrl.recipes import Recipe
from asyncrl.runtime.facts import EngineFacts
from asyncrl.runtime.part_log import write_log_to
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.weight_sync.receiver import Receiver


def make_engine(
    recipe: Recipe, pool: PoolConfig, engine_id: str, first_core: int | None, vocabulary: int
) -> Engine:
    """The one place where a pool's `engine` is turned into code."""
    if pool.engine == "fake":
        from asyncrl.generators.fake_engine import FakeEngine

        return FakeEngine(vocab_size=vocabulary, slots=pool.max_concurrency, step_s=0.002)
    from asyncrl.generators.vllm_engine import VLLMEngine

    return VLLMEngine(
        pool,
        recipe.model.path,
        engine_id,
        recipe.model.max_context_tokens,
        seed=recipe.prompts.seed,
        first_core=first_core,
    )


class EnginePart:
    """`start`, then `receive`, then `dispatch` (and `evaluate` where nothing is dispatched), `stop`, `shutdown`."""

    def __init__(
        self, recipe: Recipe, folder: str, pool_index: int, engine_id: str, first_core: int | None
    ) -> None:
        write_log_to(RunFolder(Path(folder)).log(engine_id))
        self._recipe = recipe
        self._pool = recipe.pools[pool_index]
        self._engine_id = engine_id
        tokenizer = load_tokenizer(recipe.model.path)
        self._stop_token_ids = stop_token_ids(tokenizer, recipe.model.path)
        self._decode = partial(decode_answer, tokenizer)
        self._engine = make_engine(recipe, self._pool, engine_id, first_core, len(tokenizer))
        self._rewards: RewardPool | None = None
        self._receiver: Receiver | None = None
        self._dispatcher: Dispatcher | None = None
        self._serving = False
        self._seen = (time.monotonic(), 0)

    async def start(self) -> None:
        await self._engine.start()
        self._rewards = await asyncio.to_thread(RewardPool, self._recipe.rewards)
        self._serving = True

    async def receive(self, endpoint: str) -> None:
        """Takes weights until cancelled or broken."""
        self._receiver = Receiver(self._engine, endpoint, self._engine_id)
        await self._receiver.run()

    async def dispatch(self, address: BufferAddress) -> None:
        """Generates until `stop`, or until something breaks: the first fault is raised by itself."""
        try:
            async with BufferClient(address) as buffer:
                self._dispatcher = Dispatcher(
                    engine=self._engine,
                    engine_id=self._engine_id,
                    buffer=buffer,
                    scorer=self._scorer(),
                    sampling=self._recipe.sampling,
                    concurrency=self._pool.first_concurrency,
                    stop_token_ids=self._stop_token_ids,
                    decode=self._decode,
                )
                await self._dispatcher.run()
        except BaseExceptionGroup as group:
            raise first_fault(group) from group
        finally:
            self._dispatcher = None

    async def evaluate(self, prompts: list[Prompt], label: str) -> Evaluation:
        try:
            return await evaluate(
                engine=self._engine,
                scorer=self._scorer(),
                prompts=prompts,
                sampling=self._recipe.sampling,
                stop_token_ids=self._stop_token_ids,
                decode=self._decode,
                concurrency=self._pool.first_concurrency,
                label=label,
            )
        except BaseExceptionGroup as group:
            raise first_fault(group) from group

    async def status(self) -> EngineFacts:
        stats = self._engine.stats()
        now, (then, before) = time.monotonic(), self._seen
        self._seen = (now, stats.generated_tokens)
        used = self._dispatcher.slots_used if self._dispatcher else 0
        idle = self._dispatcher is not None and used < self._pool.first_concurrency
        return EngineFacts(
            engine_id=self._engine_id,
            pool=self._pool.name,
            state="starting" if not self._serving else "serving" if stats.running else "idle",
            version=stats.version,
            slots_used=used,
            slots=self._pool.first_concurrency,
            tokens_per_s=(stats.generated_tokens - before) / max(now - then, 1e-3),
            waits_for="prompts" if idle else "",
        )

    async def stop(self) -> None:
        """Hands every rollout back; `dispatch` then returns."""
        if self._dispatcher is not None:
            await self._dispatcher.stop()

    async def shutdown(self) -> None:
        """Ends the engine's and the rewards' processes."""
        if self._rewards is not None:
            await self._rewards.close()
        await self._engine.shutdown()

    def _scorer(self) -> RewardPool:
        if self._rewards is None:
            raise RuntimeError(f"engine {self._engine_id} was not started")
        return self._rewards


def first_fault(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that began it: the others of a task group are its consequences."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return first_fault(error)
        if not isinstance(error, asyncio.CancelledError):
            return error
    return group.exceptions[0]
