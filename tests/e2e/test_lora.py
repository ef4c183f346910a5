"""A launched run that trains adapters: engines get merged weights, or the adapter alone; either way they compute what the
learner does."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.runs import VLLM, launched, tiny_model


@pytest.mark.vllm
@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_a_run_with_adapters(tmp_path, sync):
    model = tiny_model(tmp_path / "model")
    (tmp_path / "brevity.py").write_text(
        "def reward(answer_text, payload):\n    return 1 / (1 + len(answer_text))\n"
    )
    changes = (
        *VLLM,
        "run.steps=4",
        "weight_sync.verify=always",
        'rewards.terms=[{ function = "brevity:reward" }]',
        "learner.learning_rate=0.01",
        f'learner.lora={{ rank = 4, sync = "{sync}" }}',
    )
    with launched(tmp_path, model, *changes) as run:
        run.wait_for_step()
        children = run.descendants()
        assert run.end() == 0, run.text
        assert run.left_over(children) == []
    summary = run.summary
    assert summary["outcome"] == "finished" and summary["versions_published"] == 4
    assert summary["conservation"]["holds"] and summary["tokens_past_bound"] == 0
    assert summary["mismatch"]["tokens"] > 0 and summary["mismatch"]["max"] <= 1e-3
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    merged = dict(AutoModelForCausalLM.from_pretrained(run.folder / "model").named_parameters())
    assert any((merged[name] - weight).abs().max() > 1e-3 for name, weight in base.named_parameters())
    adapted = peft.PeftModel.from_pretrained(base, run.folder / "model" / "adapter").merge_and_unload()
    for name, weight in adapted.named_parameters():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=0)
