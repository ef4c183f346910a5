"""The learner at one rank, against plain autograd on the same Hugging Face model, and against itself divided otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from gathered import gathered
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.faults import NonFiniteLoss
from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.objective_config import GRPO
from asyncrl.learner.optimizer import warmed_up_then_decayed
from asyncrl.learner.step import Learner
from asyncrl.weight_sync.plan import Tied

Open = Callable[..., Learner]
Tables = Callable[..., pa.Table]


def _weights(learner: Learner, wire_dtype: str | None = None) -> dict[str, torch.Tensor]:
    return gathered(learner, learner.plan(10_000, wire_dtype))


def _set(table: pa.Table, name: str, values: list[object]) -> pa.Table:
    column = pa.array(values, BATCH.field(name).type)
    return table.set_column(table.schema.get_field_index(name), BATCH.field(name), column)


def _with_learners_logprobs(learner: Learner, table: pa.Table) -> pa.Table:
    """The table with behaviour logprobs as an engine of the learner's weights, at temperature 1, would give them."""
    rows = table.to_pylist()
    values = [
        learner.logprobs(row["prompt_tokens"] + row["tokens"])[len(row["prompt_tokens"]) - 1 :]
        for row in rows
    ]
    return _set(table, "logprobs", values)


def _reference_gradients(
    folder: Path, table: pa.Table, temperature: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of GRPO written out token by token, unpadded, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    rows = table.to_pylist()
    count = sum(sum(row["trainable"]) for row in rows)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        rewards = np.array([r["reward"] for r in rows if r["group_id"] == row["group_id"]])
        advantage = (row["reward"] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        prompt, answer = row["prompt_tokens"], row["tokens"]
        logits = model(torch.tensor([prompt + answer])).logits[0] / temperature
        for j, token in enumerate(answer):
            if not row["trainable"][j]:
                continue
            current = torch.log_softmax(logits[len(prompt) - 1 + j], -1)[token]
            weight = min(math.exp(current.item() - row["logprobs"][j]), 2.0)
            total = total - weight * (current - current.detach()).exp() * advantage / count
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("temperature", "model"), [(1.0, "model_folder"), (0.8, "untied_folder")])
def test_gradient_and_loss_are_those_of_the_formula(
    request: pytest.FixtureRequest, learner: Open, make_table: Tables, temperature: float, model: str
) -> None:
    folder: Path = request.getfixturevalue(model)
    table = make_table()
    loss, want = _reference_gradients(folder, table, temperature)
    # One step of plain descent shows the gradient: AdamW is replaced, nothing else.
    one = learner(folder, temperature, learning_rate=1.0, max_grad_norm=1e9, tokens_per_microbatch=100)
    one.trained["policy"].optimizer = torch.optim.SGD(one.trained["policy"].parameters.values(), lr=1.0)
    before = _weights(one)
    metrics = one.train(table, 4)
    after = _weights(one)
    assert metrics.loss == pytest.approx(loss, abs=1e-5)
    assert set(want) == set(before) and ("lm_head.weight" in before) == (model == "untied_folder")
    for name in before:
        torch.testing.assert_close((before[name] - after[name]).double(), want[name], atol=2e-6, rtol=1e-4)
    norm = math.sqrt(sum(float(g.square().sum()) for g in want.values()))
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)


def test_the_division_into_micro_batches_changes_nothing(learner: Open, make_table: Tables) -> None:
    """Plain descent, as above: AdamW divides by the gradient's size, and where that is nothing but rounding, so is what comes
    out. The weights move by far more than they may differ."""
    table = make_table(groups=6)
    results = []
    for tokens in (1, 90, 100_000):
        one = learner(
            tokens_per_microbatch=tokens, minibatches_per_step=2, max_grad_norm=1e9, learning_rate=1.0
        )
        before = _weights(one)
        one.trained["policy"].optimizer = torch.optim.SGD(one.trained["policy"].parameters.values(), lr=1.0)
        results.append((one.train(table, 4), _weights(one)))
    (first, weights), *others = results
    assert all((weights[name] - before[name]).abs().max() > 5e-4 for name in weights)
    assert first.tokens_padded == 0
    for metrics, other in others:
        assert metrics.tokens_padded == 0
        for name in (
            "loss",
            "grad_norm",
            "entropy",
            "importance_mean",
            "drift_p95",
            "mismatch_max",
            "clip_fraction",
        ):
            assert getattr(metrics, name) == pytest.approx(getattr(first, name), abs=2e-5), name
        for name in weights:
            torch.testing.assert_close(other[name], weights[name], atol=1e-5, rtol=1e-5)


def test_the_clip_acts_from_two_minibatches_on(learner: Open, make_table: Tables) -> None:
    table = make_table(groups=4)
    assert learner(learning_rate=0.05).train(table, 4).clip_fraction == 0
    one = learner(learning_rate=0.05, minibatches_per_step=2)
    metrics = one.train(table, 4)
    assert 0 < metrics.clip_fraction <= 0.5
    assert metrics.optimizer_steps == 2


def test_the_proximal_policy_is_that_of_batch_start(learner: Open, make_table: Tables) -> None:
    """With behaviour = learner at batch start, all importance weights are 1, however far the minibatches have moved."""
    one = learner(learning_rate=0.05, minibatches_per_step=4)
    table = _with_learners_logprobs(one, make_table(groups=4))
    metrics = one.train(table, 4)
    assert metrics.importance_mean == pytest.approx(1, abs=1e-5)
    assert metrics.drift_max < 1e-5
    assert metrics.mismatch_max <= metrics.drift_max
    rows = zip(table.column("versions").to_pylist(), table.column("trainable").to_pylist(), strict=True)
    assert metrics.mismatch_tokens == sum(sum(flags) for versions, flags in rows if versions[0] == 4) > 0


def test_a_wrong_engine_shows_as_mismatch(learner: Open, make_table: Tables) -> None:
    one = learner()
    table = _with_learners_logprobs(one, make_table())
    logprobs, versions = table.column("logprobs").to_pylist(), table.column("versions").to_pylist()
    off = [
        [x - 0.25 * (v == 4) for x, v in zip(a, b, strict=True)]
        for a, b in zip(logprobs, versions, strict=True)
    ]
    metrics = one.train(_set(table, "logprobs", off), 4)
    assert metrics.mismatch_mean == pytest.approx(0.25, abs=1e-5)
    assert metrics.mismatch_k3 == pytest.approx(math.exp(0.25) - 1.25, abs=1e-5)
    assert metrics.drift_max == pytest.approx(0.25, abs=1e-5)


def test_masked_tokens_are_context_only(learner: Open, make_table: Tables) -> None:
    """Rewriting the behaviour logprobs of masked tokens changes no weight; unmasking them does."""
    table = make_table(masked=0.5)
    flags, logprobs = table.column("trainable").to_pylist(), table.column("logprobs").to_pylist()
    moved = [
        [x if f else -9.0 for x, f in zip(a, b, strict=True)] for a, b in zip(logprobs, flags, strict=True)
    ]
    every = [[True] * len(row) for row in flags]
    tables = [table, _set(table, "logprobs", moved), _set(table, "trainable", every)]
    results = []
    for one_table in tables:
        one = learner()
        metrics = one.train(one_table, 4)
        assert metrics.tokens_trained + metrics.tokens_masked == sum(map(len, flags))
        results.append(_weights(one))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not all(torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_the_environment_s_tokens_are_context_and_in_no_figure(learner: Open, make_table: Tables) -> None:
    """Their logprob, which nobody sampled, moves no weight and no figure; the tokens themselves do: they are read."""
    table = make_table(masked=0.0)
    versions = [[-1 if i % 3 == 1 else v for i, v in enumerate(row)] for row in table["versions"].to_pylist()]
    flags = [[v >= 0 for v in row] for row in versions]
    logprobs = [
        [x if f else 0.0 for x, f in zip(a, b, strict=True)]
        for a, b in zip(table["logprobs"].to_pylist(), flags, strict=True)
    ]
    table = _set(_set(_set(table, "versions", versions), "trainable", flags), "logprobs", logprobs)
    wild = [
        [x if f else -30.0 for x, f in zip(a, b, strict=True)] for a, b in zip(logprobs, flags, strict=True)
    ]
    others = [
        [t if f else (t + 1) % 13 for t, f in zip(a, b, strict=True)]
        for a, b in zip(table["tokens"].to_pylist(), flags, strict=True)
    ]
    results = []
    for one_table in (table, _set(table, "logprobs", wild), _set(table, "tokens", others)):
        one = learner()
        metrics = one.train(one_table, 4)
        results.append((_weights(one), metrics))
    (weights, first), (same, second), (moved, _) = results
    given = sum(v < 0 for row in versions for v in row)
    assert first.tokens_environment == given > 0 and first.tokens_masked == 0
    assert first.tokens_trained == sum(map(sum, flags))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert not all(torch.equal(weights[name], moved[name]) for name in weights)
    for name in ("drift_max", "drift_k3", "importance_mean", "mismatch_max", "entropy", "loss"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), nan_ok=True)


def test_without_a_trainable_token_no_weight_moves(learner: Open, make_table: Tables) -> None:
    one = learner()
    one.train(make_table(seed=1), 4)
    before = _weights(one)
    metrics = one.train(make_table(masked=1.1), 4)
    assert metrics.tokens_trained == 0 and metrics.loss == 0 and metrics.optimizer_steps == 1
    assert math.isnan(metrics.mismatch_max) and metrics.drift_max > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in _weights(one).items())


def test_a_loss_that_is_not_finite_names_its_rollout_and_takes_no_step(
    learner: Open, make_table: Tables
) -> None:
    one = learner()
    before = _weights(one)
    table = make_table(masked=0.0)
    logprobs = table.column("logprobs").to_pylist()
    logprobs[6][0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"1 tokens: rollouts 106 \(versions \d-\d\)$"):
        one.train(_set(table, "logprobs", logprobs), 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in _weights(one).items())
    one.train(table, 4)


def test_a_gradient_that_is_not_finite_takes_no_step(learner: Open, make_table: Tables) -> None:
    """Rewards of 1e30 give a finite loss, but the squares of the gradient overflow."""
    one = learner(objective=GRPO(normalise_std=False))
    table = make_table()
    huge = [1e30 * (i % 3) for i in range(table.num_rows)]
    before = _weights(one)
    with pytest.raises(NonFiniteLoss, match=r"gradient norm is (inf|nan): rollouts 100 .* and 8 more$"):
        one.train(_set(table, "reward", huge), 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in _weights(one).items())


def test_buckets_hold_the_checkpoint_in_the_wire_dtype(model_folder: Path, learner: Open) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    want = dict(model.named_parameters())
    one = learner()
    for wire in (None, "bfloat16"):
        found = _weights(one, wire)
        assert found.keys() == want.keys() and "lm_head.weight" not in found
        for name, tensor in found.items():
            dtype = torch.bfloat16 if wire else torch.float32
            torch.testing.assert_close(tensor, want[name].detach().to(dtype), atol=0, rtol=0)
    plan = one.plan(10_000)
    assert len(plan.buckets) > 3 and plan.total_bytes == 4 * sum(p.numel() for p in want.values())
    assert max(bucket.size for bucket in plan.buckets) <= 10_000
    assert plan.tied == (Tied(name="lm_head.weight", of="model.embed_tokens.weight"),)
    layers = [f"model.layers.{layer}." for layer in range(2)]
    modules = [
        name + kind for name in ("self_attn.qkv_proj.", "mlp.gate_up_proj.") for kind in ("weight", "bias")
    ]
    assert {each.name for each in plan.fused} == {
        layer + module
        for layer in layers
        for module in modules
        if "mlp" not in module or "bias" not in module
    }
    narrow = one.plan(10_000, "bfloat16")
    assert {spec.cast_from for spec in narrow.tensors} == {"float32"}
    assert {spec.cast_from for spec in plan.tensors} == {""}


def test_a_plan_for_every_rank_is_refused_where_no_rank_has_rows_to_send(learner: Open) -> None:
    merged = learner(lora=LoraConfig(rank=4))
    with pytest.raises(ValueError, match=r'computed from several.*weight_sync\.senders = "one"'):
        merged.plan(10_000, senders="all")
    alone = learner(lora=LoraConfig(rank=4, sync="adapter"))
    plan = alone.plan(10_000, senders="all")
    assert plan.senders == 1 and not plan.fused and not plan.tied
    assert all("lora_" in name for name in gathered(alone, plan))


def test_logprobs_follow_the_weights(learner: Open, make_table: Tables, tmp_path: Path) -> None:
    one = learner(temperature=0.5)
    tokens = [3, 10, 4, 11, 7, 14]
    start = one.logprobs(tokens)
    assert len(start) == 5
    one.train(make_table(), 4)
    one.save(tmp_path / "v1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "v1", dtype=torch.float32)
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)
    want = [float(table[i, token]) for i, token in enumerate(tokens[1:])]
    assert one.logprobs(tokens) == pytest.approx(want, abs=1e-5)
    assert start != pytest.approx(want, abs=1e-3)


def test_a_saved_folder_loads_and_is_not_overwritten(
    learner: Open, model_folder: Path, make_table: Tables, tmp_path: Path
) -> None:
    one = learner()
    one.train(make_table(), 4)
    want = _weights(one)
    one.save(tmp_path / "step-1")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    again = learner(tmp_path / "step-1")
    assert all(torch.equal(want[name], tensor) for name, tensor in _weights(again).items())
    tokenizers = [AutoTokenizer.from_pretrained(p) for p in (model_folder, tmp_path / "step-1")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    with pytest.raises(FileExistsError, match="step-1"):
        again.save(tmp_path / "step-1")


def test_the_rate_warms_up_over_optimizer_steps(learner: Open, make_table: Tables) -> None:
    one = learner(learning_rate=0.01, warmup_steps=4, minibatches_per_step=2)
    rates = [one.train(make_table(), 4).learning_rate for _ in range(3)]
    assert rates == pytest.approx([0.005, 0.01, 0.01])


def test_training_raises_the_probability_of_what_was_rewarded(learner: Open, make_table: Tables) -> None:
    one = learner(learning_rate=0.003)
    table = make_table(masked=0.0, seed=5)
    row = max(table.to_pylist(), key=lambda r: (r["reward"], len(r["tokens"])))
    tokens = row["prompt_tokens"] + row["tokens"]
    answer = len(row["tokens"])
    before = sum(one.logprobs(tokens)[-answer:])
    for _ in range(5):
        one.train(table, 4)
    assert sum(one.logprobs(tokens)[-answer:]) > before + 1


def test_bfloat16_computes_close_to_float32(learner: Open, make_table: Tables) -> None:
    table = make_table()
    full = learner().train(table, 4)
    half = learner(dtype="bfloat16")
    metrics = half.train(table, 4)
    assert metrics.entropy == pytest.approx(full.entropy, abs=0.02)
    assert metrics.grad_norm == pytest.approx(full.grad_norm, rel=0.1)
    assert all(spec.dtype == "float32" for spec in half.plan(10_000).tensors)


def test_the_second_learner_of_a_process_is_refused(learner: Open, model_folder: Path) -> None:
    one = learner()
    with pytest.raises(RuntimeError, match="already is in a process group"):
        Learner(one._config, model_folder, 1.0)


def test_the_rate_warms_up_falls_to_a_tenth_and_stays_there() -> None:
    rates = [warmed_up_then_decayed(1.0, step, 2, 10) for step in (1, 2, 5, 10, 50)]
    assert rates == pytest.approx([0.455, 0.82, 0.55, 0.1, 0.1])
    assert warmed_up_then_decayed(1.0, 500, 2, 0) == 1.0
