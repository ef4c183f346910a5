"""From a checkpoint to a Hugging Face folder, in the calling process alone: no Ray, no other rank, whatever wrote it.

The policy is built as a learner builds it, at one rank on the CPU, so adapters are merged by the same code; the checkpoint's
masters take the place of the model folder's. Called by the `export` command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from asyncrl.learner.checkpoint_folder import check
from asyncrl.learner.checkpoint_state import load_weights
from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.distributed import init_distributed, leave_distributed
from asyncrl.learner.model import load_policy, trained_parameters
from asyncrl.learner.weights import save_folder

Dtype = Literal["float32", "bfloat16", "float16"]
_TIMEOUT_S = 600.0
"""Nobody is waited for at one rank; a process group has one."""


def export_model(
    config: LearnerConfig, model_path: str | Path, checkpoint: Path, out: Path, dtype: Dtype = "float32"
) -> None:
    """Writes `out`, which AutoModelForCausalLM, AutoTokenizer and vLLM load; with LoRA also the adapter alone, in `out/adapter`.

    `config` and `model_path` are those of the run: config, tokenizer and a frozen base come from `model_path`. Needs the memory
    of the model in float32. Raises FileExistsError if `out` is there, `BrokenCheckpoint` if a byte of `checkpoint` is not as it
    was written, or if it is of another model. Not while a `Learner` lives in this process.
    """
    if out.exists():
        raise FileExistsError(
            f"{out} is there already; a saved model is never overwritten: choose another folder"
        )
    check(checkpoint)
    mesh = init_distributed(0, 1, "", "cpu", _TIMEOUT_S)
    try:
        policy = load_policy(model_path, mesh, "float32", config.lora)
        load_weights(checkpoint, "policy", trained_parameters(policy))
        save_folder(policy, model_path, out, rank=0, dtype=getattr(torch, dtype))
    finally:
        leave_distributed()
