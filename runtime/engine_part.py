"""One engine's process: the engine, the receiver of its weights, its dispatcher, and the workers of rewards and environment.

Made by `placement` as an asynchronous Ray actor, and led through its life by its keeper (`engine_keeper`): `receive` and
`dispatch` last long and are watched there, the other calls are short. Everything lives on the actor's one event loop.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

import ray

from asyncrl.buffer import BufferAddress, BufferClient
from asyncrl.buffer.keys import ClientKeys, secure_client
from asyncrl.generators.collector import leave_out_what_is_loaded
from asyncrl.generators.config import PoolConfig
from asyncrl.generators.dispatcher import Dispatcher
from asyncrl.generators.engine import Engine
from asyncrl.generators.evaluation import Asking, HeldOutAnswer, Means, evaluate
from asyncrl.generators.prompts import Prompt
from asyncrl.generators.reward_pool import RewardPool
from asyncrl.generators.tokens import decode_answer, load_tokenizer, stop_token_ids
from asyncrl.generators.turns import Turns, open_turns
from asyncrl.recipes import Recipe
from asyncrl.runtime.facts import EngineFacts, EngineState
from asyncrl.runtime.part_log import write_log_to
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.receiver import Receiver


def make_engine(
    recipe: Recipe, pool: PoolConfig, engine_id: str, first_core: int | None, vocabulary: int
) -> Engine:
    """The one place where a pool's `engine` is turned into code."""
    if pool.engine == "fake":
        from asyncrl.generators.fake_engine import FakeEngine

        return FakeEngine(
            vocab_size=vocabulary,
            slots=pool.max_concurrency,
            step_s=pool.fake.step_s,
            tokens_per_step=pool.fake.tokens_per_step,
            lengths=pool.fake.lengths,
            kv_capacity_tokens=pool.fake.kv_capacity_tokens,
            in_flight=recipe.weight_sync.in_flight,
        )
    from asyncrl.generators.vllm_engine import VLLMEngine

    return VLLMEngine(
        pool,
        recipe.model.path,
        engine_id,
        recipe.model.max_context_tokens,
        seed=recipe.prompts.seed,
        first_core=first_core,
        in_flight=recipe.weight_sync.in_flight,
        prefix_cache=recipe.weight_sync.prefix_cache,
        adapter_rank=recipe.adapter_rank,
        float8=recipe.weight_sync.wire_dtype == "float8",
        whole_prompts=recipe.run.deterministic,
    )


class EnginePart:
    """`start`, `join`, then `receive` beside `dispatch` and `evaluate`, `stop`, `shutdown`."""

    def __init__(
        self, recipe: Recipe, folder: str, pool_index: int, engine_id: str, first_core: int | None
    ) -> None:
        write_log_to(RunFolder(Path(folder)).log(engine_id))
        self._recipe = recipe
        self._pool = recipe.pools[pool_index]
        self._engine_id = engine_id
        tokenizer = load_tokenizer(recipe.model.path)
        environment = recipe.environment
        self._stop_token_ids = stop_token_ids(
            tokenizer, recipe.model.path, environment.stop_tokens if environment else ()
        )
        self._decode = partial(decode_answer, tokenizer)
        self._engine: Engine = make_engine(recipe, self._pool, engine_id, first_core, len(tokenizer))
        self._rewards: RewardPool | None = None
        self._turns: Turns | None = None
        self._receiver: Receiver | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._dispatcher: Dispatcher | None = None
        self._seen = (time.monotonic(), 0)

    async def start(self) -> str:
        """Loads the model; returns the name of the machine that it runs on."""
        await self._engine.start()
        self._rewards = await asyncio.to_thread(
            RewardPool, self._recipe.rewards, needs_cost=self._recipe.needs_costs
        )
        self._turns = await asyncio.to_thread(open_turns, self._recipe.environment, self._recipe.model.path)
        leave_out_what_is_loaded()
        node = ray.get_runtime_context().get_node_id()
        return f"{ray.util.get_node_ip_address()} ({node[:6]})"

    async def join(self, endpoint: str, keys: ClientKeys, timeout_s: float) -> int:
        """Joins the learner's publisher, which has the run's keys, and waits for the present weights; returns their version.

        Raises VersionTimeout, or what ended the receiver before.
        """
        self._receiver = Receiver(
            self._engine, endpoint, self._engine_id, secure=partial(secure_client, keys=keys)
        )
        self._receiving = asyncio.create_task(self._receiver.run(), name="receiver")
        try:
            await self._receiver.wait_for_version(0, timeout_s)
        except WeightSyncError:
            if self._receiving.done():
                self._receiving.result()  # its own error says more
            raise
        return self._receiver.version

    async def receive(self) -> None:
        """Takes weights until cancelled or broken; after `join`."""
        if self._receiving is None:
            raise RuntimeError(f"engine {self._engine_id} has not joined")
        await self._receiving

    async def dispatch(self, address: BufferAddress, concurrency: int) -> None:
        """Generates until `stop`, or until something breaks: the first fault is raised by itself."""
        try:
            async with BufferClient(address) as buffer:
                self._dispatcher = Dispatcher(
                    engine=self._engine,
                    engine_id=self._engine_id,
                    buffer=buffer,
                    scorer=self._scorer(),
                    turns=self._turns,
                    sampling=self._recipe.sampling,
                    seed=self._recipe.prompts.seed if self._recipe.run.deterministic else None,
                    concurrency=concurrency,
                    stop_token_ids=self._stop_token_ids,
                    decode=self._decode,
                )
                await self._dispatcher.run()
        except BaseExceptionGroup as group:
            raise first_fault(group) from group
        finally:
            self._dispatcher = None

    async def set_concurrency(self, concurrency: int) -> None:
        """More slots at once; fewer by handing the newest rollouts back. 0: all of them."""
        if self._dispatcher is not None:
            await self._dispatcher.set_concurrency(concurrency)

    async def evaluate(
        self, prompts: list[Prompt], asking: Asking, timeout_s: float
    ) -> list[list[HeldOutAnswer]]:
        """The answers to each prompt; beside `dispatch` as well. Past its time nobody wants them, and it ends by itself.

        Begins with the version that is asked for: an engine may be some versions behind the learner."""
        means = Means(
            engine=self._engine,
            scorer=self._scorer(),
            turns=self._turns,
            stop_token_ids=self._stop_token_ids,
            decode=self._decode,
        )
        try:
            async with asyncio.timeout(timeout_s):
                if self._receiver is not None:
                    await self._receiver.wait_for_version(asking.version, timeout_s)
                answers = await evaluate(means, prompts, asking)
        except BaseExceptionGroup as group:
            raise first_fault(group) from group
        return answers

    async def status(self) -> EngineFacts:
        """As this process sees it: the keeper knows of its starts and deaths."""
        stats = self._engine.stats()
        now, (then, before) = time.monotonic(), self._seen
        self._seen = (now, stats.generated_tokens)
        used = self._dispatcher.slots_used if self._dispatcher else 0
        slots = self._dispatcher.concurrency if self._dispatcher else 0
        state: EngineState = "serving" if stats.running else "idle"
        return EngineFacts(
            engine_id=self._engine_id,
            pool=self._pool.name,
            state=state,
            version=stats.version,
            weights=self._receiver.digest_of(stats.version) if self._receiver is not None else "",
            slots_used=used,
            slots=slots,
            tokens_per_s=(stats.generated_tokens - before) / max(now - then, 1e-3),
            waits_for="prompts" if used < slots else "",
            kv_used_fraction=stats.kv_used_fraction,
            preemptions=stats.preemptions,
            waiting=stats.waiting,
        )

    async def stop(self) -> None:
        """Hands every rollout back; `dispatch` then returns."""
        if self._dispatcher is not None:
            await self._dispatcher.stop()

    async def shutdown(self) -> None:
        """Leaves the publisher, and ends the engine's and the rewards' processes."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.gather(self._receiving, return_exceptions=True)
        if self._rewards is not None:
            await self._rewards.close()
        if self._turns is not None:
            await self._turns.close()
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
