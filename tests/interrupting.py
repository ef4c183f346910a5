"""An engine that is interrupted at exact tokens: around a real engine, it lets through so many tokens of a rollout and then
waits for what the interruption brings.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from asyncrl.generators.engine import Chunk, Engine, EngineDead, GenerationRequest


class Interrupting:
    """`positions[prompt]`: after so many tokens of the answer (over all leases) `interrupt` is called, once for each.

    The rollout then gives nothing more until it is aborted, or dies where `interrupt` returns an error.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_tokens: int,
        positions: dict[tuple[int, ...], list[int]],
        interrupt: Callable[[], Awaitable[EngineDead | None]],
    ) -> None:
        self._engine = engine
        self._prompt_tokens = prompt_tokens
        self.positions = positions
        """What is still to come; shared by the engines of one test."""
        self._interrupt = interrupt
        self._aborts: dict[str, asyncio.Event] = {}
        self.interrupted: list[tuple[tuple[int, ...], int]] = []

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        prompt = tuple(request.tokens[: self._prompt_tokens])
        due = self.positions.get(prompt, [])
        said = len(request.tokens) - self._prompt_tokens
        aborted = self._aborts[request.request_id] = asyncio.Event()
        stream = aiter(self._engine.generate(request))
        try:
            while not (due and due[0] == said):
                chunk = await anext(stream)
                tokens = chunk.tokens[: due[0] - said] if due else chunk.tokens
                said += len(tokens)
                cut = len(tokens) < len(chunk.tokens) or (bool(due) and due[0] == said)
                yield Chunk(
                    tokens=tokens,
                    logprobs=chunk.logprobs[: len(tokens)],
                    versions=chunk.versions[: len(tokens)],
                    finish_reason=None if cut else chunk.finish_reason,
                )
                if chunk.finish_reason and not cut:
                    return
            due.pop(0)
            self.interrupted.append((prompt, said))
            hit = asyncio.ensure_future(self._interrupt())
            await asyncio.wait(
                {hit, waiting := asyncio.ensure_future(aborted.wait())}, return_when=asyncio.FIRST_COMPLETED
            )
            if hit.done() and (error := hit.result()):
                waiting.cancel()
                raise error
            async with asyncio.timeout(10):
                await waiting
            yield Chunk(tokens=[], logprobs=[], versions=[], finish_reason="abort")
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
            del self._aborts[request.request_id]

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if request_id in self._aborts:
                self._aborts[request_id].set()
        await self._engine.abort(request_ids)

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)
