"""What a model folder says of itself, read from its JSON and safetensors headers: no torch, no weights loaded.

Called by the preflight and by the table of sizes.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.recipes.plan_lora import LinearLayers

_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
}


_USUAL_LABELS = 2
"""Of a classifier whose config.json does not say; one with a single label says so."""


class ModelFolderError(ValueError):
    """The folder is not a model that can be run; the message says what is missing."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    parameters: int
    stored_bytes: int
    max_position_embeddings: int | None
    architecture: str
    linears: dict[str, LinearLayers] = {}
    """By last name; see `_linears`."""


def inspect_model(folder: Path) -> ModelFacts:
    """Raises ModelFolderError."""
    config = _json(folder / "config.json")
    architectures = config.get("architectures") or []
    if not architectures:
        raise ModelFolderError(
            f"{folder}/config.json names no architecture: save the model with save_pretrained"
        )
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelFolderError(f"{folder} has no .safetensors file: convert the weights with save_pretrained")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelFolderError(f"{folder} has no tokenizer (tokenizer.json): save it beside the model")
    tensors = [t for shard in shards for t in _header(shard)]
    return ModelFacts(
        parameters=sum(math.prod(shape) for _, _, shape in tensors),
        stored_bytes=sum(_BYTES.get(dtype, 4) * math.prod(shape) for _, dtype, shape in tensors),
        max_position_embeddings=config.get("max_position_embeddings"),
        architecture=architectures[0],
        linears=_linears(tensors),
    )


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Of every tensor, by its name in the files. Raises ModelFolderError."""
    return {
        name: shape for shard in sorted(folder.glob("*.safetensors")) for name, _, shape in _header(shard)
    }


def _linears(tensors: list[tuple[str, str, list[int]]]) -> dict[str, LinearLayers]:
    """The matrices within numbered layers, each expert's left out: many architectures have them as one fused parameter."""
    found: dict[str, LinearLayers] = {}
    for name, _, shape in tensors:
        *path, layer, last = ("", "", *name.split("."))
        inside = any(part.isdigit() for part in path) and "experts" not in path
        if len(shape) == 2 and last == "weight" and inside:
            found[layer] = found.get(layer, LinearLayers()).with_another(shape[1], shape[0])
    return found


def inspect_reward_model(folder: Path, *, chat_template: bool) -> ModelFacts:
    """As `inspect_model`, of a sequence classifier with one label. Raises ModelFolderError."""
    model, config = inspect_model(folder), _json(folder / "config.json")
    if not model.architecture.endswith("ForSequenceClassification"):
        raise ModelFolderError(
            f"{folder} is a {model.architecture}, and a reward model is a ...ForSequenceClassification: one that is not gives no "
            "number for an answer"
        )
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", _USUAL_LABELS)
    if labels != 1:
        raise ModelFolderError(
            f"{folder} has {labels} labels, and a reward is one number: name a model with num_labels = 1"
        )
    if chat_template and not _has_chat_template(folder):
        raise ModelFolderError(
            f"{folder} has no chat template, and serving.chat_template is true: set it to false"
        )
    return model


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(_json(path).get("chat_template"))


def _json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelFolderError(
            f"{path.parent} is no model folder: {path.name} cannot be read ({error.strerror})"
        ) from error
    except msgspec.DecodeError as error:
        raise ModelFolderError(f"{path}: {error}") from error


def _header(shard: Path) -> list[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of each tensor: the file starts with the header's length, 8 bytes little-endian, then JSON."""
    with shard.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= size <= shard.stat().st_size - 8:
            raise ModelFolderError(f"{shard} is cut short or no safetensors file: copy it again")
        try:
            header = msgspec.json.decode(file.read(size), type=dict[str, dict[str, Any]])
        except msgspec.DecodeError as error:
            raise ModelFolderError(f"{shard} has a broken header: {error}") from error
    return [(name, t["dtype"], t["shape"]) for name, t in header.items() if name != "__metadata__"]
