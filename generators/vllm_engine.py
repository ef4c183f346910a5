"""The vLLM engine: streams tokens out of `AsyncLLM` and takes weights in between two of its steps.

                     this process                             child process (spawned)
    generate() ---> AsyncLLM ----- ZMQ, msgpack ------> EngineCore: scheduler, KV cache, model
    stage()         verifies checksums of /dev/shm           |
    apply()   ----> pause, load, label, resume -------> OfferedWeights (asyncrl.weight_sync.vllm_worker)

`vllm_core` is the core and its life, `vllm_requests` how tokens come out, `vllm_weights` how weights come in; each states
its invariants. The model starts with dummy weights and refuses to generate until the first `apply`; where versions are LoRA
adapters, it starts with the base and refuses likewise.
Called from one event loop. Importing this module does not import vLLM; `start` does.
"""

from __future__ import annotations

import asyncio
import tempfile
import zlib
from collections.abc import AsyncIterator, Sequence

from asyncrl.generators.config import PoolConfig
from asyncrl.generators.engine import Chunk, EngineStats, GenerationRequest
from asyncrl.generators.in_flight import InFlight
from asyncrl.generators.vllm_core import VLLMCore
from asyncrl.generators.vllm_requests import VLLMRequests
from asyncrl.generators.vllm_start import Launch
from asyncrl.generators.vllm_weights import VLLMWeights
from asyncrl.weight_sync.wire import Offer


class VLLMEngine:
    """`Engine` (see `asyncrl.generators.engine`) on vLLM's `AsyncLLM`, for CPU and CUDA pools.

    `max_model_len` bounds prompt plus answer in tokens. `seed` and `engine_id` together seed the sampler, so that two
    engines never draw the same answers. `first_core` binds a CPU engine to the cores [first_core, first_core +
    cores * tensor_parallel); without it the kernel places the engine's threads, `cores` of them computing. `in_flight` and
    `prefix_cache` are those of `[weight_sync]`. `whole_prompts`: for requests with a seed. With `adapter_rank` above 0 the base is
    read from `model_path` and each version is a LoRA adapter of that rank, which takes the place of the one before. `float8`:
    linear weights come as codes and scales (`asyncrl.weight_sync.float8`) and are computed with as such.
    """

    def __init__(
        self,
        pool: PoolConfig,
        model_path: str,
        engine_id: str,
        max_model_len: int,
        seed: int = 0,
        *,
        first_core: int | None = None,
        in_flight: InFlight = "keep",
        prefix_cache: bool = True,
        whole_prompts: bool = False,
        adapter_rank: int = 0,
        float8: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="asyncrl-")  # 0700: vLLM's sockets are in it
        wanted = Launch(
            engine_id=engine_id,
            pool=pool,
            model_path=model_path,
            max_model_len=max_model_len,
            seed=zlib.crc32(f"{seed}/{engine_id}".encode()) & 0x7FFFFFFF,
            first_core=first_core,
            prefix_cache=prefix_cache,
            whole_prompts=whole_prompts,
            adapter_rank=adapter_rank,
            float8=float8,
            folder=self._folder.name,
        )
        self._core = VLLMCore(wanted)
        self._requests = VLLMRequests(self._core, max_model_len, in_flight)
        self._weights = VLLMWeights(self._core, self._requests)

    async def start(self) -> None:
        """Start the engine's processes and build the model with dummy weights. Raises `EngineDead` if it cannot."""
        await self._core.start()

    def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the tokens of `request` as they are sampled. Raises `EngineDead`, `ValueError` for a request that
        does not fit `max_model_len`, and `RuntimeError` before the first weights."""
        return self._requests.generate(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End these streams with the tokens that were sampled and not yet streamed; unknown ids are ignored."""
        await self._requests.abort(request_ids)

    async def gpus(self) -> tuple[str, ...]:
        """UUIDs of the GPUs that it computes on, once it has started; none on the CPU."""
        return await self._weights.gpus()

    async def stage(self, offer: Offer) -> None:
        """Verify the offer's bytes, while generation goes on. Raises as `VLLMWeights.stage`."""
        await self._weights.stage(offer)

    async def discard(self, version: int) -> None:
        await self._weights.discard(version)

    async def apply(self, offer: Offer) -> float:
        """Replace the weights between two steps. Returns the stall in seconds. Raises as `VLLMWeights.apply`."""
        return await self._weights.apply(offer)

    def hold(self) -> None:
        self._core.hearing.hold()

    def release(self) -> None:
        self._core.hearing.release()

    async def probe(self, tokens: Sequence[int]) -> list[float]:
        """Logprob of each of `tokens` after the first, at temperature 1, computed anew under the present weights."""
        return await self._weights.probe(tokens)

    def stats(self) -> EngineStats:
        """The engine core's part is as of its last step."""
        core, requests = self._core.stats, self._requests
        running = requests.running
        used = core.kv_used_fraction if running else 0.0
        return EngineStats(
            version=self._core.version,
            running=running,
            waiting=min(core.waiting, running),
            generated_tokens=requests.generated_tokens,
            preemptions=core.preemptions,
            kv_capacity_tokens=core.kv_capacity_tokens,
            kv_free_tokens=int(core.kv_capacity_tokens * (1.0 - used)),
            kv_used_fraction=used,
            update_stall_s=self._weights.update_stall_s,
            stale_kv=requests.stale_kv,
            recomputed=requests.recomputed,
        )

    async def shutdown(self) -> None:
        """End every process of the engine. May be called twice."""
        await self._core.shutdown()
        await asyncio.to_thread(self._folder.cleanup)
