"""`asyncrl sft`, as a user types it: a small model from nothing, once."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]


def sft(model):
    return subprocess.run(
        [
            *(
                sys.executable,
                "-P",
                "-m",
                "asyncrl.runtime.cli",
                "sft",
                str(ROOT / "recipes" / "quickstart.toml"),
            ),
            *(
                "--set",
                f"model.path={model}",
                "--set",
                "sft.steps=30",
                "--set",
                "sft.hidden_size=64",
                "--set",
                "sft.heads=2",
            ),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_model_is_made_once_and_can_be_loaded(tmp_path):
    folder = tmp_path / "model"
    done = sft(folder)
    assert done.returncode == 0, done.stderr
    assert "sft step 30/30 loss" in done.stdout
    loss = float(done.stdout.split("sft step 30/30 loss ")[1].split()[0])
    assert loss < 2.0  # a uniform guess over 15 characters is 2.7
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode("3+9+4=")) == "3+9+4="
    again = sft(folder)
    assert again.returncode == 2 and "is there already" in again.stderr
