"""The learner's parameters on their way out: the bucket plan, one bucket's tensors, a Hugging Face folder.

Invariants: every rank walks the same plan in the same order; tied weights travel once; a folder is there whole or not at all.
Called by `step` and `sft`. Gathering is a collective.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from asyncrl.learner.model import Policy, checkpoint_parameters

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
)


def whole(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """The parameter from all ranks' shards, cast to `dtype`, contiguous, on the learner's device. A collective.

    May share memory with the master on one rank: copy it before the next step if it must last.
    """
    data = parameter.detach()
    full = data.full_tensor() if isinstance(data, DTensor) else data
    return full.to(dtype).contiguous()


def save_folder(policy: Policy, model_path: str | Path, folder: Path, *, rank: int) -> None:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load: float32 weights, config, tokenizer files.

    A collective; rank 0 writes into a folder beside it and renames that. The tokenizer is that of `model_path`. Raises
    FileExistsError if `folder` is there already, after the collective, so that no other rank is left waiting.
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in checkpoint_parameters(policy).items():
        tensor = whole(parameter, torch.float32)
        if rank == 0:
            state[name] = tensor.cpu()
    if rank != 0:
        return
    if folder.exists():
        raise FileExistsError(
            f"{folder} is there already; a saved model is never overwritten: choose another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        policy.lm.save_pretrained(partial, state_dict=state)
        _copy_tokenizer(model_path, partial)
        _to_disk(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("saved model folder=%s tensors=%d", folder, len(state))


def _copy_tokenizer(model_path: str | Path, folder: Path) -> None:
    source = Path(model_path)
    if not source.is_dir():
        AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
        return
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _to_disk(folder: Path) -> None:
    """A rename may reach the disk before the bytes do; a crash would then leave a named folder of empty files."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
