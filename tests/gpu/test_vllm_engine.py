"""The vLLM engine on a GPU: weights come in, logprobs are the model's, an update in flight changes over once.

Needs CUDA and vLLM built for it; says so and skips where they are not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from engine_worlds import VLLMWorld

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
"""float32 on a GPU may sum in another order than on a CPU, bfloat16 keeps 8 bits."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"
    ),
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMWorld]:
    made = VLLMWorld(tmp_path_factory.mktemp("model"), tied=True, device="cuda", dtype=request.param)
    made.start()
    made.run(made.publish("random"))
    yield made
    made.close()
    assert made.children() == []


def test_probe_is_the_models(world: VLLMWorld) -> None:
    tolerance = TOLERANCE[world.pool.dtype]
    tokens = list(range(40))
    for kind in ("other", "random"):
        world.run(world.publish(kind))
        got = world.run(world.engine.probe(tokens))
        assert got == pytest.approx(world.reference(kind, tokens).tolist(), abs=tolerance)


def test_logprobs_are_the_models_before_and_after_an_update(world: VLLMWorld) -> None:
    prefix = [index % 37 for index in range(400)]
    for kind in ("random", "other"):
        world.run(world.publish(kind))
        answer = world.run(world.answer(world.request(tokens=prefix, n=40)))
        expected = world.reference(kind, prefix + answer.tokens)[-40:]
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=TOLERANCE[world.pool.dtype])


def test_a_stream_goes_on_across_an_update(world: VLLMWorld) -> None:
    world.run(world.publish("repeat"))
    old = world.version

    async def spanning() -> tuple[list[int], list[int]]:
        tokens, versions = [], []
        sync: asyncio.Task[float] | None = None
        async for chunk in world.engine.generate(world.request(tokens=[5], n=700)):
            tokens += chunk.tokens
            versions += chunk.versions
            if sync is None and len(tokens) >= 20:
                sync = asyncio.create_task(world.publish("change"))
        assert sync is not None
        await sync
        return tokens, versions

    tokens, versions = world.run(spanning())
    assert sorted(set(versions)) == [old, old + 1]
    assert versions == sorted(versions)
    repeats = [token == before for token, before in zip(tokens, [5, *tokens[:-1]], strict=True)]
    assert repeats == [version == old for version in versions]
