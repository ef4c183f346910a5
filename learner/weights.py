"""The learner's parameters on their way out: the bucket plan, one bucket's tensors, a Hugging Face folder.

Invariants: every rank walks the same plan in the same order; tied weights travel once; a folder is there whole or not at all.
Called by `step`, `sft` and `export`. Gathering is a collective.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from asyncrl.learner.lora_config import LoraConfig
from asyncrl.learner.model import Policy
from asyncrl.learner.outgoing import Outgoing, adapter_alone, whole_model

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
"""Within a saved model's folder."""
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


def save_folder(
    policy: Policy,
    model_path: str | Path,
    folder: Path,
    *,
    rank: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load: weights in `dtype`, config, tokenizer files; with LoRA
    the merged weights, and in `adapter/` the adapter alone as `peft.PeftModel.from_pretrained` loads it.

    A collective; rank 0 writes into a folder beside it and renames that. The tokenizer is that of `model_path`. Raises
    FileExistsError if `folder` is there already, after the collective, so that no other rank is left waiting.
    """
    state = _collected(whole_model(policy), rank, dtype)
    adapter = _collected(adapter_alone(policy), rank, torch.float32) if policy.lora else {}
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
        _name_dtype(partial / "config.json", dtype)
        _copy_tokenizer(model_path, partial)
        if policy.lora:
            write_adapter(adapter, policy.lora, str(model_path), partial / ADAPTER_FOLDER)
            _to_disk(partial / ADAPTER_FOLDER)
        _to_disk(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("saved model folder=%s tensors=%d", folder, len(state))


def write_adapter(state: dict[str, torch.Tensor], lora: LoraConfig, base: str, folder: Path) -> None:
    """An adapter folder in peft's layout, from tensors under the names of `outgoing.adapter_alone`, on the model `base`."""
    from asyncrl.learner.lora import PEFT_PREFIX, peft_config

    layers = {name.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for name in state}
    described = peft_config(lora, sorted(layers))
    described.base_model_name_or_path = base
    described.inference_mode = True
    folder.mkdir()
    described.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _collected(tensors: dict[str, Outgoing], rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """On the host, on rank 0; empty on the others. A collective."""
    state = {}
    for name, outgoing in tensors.items():
        tensor = outgoing.whole(dtype)
        if rank == 0:
            state[name] = tensor.cpu()
    return state


def _name_dtype(config: Path, dtype: torch.dtype) -> None:
    """transformers names the type of the model in memory, which with adapters is the base's: readers would load in that."""
    settings = json.loads(config.read_text())
    for part in (settings, settings.get("text_config", {})):
        part.pop("torch_dtype", None)
        if part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


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
