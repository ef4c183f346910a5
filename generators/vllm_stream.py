"""From vLLM's deltas to `Chunk`s: which version sampled which token. Imports no vLLM. Called by `vllm_requests`.

vLLM's engine core labels every step with the version of its weights. While a request runs, its state in this process
keeps the labels as spans (version, index of the first token), which only grow: so the spans known when a delta is read
cover the delta's tokens exactly, also if vLLM merged several deltas into one. The final output repeats all spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from asyncrl.generators.engine import Chunk

Spans = Sequence[tuple[str, int]]
"""(label, index of the first token) in order; each span ends where the next one begins."""


_PREEMPTED: Final = 3
"""vLLM's `EngineCoreEventType.PREEMPTED`."""


class SpanHolder(Protocol):
    """vLLM's `RequestState`, as far as it is read here."""

    weight_version_starts: list[tuple[str, int]]
    detokenizer: Any
    logprobs_processor: Any


class VersionMismatch(RuntimeError):
    """What was streamed disagrees with the engine core's final account of the versions."""


def versions_of(spans: Spans, start: int, count: int) -> list[int]:
    """The versions of the tokens [start, start + count). Raises `VersionMismatch` if no span covers a token."""
    versions: list[int] = []
    for index, (label, first) in enumerate(spans):
        last = spans[index + 1][1] if index + 1 < len(spans) else start + count
        versions += [int(label)] * (min(last, start + count) - max(first, start))
    if len(versions) != count:
        raise VersionMismatch(
            f"tokens [{start}, {start + count}): spans {list(spans)} cover {len(versions)} of {count}"
        )
    return versions


class Stream:
    """One request: turns vLLM's outputs, in order, into chunks. `state` is None if the request ended before it could
    be looked up; its one output is then the final one."""

    def __init__(self, request_id: str, state: SpanHolder | None) -> None:
        self._request_id = request_id
        self._state = state
        self._streamed: list[int] = []

    def chunk(self, output: Any) -> Chunk:
        """`output` is vLLM's `RequestOutput` of one sequence with delta tokens and flat logprobs.

        Raises `VersionMismatch`, and `RuntimeError` if vLLM ended the request for a reason of its own.
        """
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        logprobs = list(completion.logprobs.logprobs) if tokens else []
        if len(logprobs) != len(tokens):
            raise RuntimeError(
                f"request {self._request_id}: {len(tokens)} tokens came with {len(logprobs)} logprobs"
            )
        final = [(span.version, span.start) for span in completion.weight_versions or ()]
        spans = self._state.weight_version_starts if self._state is not None else final
        versions = versions_of(spans, len(self._streamed), len(tokens))
        self._streamed += versions
        if output.finished:
            self._check_end(completion.finish_reason, final)
        return Chunk(
            tokens=tokens,
            logprobs=logprobs,
            versions=versions,
            finish_reason=completion.finish_reason if output.finished else None,
        )

    def rest(self) -> Chunk:
        """What arrived and was not streamed, when no output comes any more: the engine has died."""
        done = len(self._streamed)
        if self._state is None:
            return Chunk(tokens=[], logprobs=[], versions=[])
        tokens = list(self._state.detokenizer.output_token_ids[done:])
        logprobs = list(self._state.logprobs_processor.logprobs[done:].logprobs) if tokens else []
        versions = versions_of(self._state.weight_version_starts, done, len(tokens))
        self._streamed += versions
        return Chunk(tokens=tokens, logprobs=logprobs, versions=versions)

    def _check_end(self, reason: str, final: Spans) -> None:
        if reason not in ("stop", "length", "abort"):
            raise RuntimeError(f"request {self._request_id}: vLLM ended it with {reason!r}; its log says why")
        if versions_of(final, 0, len(self._streamed)) != self._streamed:
            raise VersionMismatch(
                f"request {self._request_id}: {len(self._streamed)} tokens were streamed under other versions than "
                f"the engine core's final spans {list(final)} say"
            )


class CoreStats:
    """Keeps what the engine core said last of its KV cache and its queue; vLLM's output handler calls `record` at every step
    and `count_preemptions` for every output."""

    def __init__(self) -> None:
        self.kv_capacity_tokens = 0
        self.kv_used_fraction = 0.0
        self.waiting = 0
        self.preemptions = 0

    def logger(self, vllm_config: Any, engine_index: int) -> CoreStats:
        """vLLM asks for a factory of loggers; there is one engine core, so one logger."""
        return self

    def log_engine_initialized(self) -> None:
        """Part of vLLM's interface; nothing to say."""

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.kv_used_fraction = scheduler_stats.kv_cache_usage
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs

    def count_preemptions(self, _: Any, output: Any, *__: Any) -> None:
        """`output` is an `EngineCoreOutput`."""
        if output.events:
            self.preemptions += sum(event.type == _PREEMPTED for event in output.events)
