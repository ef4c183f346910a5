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
- A request whose KV cache is to be computed anew at an update (`in_flight`) is ended in vLLM before the pause and given to
  it again, with the tokens so far and the budget left, when the gate opens: under the new version's salt. Its caller sees
  one stream. (vLLM's own way, `reset_prefix_cache(reset_running_requests=True)`, preempts all requests or none, empties
  the whole prefix cache, and leaves them under their old salt, where nobody shares what is computed.)
- Weights come only through `apply`; the model starts with dummy weights and refuses to generate. Where versions are LoRA
  adapters, it starts with the base and refuses likewise; an adapter takes its predecessor's place between two steps, under
  the same id, so that requests under way go on with it as they do with whole weights.
- An update that fails after its first byte leaves a model that nobody can vouch for: the engine then ends.
Called from one event loop. Importing this module does not import vLLM; `start` does.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from asyncrl.generators.config import PoolConfig
from asyncrl.generators.engine import Chunk, EngineDead, EngineStats, GenerationRequest
from asyncrl.generators.gate import Gate
from asyncrl.generators.in_flight import AnswerLengths, InFlight, RequestFacts, is_recomputed
from asyncrl.generators.seeds import seed_at
from asyncrl.generators.staged import Staged, verified
from asyncrl.generators.vllm_start import Launch, adapter_request, launch, stop
from asyncrl.generators.vllm_stream import CoreStats, Stream
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.wire import Offer

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.inputs import TokensInput
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector


@dataclass(slots=True)
class _Run:
    """One request of a caller, which may be several of vLLM's, one after the other."""

    request: GenerationRequest
    said: list[int] = field(default_factory=list)
    """Tokens streamed so far."""
    kv_version: int = -1
    """Of the weights when its present KV cache was begun; -1 while it waits for its first."""
    vllm_id: str = ""
    """Of the present one of vLLM's requests; empty while there is none."""
    renewed: bool = False
    """That one was ended so as to compute its KV cache anew."""
    aborted: bool = False

    @property
    def left(self) -> int:
        return self.request.max_new_tokens - len(self.said)

    def facts(self, version: int) -> RequestFacts:
        return RequestFacts(
            prefix_tokens=len(self.request.tokens) + len(self.said),
            answered_tokens=self.request.answered_tokens + len(self.said),
            left_tokens=self.left,
            drift_versions=version - self.kv_version,
        )


class VLLMEngine:
    """`Engine` (see `asyncrl.generators.engine`) on vLLM's `AsyncLLM`, for CPU and CUDA pools.

    `max_model_len` bounds prompt plus answer in tokens. `seed` and `engine_id` together seed the sampler, so that two
    engines never draw the same answers. `first_core` binds a CPU engine to the cores [first_core, first_core +
    cores * tensor_parallel); without it the kernel places the engine's threads, `cores` of them computing. `in_flight` and
    `prefix_cache` are those of `[weight_sync]`. `whole_prompts`: for requests with a seed. With `adapter_rank` above 0 the base is
    read from `model_path` and each version is a LoRA adapter of that rank, which takes the place of the one before.
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
    ) -> None:
        self._pool = pool
        self._engine_id = engine_id
        self._max_model_len = max_model_len
        self._in_flight: InFlight = in_flight
        self._folder = tempfile.TemporaryDirectory(prefix="asyncrl-")  # 0700: vLLM's sockets are in it
        self._launch = Launch(
            engine_id=engine_id,
            pool=pool,
            model_path=model_path,
            max_model_len=max_model_len,
            seed=zlib.crc32(f"{seed}/{engine_id}".encode()) & 0x7FFFFFFF,
            first_core=first_core,
            prefix_cache=prefix_cache,
            whole_prompts=whole_prompts,
            adapter_rank=adapter_rank,
            folder=self._folder.name,
        )
        self._adapter: LoRARequest | None = None
        self._llm: AsyncLLM | None = None
        self._ended: str | None = None
        self._version = -1
        self._staged: dict[int, Staged] = {}
        self._gate = Gate()
        self._runs: dict[str, _Run] = {}
        self._probes = itertools.count()
        self._lengths = AnswerLengths()
        self._generated_tokens = 0
        self._recomputed = 0
        self._update_stall_s = 0.0
        self._core = CoreStats()

    async def start(self) -> None:
        """Start the engine's processes and build the model with dummy weights. Raises `EngineDead` if it cannot."""
        # vLLM's own deadline for its children is `start_timeout_s`, too; it cleans up after itself, so it goes first.
        try:
            async with asyncio.timeout(self._pool.start_timeout_s + 30.0):
                self._llm = await asyncio.to_thread(launch, self._launch, self._core)
                # vLLM keeps the answer; asked for at the first request, it would suspend an admission.
                await self._llm.get_supported_tasks()
            self._adapter = adapter_request() if self._launch.adapter_rank else None
        except Exception as error:
            self._ended = "it did not start"
            raise EngineDead(
                f"engine {self._engine_id} (model {self._launch.model_path}, device {self._pool.device}) did not start: "
                f"{type(error).__name__}: {error}. The output of its process above says why."
            ) from error

    def _serving(self) -> AsyncLLM:
        if self._llm is None or self._ended is not None:
            raise EngineDead(f"engine {self._engine_id} cannot serve: {self._ended or 'it was not started'}")
        return self._llm

    # ---- generating --------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the tokens of `request` as they are sampled. Raises `EngineDead`, `ValueError` for a request that
        does not fit `max_model_len`, and `RuntimeError` before the first weights."""
        self._check(request)
        run = self._runs[request.request_id] = _Run(request)
        stream: Stream | None = None
        try:
            # Waits for vLLM's output handler; unblocked by a token, an abort or the core's death; ends with the last.
            while True:
                if stream is None:
                    if not await self._gate.passes(request.request_id) or run.aborted:
                        yield Chunk(tokens=[], logprobs=[], versions=[], finish_reason="abort")
                        return
                    queue, stream = await self._hand_over(run)
                chunk = stream.chunk(queue.get_nowait() or await queue.get())
                self._count(run, chunk)
                if chunk.finish_reason == "abort" and run.renewed and not run.aborted:
                    stream, run.renewed = None, False
                    chunk = msgspec.structs.replace(chunk, finish_reason=None)
                    if not chunk.tokens:
                        continue
                yield chunk
                if chunk.finish_reason:
                    return
        except _dead_errors() as error:
            died = self._died(error)
            if stream is not None and (rest := stream.rest()).tokens:
                self._count(run, rest)
                yield rest
            raise died from error
        finally:
            del self._runs[request.request_id]
            if run.vllm_id and self._ended is None:
                await self._serving().abort(run.vllm_id, internal=True)

    async def _hand_over(self, run: _Run) -> tuple[RequestOutputCollector, Stream]:
        """Does not suspend: see the invariants."""
        llm, request = self._serving(), run.request
        queue = await llm.add_request(
            request.request_id,
            self._prompt([*request.tokens, *run.said]),
            _sampling(run),
            lora_request=self._adapter,
        )
        run.vllm_id, run.kv_version = queue.request_id, self._version
        return queue, Stream(request.request_id, llm.output_processor.request_states.get(queue.request_id))

    def _count(self, run: _Run, chunk: Chunk) -> None:
        run.said += chunk.tokens
        self._generated_tokens += len(chunk.tokens)
        if chunk.finish_reason:
            run.vllm_id = ""
            if chunk.finish_reason != "abort":
                self._lengths.add(run.request.answered_tokens + len(run.said))

    def _check(self, request: GenerationRequest) -> None:
        self._serving()
        if self._version < 0:
            raise RuntimeError(
                f"engine {self._engine_id} has no weights: request {request.request_id} came before the first apply. "
                f"Publish version 0 and wait until the engine confirms it."
            )
        if request.request_id in self._runs:
            raise ValueError(f"engine {self._engine_id}: request {request.request_id} is already running")
        total = len(request.tokens) + request.max_new_tokens
        if not request.tokens or request.max_new_tokens < 1 or total > self._max_model_len:
            raise ValueError(
                f"request {request.request_id}: {len(request.tokens)} tokens + {request.max_new_tokens} new ones; "
                f"expected at least one of each and at most {self._max_model_len} in all (max_model_len)"
            )

    def _prompt(self, tokens: Sequence[int], salt: str | None = None) -> TokensInput:
        # Rendered form: vLLM then prepares the request without suspending.
        return {"type": "token", "prompt_token_ids": list(tokens), "cache_salt": salt or str(self._version)}

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End these streams with the tokens that were sampled and not yet streamed; unknown ids are ignored."""
        self._gate.turn_away(request_ids)
        running = [request_id for request_id in request_ids if request_id in self._runs]
        for request_id in running:
            self._runs[request_id].aborted = True
        if running and self._ended is None:
            await self._serving().abort(running)

    # ---- weights -----------------------------------------------------------------------------------------------

    async def stage(self, offer: Offer) -> None:
        """Verify the offer's bytes in a thread, while generation goes on. Raises `ChecksumError`, and `WeightSyncError` for an
        adapter where whole models are expected, or the other way round."""
        self._serving()
        self._check_kind(offer)
        self._staged[offer.version] = await asyncio.to_thread(verified, offer)

    def _check_kind(self, offer: Offer) -> None:
        rank = offer.plan.adapter.rank if offer.plan.adapter else 0
        if rank != self._launch.adapter_rank:
            raise WeightSyncError(
                f"engine {self._engine_id}, version {offer.version}: expected {_kind(self._launch.adapter_rank)}, got "
                f"{_kind(rank)}; learner and engine must run the same recipe ([learner.lora])"
            )

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
        self._gate.close()
        began = time.perf_counter()
        try:
            await self._end_stale(llm, offer.version)
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
                self._gate.open()
        stall_s = time.perf_counter() - began
        self._update_stall_s += stall_s
        return stall_s

    async def _end_stale(self, llm: AsyncLLM, version: int) -> None:
        """Ends those of vLLM's requests whose KV cache is to be computed anew; `generate` gives them to it again."""
        mean = self._lengths.mean_tokens
        stale = [
            run
            for run in self._runs.values()
            if run.vllm_id
            and not (run.aborted or run.renewed)
            and is_recomputed(self._in_flight, run.facts(version), mean)
        ]
        for run in stale:
            run.renewed = True
        self._recomputed += len(stale)
        if stale:
            await llm.abort([run.vllm_id for run in stale], internal=True)

    async def _write(self, llm: AsyncLLM, staged: Staged) -> None:
        offer = staged.offer
        update = {"offer": msgspec.to_builtins(offer), "inode": staged.inode}
        complete = False
        try:
            if offer.plan.adapter is not None:
                await llm.collective_rpc("replace_adapter", kwargs=update)
                await llm.update_weight_version(str(offer.version))
            else:
                await _replace_model(llm, update, offer.version)
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
        await self._gate.passes(probe_id)
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
                output
                async for output in llm.generate(
                    self._prompt(tokens, probe_id), sampling, probe_id, lora_request=self._adapter
                )
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

    # ---- the whole engine --------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """The engine core's part is as of its last step."""
        core, running = self._core, len(self._runs)
        used = core.kv_used_fraction if running else 0.0
        return EngineStats(
            version=self._version,
            running=running,
            waiting=min(core.waiting, running),
            generated_tokens=self._generated_tokens,
            preemptions=core.preemptions,
            kv_capacity_tokens=core.kv_capacity_tokens,
            kv_free_tokens=int(core.kv_capacity_tokens * (1.0 - used)),
            kv_used_fraction=used,
            update_stall_s=self._update_stall_s,
            stale_kv=sum(0 <= run.kv_version < self._version for run in self._runs.values()),
            recomputed=self._recomputed,
        )

    async def shutdown(self) -> None:
        """End every process of the engine. May be called twice."""
        self._end("it was shut down")
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would report the end of the core as a failure
            await asyncio.to_thread(stop, llm, self._pool)
        await asyncio.to_thread(self._folder.cleanup)

    def _died(self, error: BaseException) -> EngineDead:
        self._end(f"its engine core ended ({type(error).__name__})")
        return EngineDead(f"engine {self._engine_id} died: {self._ended}")

    def _end(self, reason: str) -> None:
        """Let every open and waiting stream raise `EngineDead`."""
        if self._ended is not None:
            return
        self._ended = reason
        self._gate.open()
        if self._llm is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            self._llm.output_processor.propagate_error(EngineDeadError())


async def _replace_model(llm: AsyncLLM, update: dict[str, Any], version: int) -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await llm.start_weight_update()
    await llm.update_weights(WeightTransferUpdateRequest(update_info=update))
    await llm.finish_weight_update(weight_version=str(version))


def _kind(rank: int) -> str:
    return f"an adapter of rank {rank}" if rank else "a whole model"


def _sampling(run: _Run) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    request = run.request
    seed = None if request.seed is None else seed_at(*request.seed, len(request.tokens) + len(run.said))
    return SamplingParams(
        temperature=request.temperature,
        max_tokens=run.left,
        seed=seed,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,  # only the request says what stops it
        logprobs=0,  # of the sampled token
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=request.chunk_tokens,
        skip_clone=True,
    )


def _dead_errors() -> tuple[type[BaseException], ...]:
    """What vLLM raises when its core has ended; a function, as only a started engine has vLLM imported."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return (EngineDeadError,)
