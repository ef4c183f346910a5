"""One rank's part of a checkpoint on the disk: a safetensors file whose header says where each shard lies in its tensor.

The header's `DCP_SHARDING_INFO` is what `torch.distributed.checkpoint.HuggingFaceStorageReader` looks for; it puts the shards
of all ranks together again. Nothing is copied on the way to the file, and its checksum is made of the same bytes as they go.
Called by `checkpoint`, in a thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from asyncrl.learner.checkpoint_folder import FileEntry

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
_BLOCK_BYTES = 1 << 23
"""Between two blocks another thread may run Python code."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of a tensor, or all of it."""

    name: str
    offsets: tuple[int, ...]
    """Of the part's first element, in each dimension of the tensor."""
    data: torch.Tensor
    """The part itself."""


def write_shards(path: Path, shards: Sequence[Shard]) -> FileEntry:
    """Writes the file to the disk. The shards are on the host, contiguous, of names that differ. Raises OSError."""
    # Large elements first: so each begins at a multiple of its size, as readers that map the file want it.
    ordered = sorted(shards, key=lambda shard: -shard.data.element_size())
    hashed, size = xxhash.xxh3_128(), 0
    with path.open("xb", buffering=0) as file:
        for block in _blocks(ordered):
            hashed.update(block)
            size += len(block)
            rest = memoryview(block)
            # Ends with the block: each write takes some of it, or raises.
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return FileEntry(name=path.name, bytes=size, xxh3=hashed.hexdigest())


def _blocks(shards: Sequence[Shard]) -> Iterator[bytes | memoryview]:
    yield _header(shards)
    for shard in shards:
        raw = shard.data.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(raw), _BLOCK_BYTES):
            yield raw[start : start + _BLOCK_BYTES]


def _header(shards: Sequence[Shard]) -> bytes:
    entries: dict[str, object] = {}
    end = 0
    for shard in shards:
        start, end = end, end + shard.data.numel() * shard.data.element_size()
        dtype = _DTYPES[shard.data.dtype]
        entries[shard.name] = {"dtype": dtype, "shape": list(shard.data.shape), "data_offsets": [start, end]}
    offsets = {shard.name: {"saved_offsets": list(shard.offsets)} for shard in shards}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
