"""Adapters: the same gradients as peft's own, the base as it was, merged weights as peft merges them, adapter folders that
peft loads; with the base in float32, in bfloat16 and in 4 bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
from gathered import gathered
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.distributed import init_distributed, leave_distributed
from asyncrl.learner.export import export_model
from asyncrl.learner.lora_config import LoraConfig, broken_lora_rules
from asyncrl.learner.model import load_policy
from asyncrl.learner.objective_config import GRPO, KL, RLOO
from asyncrl.learner.quantised import Linear4Bit, pack, packed_bytes, unpack
from asyncrl.learner.sharding_config import ShardingConfig
from asyncrl.learner.step import Learner

Open = Callable[..., Learner]
Tables = Callable[..., pa.Table]
TOKENS = [3, 10, 4, 11, 7, 12, 1, 0, 9]


def _sent(learner: Learner, wire_dtype: str | None = None) -> dict[str, torch.Tensor]:
    return gathered(learner, learner.plan(10_000, wire_dtype))


def _stir(learner: Learner, spread: float = 0.1) -> None:
    """B begins as 0, where a wrong scale or place would not show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in learner.trained["policy"].parameters.items():
            if ".lora_B." in name:
                local = parameter.to_local()
                local.copy_(torch.randn(local.shape, generator=generator) * spread)


def _adapters(learner: Learner) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().full_tensor().clone()
        for name, parameter in learner.trained["policy"].parameters.items()
    }


def _by_peft(folder: Path, learner: Learner, config: LoraConfig) -> peft.PeftModel:
    """peft's model of the same base with the learner's adapters."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = config.target_modules
    made = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=0.0)
    model = peft.get_peft_model(base, made)
    state = {f"base_model.model.{name}": tensor for name, tensor in _adapters(learner).items()}
    assert set(state) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.load_state_dict(state, strict=False)
    return model.eval()


def _logprobs(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_version_zero_is_the_base(model_folder: Path, learner: Open) -> None:
    plain = _sent(learner())
    adapted = _sent(learner(lora=LoraConfig(rank=4)))
    assert list(plain) == list(adapted)
    assert all(torch.equal(plain[name], adapted[name]) for name in plain)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_have_the_gradients_of_peft_s_own(
    model_folder: Path, learner: Open, make_table: Tables, targets: list[str]
) -> None:
    config = LoraConfig(rank=4, alpha=6.0, target_modules=targets)
    table = make_table(masked=0.0)
    one = learner(lora=config, learning_rate=1.0, max_grad_norm=1e9, tokens_per_microbatch=100)
    _stir(one)
    model = _by_peft(model_folder, one, config)
    policy = one.trained["policy"]
    policy.optimizer = torch.optim.SGD(policy.parameters.values(), lr=1.0)
    before = _adapters(one)
    one.train(table, 4)
    after = _adapters(one)
    _grpo_loss(model, table).backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(before) == len(want) and max(float(grad.abs().max()) for grad in want.values()) > 1e-3
    for name in before:
        moved = before[name] - after[name]
        torch.testing.assert_close(moved, want[f"base_model.model.{name}"], atol=1e-5, rtol=1e-4)


def _grpo_loss(model: torch.nn.Module, table: pa.Table) -> torch.Tensor:
    """As `test_step` writes it out, for a table without masked tokens."""
    rows = table.to_pylist()
    count = sum(len(row["tokens"]) for row in rows)
    total = torch.zeros(())
    for row in rows:
        rewards = np.array([r["reward"] for r in rows if r["group_id"] == row["group_id"]])
        advantage = (row["reward"] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        current = _logprobs(model, row["prompt_tokens"] + row["tokens"])[len(row["prompt_tokens"]) - 1 :]
        weight = (current.detach() - torch.tensor(row["logprobs"])).exp().clamp(max=2.0)
        total = total - (weight * (current - current.detach()).exp() * advantage).sum() / count
    return total


def test_what_is_sent_is_what_peft_merges(model_folder: Path, learner: Open, make_table: Tables) -> None:
    config = LoraConfig(rank=4, alpha=6.0)
    one = learner(lora=config, learning_rate=0.05)
    for version in range(3):
        one.train(make_table(seed=version), 4)
    merged: PreTrainedModel = _by_peft(model_folder, one, config).merge_and_unload()
    want = dict(merged.named_parameters())
    sent = _sent(one)
    assert set(sent) == set(want)
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, want[name].detach(), atol=1e-6, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert any((sent[name] - tensor).abs().max() > 1e-2 for name, tensor in base.named_parameters())
    assert all(torch.equal(tensor, sent[name]) for name, tensor in _sent(one).items())
    got = one.logprobs(TOKENS)
    assert got == pytest.approx(_logprobs(merged, TOKENS).tolist(), abs=1e-5)


def test_off_the_adapters_the_policy_is_its_base(model_folder: Path, learner: Open) -> None:
    """The first pass of all is the reference's: adapters must get gradients afterwards all the same."""
    one = learner(lora=LoraConfig(rank=4), learning_rate=0.1)
    policy = one.trained["policy"].module
    _stir(one, spread=0.5)
    with policy.adapters_off():
        base = one.logprobs(TOKENS)
    own = one.logprobs(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert base == pytest.approx(_logprobs(model, TOKENS).tolist(), abs=1e-5)
    assert max(abs(a - b) for a, b in zip(own, base, strict=True)) > 0.1


def test_a_reference_pass_first_takes_no_gradient_away(learner: Open, make_table: Tables) -> None:
    results = []
    for reference_first in (False, True):
        one = learner(lora=LoraConfig(rank=4), learning_rate=0.01)
        _stir(one)
        if reference_first:
            with one.trained["policy"].module.adapters_off():
                one.logprobs(TOKENS)
        before = _adapters(one)
        one.train(make_table(), 4)
        results.append(_adapters(one))
        assert all(not torch.equal(before[name], results[-1][name]) for name in before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_without_adapters_there_is_nothing_to_switch_off(learner: Open) -> None:
    with pytest.raises(ValueError, match=r"learner\.lora"), learner().trained["policy"].module.adapters_off():
        pass


def test_a_saved_model_is_merged_and_has_its_adapter_beside(
    model_folder: Path, learner: Open, make_table: Tables, tmp_path: Path
) -> None:
    one = learner(
        lora=LoraConfig(rank=4, alpha=6.0, target_modules=["q_proj", "up_proj"]), learning_rate=0.05
    )
    one.train(make_table(), 4)
    one.save(tmp_path / "model")
    want = one.logprobs(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert _logprobs(model, TOKENS).tolist() == pytest.approx(want, abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = _logprobs(base, TOKENS).tolist()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    assert (
        _logprobs(adapted, TOKENS).tolist()
        == pytest.approx(want, abs=1e-5)
        != pytest.approx(before, abs=1e-3)
    )
    assert adapted.peft_config["default"].base_model_name_or_path == str(model_folder)


@pytest.fixture(scope="module")
def bfloat16_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16")
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def test_a_base_stays_in_the_type_it_is_stored_in(
    bfloat16_folder: Path, learner: Open, make_table: Tables
) -> None:
    one = learner(bfloat16_folder, lora=LoraConfig(rank=4), learning_rate=0.05)
    types = {p.requires_grad: p.dtype for p in one.trained["policy"].module.parameters()}
    assert types == {False: torch.bfloat16, True: torch.float32}
    one.train(make_table(), 4)
    sent = _sent(one)
    want = dict(_by_peft(bfloat16_folder, one, LoraConfig(rank=4)).merge_and_unload().named_parameters())
    for name in want:
        torch.testing.assert_close(sent[name].float(), want[name].detach(), atol=1e-6, rtol=0)


QLORA = LoraConfig(rank=4, alpha=6.0, quantise="nf4")


def test_a_base_in_4_bits_is_sent_as_what_the_learner_computes_with(
    model_folder: Path, learner: Open, make_table: Tables, tmp_path: Path
) -> None:
    one = learner(lora=QLORA, learning_rate=0.05)
    one.train(make_table(), 4)
    one.save(tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert one.logprobs(TOKENS) == pytest.approx(_logprobs(merged, TOKENS).tolist(), abs=1e-5)
    sent, saved = _sent(one), dict(merged.named_parameters())
    assert set(sent) == set(saved) and all(torch.equal(sent[name], saved[name]) for name in sent)


def test_a_base_in_4_bits_is_rounded_as_bitsandbytes_rounds_it(model_folder: Path, learner: Open) -> None:
    sent = _sent(learner(lora=QLORA))
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    linear = {
        name for name, module in base.model.layers.named_modules() if isinstance(module, torch.nn.Linear)
    }
    for name, tensor in base.named_parameters():
        rounded = name.removeprefix("model.layers.").removesuffix(".weight") in linear
        if not rounded:
            assert torch.equal(sent[name], tensor)
            continue
        codes, state = bitsandbytes.functional.quantize_4bit(tensor.detach(), blocksize=64, quant_type="nf4")
        assert torch.equal(sent[name], bitsandbytes.functional.dequantize_4bit(codes, state))
        assert 0 < (sent[name] - tensor).abs().max() < 0.2 * tensor.abs().max()


def test_steps_of_qlora_lower_the_loss(learner: Open, make_table: Tables) -> None:
    """On one batch, again and again: better answers become likelier, and memory of the base is half a byte a weight."""
    one = learner(lora=QLORA, learning_rate=0.01, objective=RLOO())
    table = make_table(masked=0.0)
    losses = []
    for _ in range(8):
        losses.append(_rloo_loss(one, table))
        one.train(table, 4)
    assert losses[-1] < losses[0] - 0.1
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def _rloo_loss(learner: Learner, table: pa.Table) -> float:
    """-mean of advantage x logprob, the direction that every step descends."""
    rows = table.to_pylist()
    total = 0.0
    for row in rows:
        rewards = [r["reward"] for r in rows if r["group_id"] == row["group_id"]]
        logprobs = learner.logprobs(row["prompt_tokens"] + row["tokens"])[len(row["prompt_tokens"]) - 1 :]
        total -= (row["reward"] - np.mean(rewards)) * sum(logprobs) / len(rows)
    return total


@pytest.mark.parametrize("shape", [(64, 64), (8, 24), (7, 9), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_in_4_bits_is_one_parameter_of_bytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(shape[1], shape[0])
    packed = Linear4Bit(linear)
    assert len(packed.weight) == packed_bytes(linear.weight.numel()) and packed.weight.dtype == torch.uint8
    weight = packed.dequantised(packed.weight).to(dtype)
    x = torch.randn(5, shape[1], dtype=dtype, requires_grad=True)
    packed.bias = torch.nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    out = packed(x)
    torch.testing.assert_close(
        out, x @ weight.T + packed.bias, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0
    )
    (gradient,) = torch.autograd.grad(out.sum(), x)
    want = torch.ones_like(out) @ weight
    torch.testing.assert_close(gradient, want, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=2e-2)


@given(st.integers(1, 20), st.integers(1, 200), st.integers(0, 2**31), st.floats(-3, 3))
@example(5, 16, 0, 0.0)  # where bitsandbytes' kernel for the CPU takes the scale of another block
@example(33, 160, 0, 0.0)
def test_rounding_to_4_bits_errs_by_half_a_gap_of_its_block_at_most(
    rows: int, columns: int, seed: int, logarithm: float
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**logarithm
    packed = pack(weight)
    assert len(packed) == packed_bytes(weight.numel())
    rounded = unpack(packed, weight.shape, torch.float32)
    widest_gap = 0.31  # of NF4's 16 values, between -1 and 1
    for block, other in zip(weight.flatten().split(64), rounded.flatten().split(64), strict=True):
        assert (block - other).abs().max() <= 1.01 * widest_gap / 2 * block.abs().max()


def test_a_target_that_is_not_there_is_named(model_folder: Path) -> None:
    mesh = init_distributed(0, 1, "", "cpu", 60.0)
    try:
        with pytest.raises(ValueError, match=r"target_modules: query .* which have down_proj, gate_proj"):
            load_policy(model_folder, mesh, "float32", LoraConfig(target_modules=["q_proj", "query"]))
    finally:
        leave_distributed()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"dropout": 0.1}, "learner.lora.dropout"),
        ({"target_modules": []}, "learner.lora.target_modules"),
        ({"sync": "adapter", "quantise": "nf4"}, "learner.lora.sync"),
        ({"sync": "adapter", "rank": 513}, "learner.lora.rank"),
    ],
)
def test_rules(settings: dict[str, object], key: str) -> None:
    assert [found for found, _, _ in broken_lora_rules(LoraConfig(**settings))] == [key]  # type: ignore[arg-type]


def test_no_rule_is_broken_by_default() -> None:
    every = (None, LoraConfig(), LoraConfig(sync="adapter"), LoraConfig(quantise="nf4"))
    assert [list(broken_lora_rules(lora)) for lora in every] == [[], [], [], []]


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), QLORA], ids=["float32", "nf4"])
def test_checkpointed_activations_change_nothing(learner: Open, make_table: Tables, lora: LoraConfig) -> None:
    results = []
    for checkpointing in ("none", "full"):
        one = learner(
            lora=lora, learning_rate=0.01, sharding=ShardingConfig(activation_checkpointing=checkpointing)
        )
        _stir(one)
        with one.trained["policy"].module.adapters_off():
            one.logprobs(TOKENS)
        one.train(make_table(), 4)
        results.append(_adapters(one))
    assert results[0].keys() == results[1].keys()
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), QLORA], ids=["float32", "nf4"])
def test_bfloat16_computes_about_the_same_and_leaves_the_masters(
    learner: Open, make_table: Tables, lora: LoraConfig
) -> None:
    """Bytes of a base in 4 bits are not numbers: a cast on the way to a pass would be seen at once."""
    results = []
    for dtype in ("float32", "bfloat16"):
        one = learner(lora=lora, learning_rate=1e-3, dtype=dtype)
        _stir(one)
        before = one.logprobs(TOKENS)
        one.train(make_table(), 4)
        results.append((before, _adapters(one)))
    assert results[1][0] == pytest.approx(results[0][0], abs=0.1)
    assert results[1][0] != pytest.approx(results[0][0], abs=1e-6)
    for name, tensor in results[1][1].items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, results[0][1][name], atol=5e-3, rtol=0)


def test_the_base_is_the_reference_of_a_kl(learner: Open, make_table: Tables) -> None:
    """Without a model of its own: no distance at first, and some once the adapters have learned."""
    kl = KL(estimator="k3", coefficient=0.01, place="loss")
    one = learner(lora=LoraConfig(rank=4), learning_rate=0.02, objective=GRPO(kl=kl))
    first = one.train(make_table(masked=0.0), 4).kl_reference
    later = [one.train(make_table(masked=0.0, seed=seed), 4).kl_reference for seed in range(3)]
    assert first == pytest.approx(0.0, abs=1e-6) and min(later) > 0.01


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), QLORA], ids=["float32", "nf4"])
def test_a_checkpoint_holds_the_adapters_alone(
    model_folder: Path, learner: Open, make_table: Tables, tmp_path: Path, lora: LoraConfig
) -> None:
    one = learner(lora=lora, learning_rate=0.02)
    one.train(make_table(seed=1), 4)
    one.checkpoint(tmp_path / "step-1")
    assert one.checkpoint_finished(60) == tmp_path / "step-1"
    want = _adapters(one)
    sent = {name: tensor.clone() for name, tensor in _sent(one).items()}
    one.train(make_table(seed=2), 4)
    then = _adapters(one)
    other = learner(lora=lora, learning_rate=0.02)
    other.restore(tmp_path / "step-1")
    assert all(torch.equal(want[name], tensor) for name, tensor in _adapters(other).items())
    assert all(torch.equal(sent[name], tensor) for name, tensor in _sent(other).items())
    other.train(make_table(seed=2), 4)
    assert all(torch.equal(then[name], tensor) for name, tensor in _adapters(other).items())
    size = sum(file.stat().st_size for file in (tmp_path / "step-1").rglob("*"))
    state = 3 * 4 * sum(tensor.numel() for tensor in want.values())
    assert state < size < state + 100_000
    other.close()
    config = LearnerConfig(device="cpu", lora=lora)
    export_model(config, model_folder, tmp_path / "step-1", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert all(torch.equal(sent[name], tensor) for name, tensor in exported.named_parameters())
    assert (tmp_path / "exported" / "adapter" / "adapter_config.json").is_file()
