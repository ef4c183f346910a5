"""Which streams of the fake engine compute, which wait, and whose KV cache is given up when there is no room. Pure.

It does what a real engine's scheduler does: streams are taken in order while there are slots and KV cache for their tokens;
a stream that grows past the room has the newest one give its cache up, which is computed anew when that gets its turn again.
One stream alone always runs. Called by `fake_engine`, and by tests.
"""

from __future__ import annotations

import asyncio

from asyncrl.generators.engine import Chunk, FinishReason, GenerationRequest
from asyncrl.generators.fake_speech import Speech


class Stream:
    """One request on its way: the step loop adds to it, `generate` takes from it. Holds at most `max_new_tokens`."""

    def __init__(self, request: GenerationRequest, speech: Speech) -> None:
        self.request = request
        self.request_id = request.request_id
        self.speech = speech
        self.stops = frozenset(request.stop_token_ids)
        self.left = request.max_new_tokens
        self.context = len(request.tokens)
        """Tokens that its KV cache holds while it runs."""
        self.kv_version = -1
        """Of the weights when its KV cache was begun; -1 before."""
        self.ready = asyncio.Event()
        self.error: Exception | None = None
        self.finish: FinishReason | None = None
        self._fresh: tuple[list[int], list[float], list[int]] = ([], [], [])

    @property
    def answered(self) -> int:
        """Tokens of this turn so far."""
        return self.request.answered_tokens + self.request.max_new_tokens - self.left

    def add(self, token: int, logprob: float, version: int) -> None:
        tokens, logprobs, versions = self._fresh
        tokens.append(token)
        logprobs.append(logprob)
        versions.append(version)
        self.left -= 1
        self.context += 1
        if token in self.stops:
            self.finish = "stop"
        elif self.left == 0:
            self.finish = "length"
        if self.finish or len(tokens) >= self.request.chunk_tokens:
            self.ready.set()

    def take(self) -> Chunk:
        tokens, logprobs, versions = self._fresh
        self._fresh = ([], [], [])
        return Chunk(tokens=tokens, logprobs=logprobs, versions=versions, finish_reason=self.finish)

    def end(self, finish: FinishReason | None = None, error: Exception | None = None) -> None:
        if self.finish is None and self.error is None:
            self.finish, self.error = finish, error
        self.ready.set()


class Batch:
    """All streams of one engine, by request id."""

    def __init__(self, slots: int, kv_capacity_tokens: int) -> None:
        self.preemptions = 0
        self.running: dict[str, Stream] = {}
        """Oldest first."""
        self._waiting: dict[str, Stream] = {}
        """Next one first."""
        self._slots = slots
        self._capacity = kv_capacity_tokens

    def __len__(self) -> int:
        return len(self.running) + len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.running or request_id in self._waiting

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_used_tokens(self) -> int:
        return sum(stream.context for stream in self.running.values())

    def add(self, stream: Stream) -> None:
        self._waiting[stream.request_id] = stream

    def get(self, request_id: str) -> Stream | None:
        return self.running.get(request_id) or self._waiting.get(request_id)

    def remove(self, request_id: str) -> Stream | None:
        return self.running.pop(request_id, None) or self._waiting.pop(request_id, None)

    def clear(self) -> list[Stream]:
        """Takes out all."""
        streams = [*self.running.values(), *self._waiting.values()]
        self.running, self._waiting = {}, {}
        return streams

    def schedule(self, version: int, tokens_each: int) -> None:
        """Before a step of `tokens_each` tokens for each running stream: who gives way, and who comes in."""
        used = self.kv_used_tokens
        while len(self.running) > 1 and used + tokens_each * len(self.running) > self._capacity:
            request_id, newest = self.running.popitem()
            used -= newest.context
            newest.kv_version = -1
            self.preemptions += 1
            self._waiting = {request_id: newest, **self._waiting}
        for request_id, stream in list(self._waiting.items()):
            full = used + stream.context + tokens_each * (len(self.running) + 1) > self._capacity
            if len(self.running) >= self._slots or (self.running and full):
                break
            del self._waiting[request_id]
            self.running[request_id] = stream
            stream.kv_version = version
            used += stream.context
