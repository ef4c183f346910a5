"""The vLLM engine: streams tokens out of `AsyncLLM` and takes weights in between two of its steps.

                     this process                             child process (spawned)
    generate() ---> AsyncLLM ----- ZMQ, msgpack ------> EngineCore: scheduler, KV cache, model
    stage()         verifies checksums of /dev/shm           |
    apply()   ----> pause, load, label, resume -------> SharedMemoryWeights (asyncrl.weight_sync.vllm_worker)

Invariants
----------
- The version of a token is the label that the engine core stamped on the step that sampled it; what was streamed is
  checked against the core's own account at the end of each request.
- From the look at the gate to the hand-over to vLLM, `generate` does not suspend, and `apply` closes the gate before
  it pauses: so a request's cache salt is the version that it is admitted under, and no request admitted after
  `apply(v)` can find a KV block of other weights.
- Weights come only through `apply`; the model starts with dummy weights and refuses to generate.
- An update that fails after its first byte leaves a model that nobody can vouch for: the engine then ends.
Called from one event loop. Importing this module does not import vLLM; `start` does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import tempfile
import threading
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from asyncrl.generators import vllm_settings
from asyncrl.generators.child_processes import bound_to, environment_for_children
from asyncrl.generators.config import PoolConfig
from asyncrl.generators.engine import Chunk, EngineDead, EngineStats, GenerationRequest
from asyncrl.generators.staged import Staged, verified
from asyncrl.generators.vllm_stream import KVUse, Stream
from asyncrl.weight_sync.wire import Offer

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.inputs import TokensInput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S: Final = 5.0
_START = threading.Lock()
"""Held while `os.environ` is changed for the children of one engine."""


class VLLMEngine:
    """`Engine` (see `asyncrl.generators.engine`) on vLLM's `AsyncLLM`, for CPU and CUDA pools.

    `max_model_len` bounds prompt plus answer in tokens. `seed` and `engine_id` together seed the sampler, so that two
    engines never draw the same answers. `first_core` binds a CPU engine to the cores [first_core, first_core +
    cores * tensor_parallel); without it the kernel places the engine's threads, `cores` of them computing.
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
    ) -> None:
        self._pool = pool
        self._model_path = model_path
        self._engine_id = engine_id
        self._max_model_len = max_model_len
        self._seed = zlib.crc32(f"{seed}/{engine_id}".encode()) & 0x7FFFFFFF
        self._first_core = first_core
        self._folder = tempfile.TemporaryDirectory(prefix="asyncrl-")  # 0700: vLLM's sockets are in it
        self._llm: AsyncLLM | None = None
        self._ended: str | None = None
        self._version = -1
        self._staged: dict[int, Staged] = {}
        self._gate = asyncio.Event()
        self._gate.set()
        self._waiting: set[str] = set()
        self._running: set[str] = set()
        self._probes = itertools.count()
        self._generated_tokens = 0
        self._update_stall_s = 0.0
        self._kv_used = KVUse()

    async def start(self) -> None:
        """Start the engine's processes and build the model with dummy weights. Raises `EngineDead` if it cannot."""
        # vLLM's own deadline for its children is `start_timeout_s`, too; it cleans up after itself, so it goes first.
        try:
            async with asyncio.timeout(self._pool.start_timeout_s + 30.0):
                self._llm = await asyncio.to_thread(self._launch)
                # vLLM keeps the answer; asked for at the first request, it would suspend an admission.
                await self._llm.get_supported_tasks()
        except Exception as error:
            self._ended = "it did not start"
            raise EngineDead(
                f"engine {self._engine_id} (model {self._model_path}, device {self._pool.device}) did not start: "
                f"{type(error).__name__}: {error}. The output of its process above says why."
            ) from error

    def _launch(self) -> AsyncLLM:
        began = time.perf_counter()
        variables = vllm_settings.environment(
            self._pool,
            self._first_core,
            owner=os.getpid(),
            folder=self._folder.name,
            log_level=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        )
        cores = vllm_settings.cores(self._pool, self._first_core)
        with _START, environment_for_children(variables), bound_to(cores):
            from vllm.v1.engine.async_llm import AsyncLLM

            config = self._vllm_config()
            imported = time.perf_counter()
            loggers: list[Any] = [self._kv_used.logger]
            llm = AsyncLLM.from_vllm_config(config, stat_loggers=loggers, disable_log_stats=True)
            self._listen_to(llm)
        times = (imported - began, time.perf_counter() - imported)
        logger.info("engine=%s started import_s=%.1f processes_s=%.1f", self._engine_id, *times)
        return llm

    def _listen_to(self, llm: AsyncLLM) -> None:
        # A logger makes the core tell its KV use with each step. The statistics that vLLM would make of every token in
        # this process, and its Prometheus counters, cost 10 us a token: off, before its output handler starts.
        manager: Any = self._kv_used
        llm.logger_manager = manager
        llm.log_stats = llm.output_processor.log_stats = False

    def _vllm_config(self) -> VllmConfig:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        if self._pool.device == "cpu":
            _inspect_here(self._model_path)
        chosen = vllm_settings.arguments(self._pool, self._model_path, self._max_model_len, self._seed)
        transfer = WeightTransferConfig(backend=vllm_settings.WEIGHT_BACKEND)
        return AsyncEngineArgs(**chosen, weight_transfer_config=transfer).create_engine_config()

    def _serving(self) -> AsyncLLM:
        if self._llm is None or self._ended is not None:
            raise EngineDead(f"engine {self._engine_id} cannot serve: {self._ended or 'it was not started'}")
        return self._llm

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the tokens of `request` as they are sampled. Raises `EngineDead`, `ValueError` for a request that
        does not fit `max_model_len`, and `RuntimeError` before the first weights."""
        self._check(request)
        if not await self._admitted(request.request_id):
            yield Chunk(tokens=[], logprobs=[], versions=[], finish_reason="abort")
            return
        llm = self._serving()
        finished = False
        self._running.add(request.request_id)
        queue: RequestOutputCollector | None = None
        try:
            queue = await llm.add_request(
                request.request_id, self._prompt(request.tokens), _sampling(request)
            )
            stream = Stream(request.request_id, llm.output_processor.request_states.get(queue.request_id))
            # Waits for vLLM's output handler; unblocked by a token, an abort or the core's death; ends with the last.
            while not finished:
                chunk = stream.chunk(queue.get_nowait() or await queue.get())
                finished = chunk.finish_reason is not None
                self._generated_tokens += len(chunk.tokens)
                yield chunk
        except _dead_errors() as error:
            finished = True
            raise self._died(error) from error
        finally:
            self._running.discard(request.request_id)
            if queue is not None and not finished and self._ended is None:
                await llm.abort(queue.request_id, internal=True)

    def _check(self, request: GenerationRequest) -> None:
        self._serving()
        if self._version < 0:
            raise RuntimeError(
                f"engine {self._engine_id} has no weights: request {request.request_id} came before the first apply. "
                f"Publish version 0 and wait until the engine confirms it."
            )
        if request.request_id in self._running or request.request_id in self._waiting:
            raise ValueError(f"engine {self._engine_id}: request {request.request_id} is already running")
        total = len(request.tokens) + request.max_new_tokens
        if not request.tokens or request.max_new_tokens < 1 or total > self._max_model_len:
            raise ValueError(
                f"request {request.request_id}: {len(request.tokens)} tokens + {request.max_new_tokens} new ones; "
                f"expected at least one of each and at most {self._max_model_len} in all (max_model_len)"
            )

    async def _admitted(self, request_id: str) -> bool:
        """Waits while weights are replaced; unblocked by the end of `apply`, whichever it is. False if aborted."""
        self._waiting.add(request_id)
        try:
            while not self._gate.is_set():
                await self._gate.wait()
            return request_id in self._waiting
        finally:
            self._waiting.discard(request_id)

    def _prompt(self, tokens: Sequence[int], salt: str | None = None) -> TokensInput:
        # Rendered form: vLLM then prepares the request without suspending.
        return {"type": "token", "prompt_token_ids": list(tokens), "cache_salt": salt or str(self._version)}

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End these streams with the tokens that were sampled and not yet streamed; unknown ids are ignored."""
        self._waiting.difference_update(request_ids)
        running = [request_id for request_id in request_ids if request_id in self._running]
        if running and self._ended is None:
            await self._serving().abort(running)

    async def stage(self, offer: Offer) -> None:
        """Verify the offer's bytes in a thread, while generation goes on. Raises `ChecksumError`."""
        self._serving()
        self._staged[offer.version] = await asyncio.to_thread(verified, offer)

    async def discard(self, version: int) -> None:
        self._staged.pop(version, None)

    async def apply(self, offer: Offer) -> float:
        """Replace the weights between two steps. Returns the seconds from the request to pause to the resumption.

        Raises `RuntimeError` if this offer was not staged, `EngineDead` if the engine cannot go on.
        """
        llm = self._serving()
        staged = self._staged.get(offer.version)
        if staged is None or staged.offer != offer:
            raise RuntimeError(
                f"engine {self._engine_id}: version {offer.version} is applied but not staged; "
                f"staged are {sorted(self._staged)}. Stage the same offer first."
            )
        staged.check()
        self._gate.clear()
        began = time.perf_counter()
        try:
            # Not `pause_generation`: the same, and then a sleep of 20 ms.
            await llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
            await self._write(llm, staged)
        except _dead_errors() as error:
            raise self._died(error) from error
        finally:
            try:
                if self._ended is None:
                    await llm.resume_generation()
            finally:
                self._gate.set()
        stall_s = time.perf_counter() - began
        self._update_stall_s += stall_s
        return stall_s

    async def _write(self, llm: AsyncLLM, staged: Staged) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        offer = staged.offer
        update = WeightTransferUpdateRequest(
            update_info={"offer": msgspec.to_builtins(offer), "inode": staged.inode}
        )
        complete = False
        try:
            await llm.start_weight_update()
            await llm.update_weights(update)
            await llm.finish_weight_update(weight_version=str(offer.version))
            complete = True
        except _dead_errors():
            raise
        except Exception as error:
            raise EngineDead(
                f"engine {self._engine_id}: version {offer.version} was half written: {error}"
            ) from error
        finally:
            self._staged.pop(offer.version, None)
            if complete:
                self._version = offer.version
            else:
                self._end(f"its weights are undefined: writing version {offer.version} failed")

    async def probe(self, tokens: Sequence[int]) -> list[float]:
        """Logprob of each of `tokens` after the first, at temperature 1, computed anew under the present weights."""
        from vllm import SamplingParams

        self._serving()
        probe_id = f"probe-{next(self._probes)}"
        await self._admitted(probe_id)
        llm = self._serving()
        sampling = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            skip_reading_prefix_cache=True,
        )
        try:
            outputs = [
                output async for output in llm.generate(self._prompt(tokens, probe_id), sampling, probe_id)
            ]
        except _dead_errors() as error:
            raise self._died(error) from error
        found: list[Any] = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
        values = [value for flat in found for value in flat.logprobs]
        if len(values) != len(tokens) - 1:
            raise RuntimeError(
                f"engine {self._engine_id}: probe of {len(tokens)} tokens gave {len(values)} logprobs"
            )
        return values

    def stats(self) -> EngineStats:
        return EngineStats(
            version=self._version,
            running=len(self._running),
            generated_tokens=self._generated_tokens,
            kv_used_fraction=self._kv_used.fraction,
            update_stall_s=self._update_stall_s,
        )

    async def shutdown(self) -> None:
        """End every process of the engine. May be called twice."""
        self._end("it was shut down")
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would report the end of the core as a failure
            await asyncio.to_thread(self._stop, llm)
        await asyncio.to_thread(self._folder.cleanup)

    def _stop(self, llm: AsyncLLM) -> None:
        # A core without devices and workers has nothing to put in order, and takes 3 s for it; vLLM warns of the kill.
        alone = self._pool.device == "cpu" and self._pool.tensor_parallel == 1
        if alone:
            logging.getLogger("vllm.v1.utils").setLevel(logging.ERROR)
        processes = list(getattr(llm.engine_core.resources.engine_manager, "processes", ()))
        llm.shutdown(timeout=0.0 if alone else SHUTDOWN_TIMEOUT_S)
        for process in processes:
            process.join(SHUTDOWN_TIMEOUT_S)

    def _died(self, error: BaseException) -> EngineDead:
        self._end(f"its engine core ended ({type(error).__name__})")
        return EngineDead(f"engine {self._engine_id} died: {self._ended}")

    def _end(self, reason: str) -> None:
        """Let every open and waiting stream raise `EngineDead`."""
        if self._ended is not None:
            return
        self._ended = reason
        self._gate.set()
        if self._llm is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            self._llm.output_processor.propagate_error(EngineDeadError())


def _sampling(request: GenerationRequest) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,  # only the request says what stops it
        logprobs=0,  # of the sampled token
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )


def _dead_errors() -> tuple[type[BaseException], ...]:
    """What vLLM raises when its core has ended; a function, as only a started engine has vLLM imported."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return (EngineDeadError,)


def _inspect_here(model_path: str) -> None:
    """Have vLLM look at the model's class in this process. It would start one of its own for that (8 s), so as not to
    initialise CUDA here: no matter on the CPU."""
    from vllm.model_executor.models import ModelRegistry

    config = Path(model_path) / "config.json"
    if not config.is_file():
        return
    for name in json.loads(config.read_text(encoding="utf-8")).get("architectures") or []:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
