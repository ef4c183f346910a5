"""What a model folder says of itself, read from its JSON and safetensors headers: no torch, no weights loaded.

Called by the preflight and by the table of sizes.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import msgspec

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


class ModelFolderError(ValueError):
    """The folder is not a model that can be run; the message says what is missing."""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    parameters: int
    stored_bytes: int
    max_position_embeddings: int | None
    architecture: str


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
        parameters=sum(count for _, count in tensors),
        stored_bytes=sum(_BYTES.get(dtype, 4) * count for dtype, count in tensors),
        max_position_embeddings=config.get("max_position_embeddings"),
        architecture=architectures[0],
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelFolderError(
            f"{path.parent} is no model folder: {path.name} cannot be read ({error.strerror})"
        ) from error
    except msgspec.DecodeError as error:
        raise ModelFolderError(f"{path}: {error}") from error


def _header(shard: Path) -> list[tuple[str, int]]:
    """(dtype, elements) of each tensor: the file starts with the header's length, 8 bytes little-endian, then JSON."""
    with shard.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= size <= shard.stat().st_size - 8:
            raise ModelFolderError(f"{shard} is cut short or no safetensors file: copy it again")
        try:
            header = msgspec.json.decode(file.read(size), type=dict[str, dict[str, Any]])
        except msgspec.DecodeError as error:
            raise ModelFolderError(f"{shard} has a broken header: {error}") from error
    return [(t["dtype"], math.prod(t["shape"])) for name, t in header.items() if name != "__metadata__"]
