"""Versions that are LoRA adapters, on real vLLM: the base comes from the folder, and an adapter replaces the one before it
between two steps, with the same promises as whole weights (`test_engine`). One engine serves all tests, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import peft
import pytest
import tiny
import torch
from engine_worlds import World
from transformers import Qwen2ForCausalLM

from asyncrl.generators.config import PoolConfig
from asyncrl.generators.engine import EngineDead
from asyncrl.generators.vllm_engine import VLLMEngine
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.plan import Adapter

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4
RANK, ALPHA = 5, 7.0


class AdapterWorld(World):
    """`one` and `two` are adapters on all linear layers of a tiny model's decoder, made by peft."""

    max_tokens = 768

    def __init__(self, folder: Path) -> None:
        self.folder = tiny.write_model(folder, tied=True)
        self.models: dict[str, torch.nn.Module] = {}
        weights = {}
        for seed, kind in enumerate(("one", "two")):
            base = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
            config = peft.LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=False
            )
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(base, config)
            weights[kind] = {
                name.replace(".default.", "."): parameter.detach().clone()
                for name, parameter in adapted.named_parameters()
                if parameter.requires_grad
            }
            self.models[kind] = adapted.merge_and_unload()
        super().__init__(weights, Adapter(rank=RANK, alpha=ALPHA))
        pool = PoolConfig(
            name="test",
            device="cpu",
            concurrency=16,
            kv_cache_bytes=2**27,
            dtype="float32",
            start_timeout_s=240.0,
        )
        self.engine = VLLMEngine(pool, str(folder), "test-adapter", self.max_tokens, adapter_rank=RANK)

    def start(self) -> None:
        async def start() -> None:
            await self.engine.start()

        self._runner.run(start())  # bounded by the pool's `start_timeout_s`

    def reference(self, kind: str, tokens: Sequence[int]) -> list[float]:
        """Logprob of each token after the first by Hugging Face, adapter merged."""
        with torch.no_grad():
            logits = self.models[kind](torch.tensor([list(tokens)])).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(list(tokens)[1:])[:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterWorld]:
    made = AdapterWorld(tmp_path_factory.mktemp("model"))
    made.start()
    yield made
    made.close()
    assert made.children() == []


def test_the_base_alone_answers_nobody(world: AdapterWorld) -> None:
    with pytest.raises(RuntimeError, match="weights"):
        world.run(world.answer(world.request()))


def test_a_whole_model_is_refused_before_anything_is_touched(world: AdapterWorld) -> None:
    offer = world.offer("one")
    whole = msgspec.structs.replace(offer, plan=msgspec.structs.replace(offer.plan, adapter=None))
    with pytest.raises(
        WeightSyncError, match=r"expected an adapter of rank 5, got a whole model; .*\[learner.lora\]"
    ):
        world.run(world.engine.stage(whole))


def test_each_version_is_its_adapter_on_the_base(world: AdapterWorld) -> None:
    tokens = list(range(40))
    assert (
        max(abs(a - b) for a, b in zip(*(world.reference(k, tokens) for k in world.models), strict=True))
        > 0.1
    )
    for kind in ("one", "two", "one"):
        assert world.run(world.publish(kind)) > 0
        assert world.run(world.engine.probe(tokens)) == pytest.approx(
            world.reference(kind, tokens), abs=TOLERANCE
        )
        answer = world.run(world.answer(world.request(tokens=range(20), n=60)))
        expected = world.reference(kind, [*range(20), *answer.tokens])[-60:]
        assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)
        assert set(answer.versions) == {world.version}


def test_a_stream_goes_on_across_an_adapter(world: AdapterWorld) -> None:
    """Old tokens are the old adapter's under the old version; new ones come of the new adapter, over the old KV cache."""
    world.run(world.publish("one"))
    for request, answer, kept in world.run(world.across_an_update("two", after_s=0.3)):
        expected = world.reference("one", request.tokens + answer.tokens)[2:302]
        assert answer.logprobs[:kept] == pytest.approx(expected[:kept], abs=TOLERANCE)
        later = zip(answer.logprobs[kept:], expected[kept:], strict=True)
        assert max(abs(a - b) for a, b in later) > 0.1  # they are not the old adapter's


def test_new_requests_never_read_the_kv_of_an_older_adapter(world: AdapterWorld) -> None:
    prefix = [index % 37 for index in range(400)]
    for kind in ("one", "two", "one"):
        world.run(world.publish(kind))
        for _ in range(2):  # the second time the blocks come from the cache of this version
            answer = world.run(world.answer(world.request(tokens=prefix, n=20)))
            expected = world.reference(kind, prefix + answer.tokens)[-20:]
            assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_an_adapter_for_another_model_ends_the_engine_and_names_the_layers(world: AdapterWorld) -> None:
    renamed = {name.replace("q_proj", "query"): tensor for name, tensor in world.weights["one"].items()}
    with type(world.offers)("test-adapter-other", renamed, adapter=Adapter(rank=RANK, alpha=ALPHA)) as others:
        offer = others.write(world.version + 1, renamed)
        world.run(world.engine.stage(offer))
        with pytest.raises(EngineDead, match=r"2 not, first .*layers.0.self_attn.query"):
            world.run(world.engine.apply(offer))
