"""The safetensors files of a model's folder, and reading any rows of a parameter out of them.

A parameter may stand there as it is, or in pieces that a converter of transformers puts together: the experts of a layer, which
the model keeps as one parameter. Invariant: what is read is the rows that were asked for, of experts likewise.
Called by `weight_names`, `loading` and `lora`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_COMPARED_ROWS = 4096


@dataclass(slots=True)
class Source:
    """What one tensor of the model is made of."""

    keys: list[tuple[str, str]] = field(default_factory=list)
    """(the converter's pattern that matched, name in the files), experts in order; one without a converter."""
    converter: WeightConverter | None = None

    @property
    def by_row(self) -> bool:
        """Each tensor in the files is one row of the model's (an expert), and nothing later mixes rows."""
        if self.converter is None:
            return False
        first, *rest = self.converter.operations
        if not isinstance(first, MergeModulelist) or first.dim != 0:
            return False
        return all(
            (isinstance(each, Concatenate) and each.dim > 0)
            or (isinstance(each, Transpose) and min(each.dim0, each.dim1) > 0)
            for each in rest
        )


class WeightFiles:
    """The open files of one folder. A context manager; reading needs it open."""

    def __init__(self, folder: Path) -> None:
        """Opens the headers. Raises ValueError if there are no safetensors files, or not those that the index names."""
        self.folder = folder
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        try:
            for name in _files(folder):
                # Not mapped: mapped pages would count as this process's memory for as long as the file is open.
                handle = self._stack.enter_context(
                    safe_open(str(folder / name), framework="pt", device="cpu", backend="pread")
                )
                self._file_of.update(dict.fromkeys(handle.keys(), handle))
        except (SafetensorError, OSError) as error:
            self._stack.close()
            raise ValueError(
                f"{folder}: the weights cannot be read ({error}); copy the folder again"
            ) from error

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> Collection[str]:
        return self._file_of.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file_of[key].get_slice(key).get_shape())

    def rows(self, key: str, begin: int, end: int) -> torch.Tensor:
        """[end - begin, ...], fewer where it ends before, in the file's type; of a tensor without dimensions, itself."""
        shape = self.shape(key)
        if not shape:
            tensor: torch.Tensor = self._file_of[key].get_tensor(key)
            return tensor
        end = min(end, shape[0])
        if begin >= end:
            return torch.empty((0, *shape[1:]))
        piece: torch.Tensor = self._file_of[key].get_slice(key)[begin:end]
        return piece

    def same(self, one: str, other: str) -> bool:
        if self.shape(one) != self.shape(other):
            return False
        steps = range(0, (self.shape(one) or (1,))[0], _COMPARED_ROWS)
        return all(
            torch.equal(self.rows(one, at, at + _COMPARED_ROWS), self.rows(other, at, at + _COMPARED_ROWS))
            for at in steps
        )


def _files(folder: Path) -> list[str]:
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    if not (folder / _INDEX).is_file():
        raise ValueError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}: convert the weights with save_pretrained of transformers"
        )
    index = msgspec.json.decode((folder / _INDEX).read_bytes(), type=dict[str, Any])
    names = sorted(set(index["weight_map"].values()))
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        raise ValueError(f"{folder}: {_INDEX} names {lacking[0]}, which is not there; copy the folder again")
    return names


def read_rows(
    files: WeightFiles, source: Source, name: str, shape: torch.Size, begin: int, end: int, config: Any
) -> torch.Tensor:
    """Rows [begin, end) of the model's tensor `name`, in the files' type. Memory: those rows, and where a converter mixes rows,
    the whole tensor for the moment."""
    if source.converter is None:
        return files.rows(source.keys[0][1], begin, end)
    converter = copy.deepcopy(source.converter)
    place: dict[str, int] = {}
    for pattern, key in source.keys:
        row = place.get(pattern, 0)
        place[pattern] = row + 1
        if not source.by_row or begin <= row < end:
            tensor = files.rows(key, 0, (files.shape(key) or (1,))[0])
            converter.add_tensor(name, key, pattern, lambda tensor=tensor: tensor)  # type: ignore[arg-type]
    if source.by_row and begin >= end:
        return torch.empty((0, *shape[1:]))
    made = converter.convert(name, config=config)[name]
    whole: torch.Tensor = made[0] if isinstance(made, list) else made
    wanted = (end - begin if source.by_row else shape[0], *shape[1:])
    if tuple(whole.shape) != wanted:
        raise ValueError(f"{files.folder}: {name} comes out as {tuple(whole.shape)}, expected {wanted}")
    return whole if source.by_row else whole[begin:end].clone()
