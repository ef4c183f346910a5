"""A checkpoint as a Hugging Face folder: the same model as the live learner's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from asyncrl.learner.checkpoint_folder import BrokenCheckpoint
from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.export import export_model
from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.step import Learner

Open = Callable[..., Learner]
Tables = Callable[..., pa.Table]
TOKENS = [3, 10, 4, 11, 7, 0, 12]


def _checkpoint(one: Learner, table: pa.Table, folder: Path) -> list[float]:
    """Of a trained learner, which is closed then; returns its logprobs."""
    one.train(table, 4)
    one.checkpoint(folder)
    assert one.checkpoint_finished(60) == folder
    logprobs = one.logprobs(TOKENS)
    one.close()
    return logprobs


def _logprobs(folder: Path, dtype: torch.dtype | str = "auto") -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        out = model(torch.tensor([TOKENS])).logits[0].float().log_softmax(-1)
    return [float(out[i, token]) for i, token in enumerate(TOKENS[1:])]


@pytest.mark.parametrize("model", ["model_folder", "untied_folder"])
def test_the_exported_model_is_the_live_learner_s(
    request: pytest.FixtureRequest, learner: Open, make_table: Tables, tmp_path: Path, model: str
) -> None:
    base: Path = request.getfixturevalue(model)
    want = _checkpoint(learner(base, learning_rate=0.01), make_table(), tmp_path / "step-1")
    config = LearnerConfig(device="cpu")
    export_model(config, base, tmp_path / "step-1", tmp_path / "out")
    assert _logprobs(tmp_path / "out") == pytest.approx(want, abs=1e-5)
    assert want != pytest.approx(_logprobs(base), abs=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("1+2=3")) == "1+2=3"
    with pytest.raises(FileExistsError, match="never overwritten"):
        export_model(config, base, tmp_path / "step-1", tmp_path / "out")


def test_in_bfloat16(learner: Open, make_table: Tables, model_folder: Path, tmp_path: Path) -> None:
    want = _checkpoint(learner(learning_rate=0.01), make_table(), tmp_path / "step-1")
    export_model(LearnerConfig(device="cpu"), model_folder, tmp_path / "step-1", tmp_path / "out", "bfloat16")
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert _logprobs(tmp_path / "out", torch.float32) == pytest.approx(want, abs=0.05)


def test_adapters_are_merged(learner: Open, make_table: Tables, model_folder: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=8)
    want = _checkpoint(learner(lora=lora, learning_rate=0.01), make_table(), tmp_path / "step-1")
    large = sum(p.numel() * 12 for p in AutoModelForCausalLM.from_pretrained(model_folder).parameters())
    assert sum(path.stat().st_size for path in (tmp_path / "step-1").iterdir()) < large / 2
    config = LearnerConfig(device="cpu", lora=lora)
    export_model(config, model_folder, tmp_path / "step-1", tmp_path / "out")
    assert _logprobs(tmp_path / "out") == pytest.approx(want, abs=1e-5)
    assert sorted(os.listdir(tmp_path / "out" / "adapter"))[0] == "adapter_config.json"


def test_a_broken_checkpoint_is_not_exported(learner: Open, model_folder: Path, tmp_path: Path) -> None:
    one = learner()
    one.checkpoint(tmp_path / "step-1")
    one.checkpoint_finished(60)
    one.close()
    os.truncate(tmp_path / "step-1" / "rank-00000.safetensors", 1000)
    with pytest.raises(BrokenCheckpoint, match="has 1000 bytes"):
        export_model(LearnerConfig(device="cpu"), model_folder, tmp_path / "step-1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
