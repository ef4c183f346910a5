"""Inside a vLLM worker: the one LoRA adapter that every request runs with, replaced version by version.

The adapter keeps its id and its slot: requests under way go on with the new one at their next step, exactly as they do when
the whole model is replaced, and the engine's label of a step says which one that was. (An id of its own for each version
would tie a request to the version that it began with: its later tokens would be old ones, under a new label.)

Invariants: called between two steps; what does not match the engine's model raises before the old adapter is touched.
Called by `vllm_worker`; imports vLLM at once, as nothing else needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from asyncrl.weight_sync.errors import IncompleteWeights
from asyncrl.weight_sync.plan import Adapter

ADAPTER_ID: Final = 1


def replace_adapter(
    manager: Any, tensors: Mapping[str, torch.Tensor], adapter: Adapter, version: int
) -> None:
    """Puts `tensors`, under peft's names and not shared with anyone, in the place of the present adapter.

    `manager` is the worker's `LRUCacheWorkerLoRAManager`. Raises `IncompleteWeights` for layers that the model does not have, or
    has in another size.
    """
    slots = manager._adapter_manager
    taken = _as_model(manager, tensors, adapter)
    _check(slots, taken, version)
    slots.remove_adapter(ADAPTER_ID)
    slots.add_adapter(taken)
    slots.activate_adapter(ADAPTER_ID)


def _as_model(manager: Any, tensors: Mapping[str, torch.Tensor], adapter: Adapter) -> LoRAModel:
    model = manager._adapter_manager.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        dict(tensors),
        PEFTHelper(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=[]),  # type: ignore[arg-type]
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
    )


def _check(slots: Any, taken: LoRAModel, version: int) -> None:
    """vLLM passes over the adapter of a layer that it does not have, which would be other weights than the learner's."""
    parts = {part for packed in slots.packed_modules.values() for part in packed}
    unknown = sorted(name for name in taken.loras if name not in slots.modules and name not in parts)
    half = sorted(name for name, lora in taken.loras.items() if lora.lora_a is None or lora.lora_b is None)
    if unknown or half:
        raise IncompleteWeights(
            f"version {version}: of the adapter's {len(taken.loras)} layers the engine's model has {len(unknown)} not, first "
            f"{unknown[:3]}, and {len(half)} came without A or B, first {half[:3]}. Name other layers in "
            f'learner.lora.target_modules, or set learner.lora.sync = "merged"'
        )
