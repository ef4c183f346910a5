"""A vLLM engine on a GPU that takes linear weights in float8: what it computes is what the learner's cast stands for.

Needs CUDA of compute capability 7.5 or above and vLLM built for it; says so and skips where they are not.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator

import pytest
import torch
from engine_worlds import VLLMWorld
from offers import Offers

from asyncrl.learner.float8_blocks import dequantise, quantise
from asyncrl.weight_sync.float8 import scale_name

LEAST = (7, 5)
ON_AVERAGE = 0.15
"""Nats per token: activations are cast to float8 as well, with 3 bits of mantissa, and sums are kept in bfloat16."""


def _lack() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is false"
    found = torch.cuda.get_device_capability()
    return "" if found >= LEAST else f"compute capability {found}, float8 needs {LEAST} or above"


pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(_lack()), reason=_lack() or "there is one")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMWorld]:
    made = VLLMWorld(
        tmp_path_factory.mktemp("float8") / "model",
        tied=True,
        device="cuda",
        dtype="bfloat16",
        hidden_size=256,
        float8=True,
    )
    made.start()
    yield made
    made.close()


def cast(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a learner sends them."""
    sent = {}
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            sent[name], sent[scale_name(name)] = quantise(weight.detach())
        else:
            sent[name] = weight.detach().bfloat16()
    return sent


def reference(world: VLLMWorld, kind: str, sent: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Logprobs of the model that `sent` stands for, in float32."""
    model = copy.deepcopy(world.models[kind])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scales = sent.get(scale_name(name))
            weight.copy_(sent[name].float() if scales is None else dequantise(sent[name], scales))
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_versions_in_float8_are_loaded_one_after_the_other(world: VLLMWorld) -> None:
    tokens = [index % 37 for index in range(40)]
    first = cast(world.weights["random"])
    with Offers(f"test-{uuid.uuid4().hex[:12]}", first) as offers:
        for version, kind in enumerate(("random", "other", "random")):
            sent = cast(world.weights[kind])
            offer = offers.write(version, sent)
            world.run(world.engine.stage(offer))
            world.run(world.engine.apply(offer))
            got = torch.tensor(world.run(world.engine.probe(tokens)))
            near = (got - reference(world, kind, sent, tokens)).abs().mean()
            other = "other" if kind == "random" else "random"
            far = (got - reference(world, other, cast(world.weights[other]), tokens)).abs().mean()
            assert near < ON_AVERAGE and near < far / 4, (float(near), float(far))
