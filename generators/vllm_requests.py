"""The requests of a vLLM engine: each is one stream of tokens to its caller, whatever becomes of it in vLLM.

Invariants
----------
- The version of a token is the label that the engine core stamped on the step that sampled it; what was streamed is
  checked against the core's own account at the end of each request.
- From the look at the gate to the hand-over to vLLM, `generate` does not suspend, and an update closes the gate before
  it pauses: so a request's cache salt is the version that it is admitted under, and no request admitted after
  `apply(v)` can find a KV block of other weights.
- A request whose KV cache is to be computed anew at an update (`in_flight`) is ended in vLLM before the pause and given to
  it again, with the tokens so far and the budget left, when the gate opens: under the new version's salt. Its caller sees
  one stream. (vLLM's own way, `reset_prefix_cache(reset_running_requests=True)`, preempts all requests or none, empties
  the whole prefix cache, and leaves them under their old salt, where nobody shares what is computed.)
Called by `vllm_engine`; `end_stale` by `vllm_weights`, between the gate's closing and the pause.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from asyncrl.generators.engine import Chunk, GenerationRequest
from asyncrl.generators.in_flight import AnswerLengths, InFlight, RequestFacts, is_recomputed
from asyncrl.generators.seeds import seed_at
from asyncrl.generators.vllm_core import VLLMCore, dead_errors
from asyncrl.generators.vllm_stream import Stream

if TYPE_CHECKING:
    from vllm import SamplingParams
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


class VLLMRequests:
    """Streams tokens out of `core`. `max_model_len` bounds prompt plus answer in tokens."""

    def __init__(self, core: VLLMCore, max_model_len: int, in_flight: InFlight) -> None:
        self._core = core
        self._max_model_len = max_model_len
        self._in_flight: InFlight = in_flight
        self._runs: dict[str, _Run] = {}
        self._lengths = AnswerLengths()
        self.generated_tokens = 0
        self.recomputed = 0
        """How often an update made a running request's KV cache anew."""

    @property
    def running(self) -> int:
        return len(self._runs)

    @property
    def stale_kv(self) -> int:
        """Requests that go on with KV cache which older weights than the present ones wrote."""
        return sum(0 <= run.kv_version < self._core.version for run in self._runs.values())

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
                    if not await self._core.gate.passes(request.request_id) or run.aborted:
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
                await self._core.hearing.heard()
                yield chunk
                if chunk.finish_reason:
                    return
        except dead_errors() as error:
            died = self._core.died(error)
            if stream is not None and not self._core.hearing.muted and (rest := stream.rest()).tokens:
                self._count(run, rest)
                yield rest
            raise died from error
        finally:
            del self._runs[request.request_id]
            if run.vllm_id and not self._core.has_ended:
                await self._core.serving().abort(run.vllm_id, internal=True)

    async def _hand_over(self, run: _Run) -> tuple[RequestOutputCollector, Stream]:
        """Does not suspend: see the invariants."""
        llm, request = self._core.serving(), run.request
        queue = await llm.add_request(
            request.request_id,
            self._core.prompt([*request.tokens, *run.said]),
            _sampling(run),
            lora_request=self._core.adapter,
        )
        run.vllm_id, run.kv_version = queue.request_id, self._core.version
        return queue, Stream(request.request_id, llm.output_processor.request_states.get(queue.request_id))

    def _count(self, run: _Run, chunk: Chunk) -> None:
        run.said += chunk.tokens
        self.generated_tokens += len(chunk.tokens)
        if chunk.finish_reason:
            run.vllm_id = ""
            if chunk.finish_reason != "abort":
                self._lengths.add(run.request.answered_tokens + len(run.said))

    def _check(self, request: GenerationRequest) -> None:
        self._core.serving()
        if self._core.version < 0:
            raise RuntimeError(
                f"engine {self._core.engine_id} has no weights: request {request.request_id} came before the first "
                f"apply. Publish version 0 and wait until the engine confirms it."
            )
        if request.request_id in self._runs:
            raise ValueError(
                f"engine {self._core.engine_id}: request {request.request_id} is already running"
            )
        total = len(request.tokens) + request.max_new_tokens
        if not request.tokens or request.max_new_tokens < 1 or total > self._max_model_len:
            raise ValueError(
                f"request {request.request_id}: {len(request.tokens)} tokens + {request.max_new_tokens} new ones; "
                f"expected at least one of each and at most {self._max_model_len} in all (max_model_len)"
            )

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End these streams with the tokens that were sampled and not yet streamed; unknown ids are ignored."""
        self._core.gate.turn_away(request_ids)
        running = [request_id for request_id in request_ids if request_id in self._runs]
        for request_id in running:
            self._runs[request_id].aborted = True
        if running and not self._core.has_ended:
            await self._core.serving().abort(running)

    async def end_stale(self, llm: AsyncLLM, version: int) -> None:
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
        self.recomputed += len(stale)
        if stale:
            await llm.abort([run.vllm_id for run in stale], internal=True)


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
