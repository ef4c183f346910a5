"""vLLM's engine core, as the parts of `vllm_engine` share it: its life, the version of its weights, the gate before them.

Invariants
----------
- Once it has ended, for whatever reason, every open and every waiting stream raises `EngineDead`, and nothing serves again.
- `version` is -1 until weights are written; only `vllm_weights` sets it.
- What is sampled while `hearing` holds comes out after the release, or never, where it ends first.
Called by `vllm_engine`, `vllm_requests` and `vllm_weights`, on one event loop. Importing this module does not import vLLM;
`start` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asyncrl.generators.engine import EngineDead
from asyncrl.generators.gate import Gate
from asyncrl.generators.hearing import Hearing
from asyncrl.generators.vllm_start import Launch, adapter_request, launch, stop
from asyncrl.generators.vllm_stream import CoreStats

if TYPE_CHECKING:
    from vllm.inputs import TokensInput
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM


class VLLMCore:
    """One engine's `AsyncLLM` and its processes, which are started as `wanted` says."""

    def __init__(self, wanted: Launch) -> None:
        self.wanted = wanted
        self.gate = Gate()
        self.version = -1
        self.adapter: LoRARequest | None = None
        """With what every request runs, where versions are adapters."""
        self.stats = CoreStats()
        self.hearing = Hearing()
        self._llm: AsyncLLM | None = None
        self._ended: str | None = None

    @property
    def engine_id(self) -> str:
        return self.wanted.engine_id

    @property
    def has_ended(self) -> bool:
        return self._ended is not None

    async def start(self) -> None:
        """Start the processes and build the model with dummy weights. Raises `EngineDead` if they cannot."""
        # vLLM's own deadline for its children is `start_timeout_s`, too; it cleans up after itself, so it goes first.
        try:
            async with asyncio.timeout(self.wanted.pool.start_timeout_s + 30.0):
                self._llm = await asyncio.to_thread(launch, self.wanted, self.stats)
                # vLLM keeps the answer; asked for at the first request, it would suspend an admission.
                await self._llm.get_supported_tasks()
            self.adapter = adapter_request() if self.wanted.adapter_rank else None
        except Exception as error:
            self._ended = "it did not start"
            raise EngineDead(
                f"engine {self.engine_id} (model {self.wanted.model_path}, device {self.wanted.pool.device}) did not "
                f"start: {type(error).__name__}: {error}. The output of its process above says why."
            ) from error

    def serving(self) -> AsyncLLM:
        """Raises `EngineDead` before the start and after the end."""
        if self._llm is None or self._ended is not None:
            raise EngineDead(f"engine {self.engine_id} cannot serve: {self._ended or 'it was not started'}")
        return self._llm

    def prompt(self, tokens: Sequence[int], salt: str | None = None) -> TokensInput:
        """`salt` says who may share the KV blocks of these tokens: by default who runs on the present weights."""
        # Rendered form: vLLM then prepares the request without suspending.
        return {"type": "token", "prompt_token_ids": list(tokens), "cache_salt": salt or str(self.version)}

    def died(self, error: BaseException) -> EngineDead:
        """What to raise for one of `dead_errors`."""
        self.end(f"its engine core ended ({type(error).__name__})")
        return EngineDead(f"engine {self.engine_id} died: {self._ended}")

    def end(self, reason: str) -> None:
        """Let every open and waiting stream raise `EngineDead`. The first reason stays."""
        if self._ended is not None:
            return
        self._ended = reason
        self.hearing.end(f"engine {self.engine_id}: {reason}")
        self.gate.open()
        if self._llm is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            self._llm.output_processor.propagate_error(EngineDeadError())

    async def shutdown(self) -> None:
        """End every process. May be called twice."""
        self.end("it was shut down")
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would report the end of the core as a failure
            await asyncio.to_thread(stop, llm, self.wanted.pool)


def dead_errors() -> tuple[type[BaseException], ...]:
    """What vLLM raises when its core has ended; a function, as only a started engine has vLLM imported."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return (EngineDeadError,)
