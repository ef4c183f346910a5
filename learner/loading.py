"""Building a Hugging Face model without its weights, and reading into each rank only its own shards of them.

    build (parameters on torch's meta device, buffers real) --> the caller wraps and shards --> fill

Invariants: no rank ever holds the whole model, but for one tensor where a converter needs it; tied weights stay one parameter;
buffers are those that the model's own constructor computes, on the CPU as from_pretrained does.
Called by `model` and by what else loads a model for the learner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from asyncrl.learner.attention import NAME as PACKED
from asyncrl.learner.packing_check import check_kind
from asyncrl.learner.weight_files import Source, WeightFiles, read_rows
from asyncrl.learner.weight_names import find_sources

_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json")


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model without weights, and where they stand."""

    model: PreTrainedModel
    folder: Path
    sources: Mapping[str, Source]
    """By the model's names as built, tied ones under every name."""
    shapes: Mapping[str, torch.Size]


def model_folder(path: str | Path) -> Path:
    """`path` if it is a folder; else it is a name on the hub, and the folder is where its files were downloaded to."""
    if Path(path).is_dir():
        return Path(path)
    return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(_HUB_FILES)))


def build(
    path: str | Path,
    attention: str,
    *,
    make: Any = AutoModelForCausalLM,
    dtype: torch.dtype = torch.float32,
    fresh: tuple[str, ...] = (),
    spare: tuple[str, ...] = (),
    **settings: Any,
) -> Blueprint:
    """The model of the folder or hub name `path`, all of its parameters on the meta device.

    Args:
        attention: name of the attention implementation.
        make: the auto class that knows the architecture.
        dtype: of the parameters.
        fresh: names of the model that the files need not have: `fill` then has to be given their values.
        spare: names in the files that the model has no use for.
        settings: replace those of config.json.
    Raises ValueError if files and model do not match name by name, or the weights are quantised.
    """
    folder = model_folder(path)
    config = AutoConfig.from_pretrained(folder, **settings)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder}: its weights are quantised; the learner trains full ones: dequantise the model first"
        )
    with _parameters_on_meta():
        model: PreTrainedModel = _made(make, config, dtype, attention)
    if attention == PACKED:
        check_kind(model)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    with WeightFiles(folder) as files:
        sources = find_sources(model, files, fresh=fresh, spare=spare)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return Blueprint(model=model.eval(), folder=folder, sources=sources, shapes=shapes)


def _made(make: Any, config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    try:
        model: PreTrainedModel = make.from_config(config, dtype=dtype, attn_implementation=attention)
    except KeyError as error:
        if error.args != (attention,):
            raise
        raise ValueError(
            f"{config.model_type}: it looks its attention up in a table of its own and cannot be given another. Use another model"
        ) from error
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their memory as they are registered, before anything is written to it. Buffers stay: most are not in the
    files, and only the constructor knows them."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:  # a tied one, registered again: it stays the same object
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def fill(
    blueprint: Blueprint,
    device: torch.device,
    *,
    original: Callable[[str], str] = lambda name: name,
    fresh: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Gives every parameter of the model on the meta device its values on `device`: of a sharded one this rank's rows.

    Call it after sharding and before the first pass or optimizer. On every rank alike, but nothing is sent.

    Args:
        original: from a name now to the name as built, where something wrapped the model since.
        fresh: whole values, by names as they are now, of parameters that the files do not have as such; the same on every
            rank. Each is asked for once, so they may be made then.
    Raises ValueError if a parameter is neither in the files nor in `fresh`.
    """
    model, filled, fresh = blueprint.model, dict[int, nn.Parameter](), fresh or {}
    with WeightFiles(blueprint.folder) as files:
        reading = _Reading(blueprint, files)
        for prefix, module in list(model.named_modules()):
            for short, parameter in list(module._parameters.items()):
                if parameter is None or not parameter.is_meta:
                    continue
                name = f"{prefix}.{short}" if prefix else short
                if id(parameter) not in filled:
                    begin, end = own_rows(parameter)
                    whole = fresh.get(name)
                    if whole is None:
                        rows = reading.rows(original(name), begin, end)
                    else:
                        rows = (whole[begin:end] if whole.ndim else whole).clone()
                    filled[id(parameter)] = _with_values(parameter, rows, device)
                module.register_parameter(short, filled[id(parameter)])
        for name, buffer in model.named_buffers():
            if original(name) in blueprint.sources:
                buffer.copy_(reading.whole(original(name)))


class _Reading:
    def __init__(self, blueprint: Blueprint, files: WeightFiles) -> None:
        self._blueprint, self._files = blueprint, files

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        blueprint = self._blueprint
        source = blueprint.sources.get(name)
        if source is None:
            raise ValueError(f"{blueprint.folder} has no {name}, and no other values were given for it")
        return read_rows(
            self._files, source, name, blueprint.shapes[name], begin, end, blueprint.model.config
        )

    def whole(self, name: str) -> torch.Tensor:
        shape = self._blueprint.shapes.get(name, torch.Size())
        return self.rows(name, 0, shape[0] if shape else 1)


def own_rows(parameter: nn.Parameter) -> tuple[int, int]:
    """The rows [begin, end) of the whole parameter that this rank holds: all, or as `torch.chunk` deals them to the shards."""
    count = parameter.shape[0] if parameter.ndim else 1
    if not isinstance(parameter, DTensor):
        return 0, count
    begin, end = 0, count
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            continue
        assert placement == Shard(0) and (begin, end) == (0, count), parameter.placements
        each = -(-count // parameter.device_mesh.size(dim))
        begin = min(parameter.device_mesh.get_local_rank(dim) * each, count)
        end = min(begin + each, count)
    return begin, end


def _with_values(parameter: nn.Parameter, rows: torch.Tensor, device: torch.device) -> nn.Parameter:
    local = rows.to(device=device, dtype=parameter.dtype).contiguous()
    if not isinstance(parameter, DTensor):
        return nn.Parameter(local, requires_grad=parameter.requires_grad)
    assert local.shape == parameter.to_local().shape, (local.shape, parameter.to_local().shape)
    whole = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)
