"""An engine with everything around it that a test of the `Engine` contract needs: weights to publish, what the engine
must then say, and a way to kill it. One world per kind of engine: `FakeWorld`, `VLLMWorld`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import uuid
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import offers
import psutil
import tiny
import torch
from transformers import Qwen2ForCausalLM

from asyncrl.generators.config import PoolConfig
from asyncrl.generators.engine import Chunk, Engine, GenerationRequest
from asyncrl.generators.fake_engine import FakeEngine
from asyncrl.generators.fake_speech import Lengths, probe_logprobs, weights_digest
from asyncrl.generators.in_flight import InFlight
from asyncrl.generators.vllm_engine import VLLMEngine
from asyncrl.weight_sync.plan import Adapter
from asyncrl.weight_sync.wire import Offer

TIMEOUT_S = 60.0
SCALE = 20.0

Weights = dict[str, torch.Tensor]


class Answer:
    """Everything one stream gave."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = list(chunks)
        self.tokens = [token for chunk in chunks for token in chunk.tokens]
        self.logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
        self.versions = [version for chunk in chunks for version in chunk.versions]
        self.finish_reason = chunks[-1].finish_reason if chunks else None


class World:
    """An engine on an event loop of its own, and the versions published to it."""

    engine: Engine
    vocab_size: int
    max_tokens: int

    def __init__(self, weights: dict[str, Weights], adapter: Adapter | None = None) -> None:
        self.weights = weights
        self.version = -1
        example = next(iter(weights.values()))
        self.offers = offers.Offers(f"test-{uuid.uuid4().hex[:12]}", example, adapter=adapter)
        self._runner = asyncio.Runner()
        self._ids = itertools.count()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(TIMEOUT_S):
                return await coroutine

        return self._runner.run(bounded())

    def close(self) -> None:
        try:
            self.run(self.engine.shutdown())
        finally:
            self.offers.__exit__(None, None, None)
            self._runner.close()

    def offer(self, kind: str) -> Offer:
        """Write the weights `kind` as the version after the present one."""
        return self.offers.write(self.version + 1, self.weights[kind])

    async def publish(self, kind: str) -> float:
        offer = self.offer(kind)
        await self.engine.stage(offer)
        stall_s = await self.engine.apply(offer)
        self.version = offer.version
        return stall_s

    def request(
        self,
        tokens: Sequence[int] = (1, 2, 3),
        n: int = 20,
        temperature: float = 1.0,
        stops: tuple[int, ...] = (),
    ) -> GenerationRequest:
        return GenerationRequest(
            request_id=f"r{next(self._ids)}",
            tokens=list(tokens),
            max_new_tokens=n,
            temperature=temperature,
            stop_token_ids=stops,
        )

    async def answer(self, request: GenerationRequest) -> Answer:
        return Answer([chunk async for chunk in self.engine.generate(request)])

    async def across_an_update(
        self, kind: str, after_s: float
    ) -> list[tuple[GenerationRequest, Answer, int]]:
        """Eight streams of 300 tokens, with the version `kind` published in their middle; each with the number of its tokens
        that are of the version before."""
        old, streams = self.version, []
        requests = [self.request(tokens=[index, 3, 4], n=300) for index in range(8)]
        tasks = [asyncio.create_task(self.answer(request)) for request in requests]
        await asyncio.sleep(after_s)
        await self.publish(kind)
        for request, task in zip(requests, tasks, strict=True):
            answer = await task
            kept = answer.versions.count(old)
            assert 0 < kept < 300, "the update missed the stream: both versions must be seen"
            assert answer.versions == [old] * kept + [old + 1] * (300 - kept)
            streams.append((request, answer, kept))
        return streams

    def end(self) -> Coroutine[Any, Any, None]:
        """Make the engine end without its consent, or by shutdown: each world has its own way."""
        raise NotImplementedError

    def expected_probe(self, offer: Offer, kind: str, tokens: Sequence[int]) -> list[float]:
        raise NotImplementedError

    def children(self) -> list[psutil.Process]:
        """The engine's processes. Python's own resource tracker is not one: it lives as long as this process."""
        return [
            child
            for child in psutil.Process().children(recursive=True)
            if child.is_running()
            and child.status() != psutil.STATUS_ZOMBIE
            and "resource_tracker" not in " ".join(child.cmdline())
        ]


class FakeWorld(World):
    """The fake engine; its tokens do not depend on weights, its probe does."""

    vocab_size = 64
    max_tokens = 10_000

    def __init__(self, *, in_flight: InFlight = "keep") -> None:
        shapes = {"a": (64, 64), "b": (7,)}
        weights = {
            kind: {name: torch.full(shape, float(index)) for name, shape in shapes.items()}
            for index, kind in enumerate(("random", "other", "repeat", "change"))
        }
        super().__init__(weights)
        self.fake = FakeEngine(
            vocab_size=64, step_s=0.001, lengths=Lengths(median_tokens=1e9), in_flight=in_flight
        )
        self.engine = self.fake
        self.run(self.engine.start())

    async def end(self) -> None:
        self.fake.die("the test ends it")

    def expected_probe(self, offer: Offer, kind: str, tokens: Sequence[int]) -> list[float]:
        return probe_logprobs(weights_digest(offer.checksums), tokens)


class VLLMWorld(World):
    """Real vLLM with a tiny model.

    Weights: `random` and `other` are two random models. `repeat` and `change` make the version visible in the tokens:
    the first says the last token again, the second says any other.
    """

    max_tokens = 768

    def __init__(
        self,
        folder: Path,
        *,
        tied: bool,
        device: str = "cpu",
        dtype: str = "float32",
        in_flight: InFlight = "keep",
        prefix_cache: bool = True,
        kv_cache_bytes: int = 2**27,
        hidden_size: int = 64,
        float8: bool = False,
        tensor_parallel: int = 1,
    ) -> None:
        tiny.write_model(folder, tied=tied, hidden_size=hidden_size)
        self.tied = tied
        self.models = {"random": Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)}
        self.models["other"] = _moved(Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32))
        self.models["repeat"] = _echo(Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32), SCALE)
        self.models["change"] = _echo(Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32), -SCALE)
        self.vocab_size = self.models["random"].config.vocab_size
        super().__init__({kind: dict(model.named_parameters()) for kind, model in self.models.items()})
        self.pool = PoolConfig(
            name="test",
            device="cpu" if device == "cpu" else "cuda",
            concurrency=16,
            kv_cache_bytes=kv_cache_bytes,
            memory_fraction=0.3,
            dtype="float32" if dtype == "float32" else "bfloat16",
            start_timeout_s=240.0,
            tensor_parallel=tensor_parallel,
        )
        self.vllm = VLLMEngine(
            self.pool,
            str(folder),
            f"test-{tied}",
            self.max_tokens,
            in_flight=in_flight,
            prefix_cache=prefix_cache,
            float8=float8,
        )
        self.engine = self.vllm

    def start(self) -> None:
        async def start() -> None:
            await self.engine.start()

        self._runner.run(start())  # bounded by the pool's `start_timeout_s`

    def reference(self, kind: str, tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
        """Float32 logprob of each token after the first by Hugging Face: [len(tokens) - 1]."""
        with torch.no_grad():
            logits = self.models[kind](torch.tensor([list(tokens)])).logits[0, :-1].float()
        wanted = torch.tensor(list(tokens)[1:])
        return (logits / temperature).log_softmax(-1).gather(-1, wanted[:, None])[:, 0]

    def logprobs_after(self, kind: str, tokens: Sequence[int]) -> list[float]:
        """Of each token of the vocabulary as the next one, by Hugging Face."""
        with torch.no_grad():
            logits = self.models[kind](torch.tensor([list(tokens)])).logits[0, -1].float()
        found: list[float] = logits.log_softmax(-1).tolist()
        return found

    def expected_probe(self, offer: Offer, kind: str, tokens: Sequence[int]) -> list[float]:
        return self.reference(kind, tokens).tolist()

    async def end(self) -> None:
        """Untied: kill the engine core. Tied: an orderly shutdown."""
        if self.tied:
            await self.engine.shutdown()
            return
        for child in self.children():
            os.kill(child.pid, signal.SIGKILL)


def _moved(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model


def _echo(model: Qwen2ForCausalLM, scale: float) -> Qwen2ForCausalLM:
    """The layers add nothing, so that a position's logits are `scale` times its token's likeness to every token."""
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(torch.nn.functional.normalize(embedding, dim=-1))
        model.lm_head.weight.copy_(embedding)
        model.model.norm.weight.fill_(scale)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model
