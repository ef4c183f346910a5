"""What of a learner's state goes into a checkpoint, by name, and back: each rank its own shards.

    policy/weight/model.norm.weight              the master
    policy/exp_avg/model.norm.weight             an optimizer state of it, under the optimizer's own name
    random/0/cpu                                 the generator of rank 0

Invariants: a replica's shards are taken from the first replica alone, and what every rank has whole from rank 0; so each
element is there once. Loading reads what a rank needs of any division into any other. Called by `checkpoint` and `export`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_save_plan
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from asyncrl.learner.checkpoint_folder import BrokenCheckpoint
from asyncrl.learner.shard_file import Shard
from asyncrl.learner.trained import Trained

WEIGHT = "weight"
_RANDOM = "random"

Sizes = Mapping[str, tuple[torch.Size, torch.dtype]]
"""What a checkpoint has: whole shapes and dtypes by name."""


def own_shards(trained: Mapping[str, Trained], rank: int) -> list[Shard]:
    """What this rank is to write; its data is that of the learner itself, not a copy."""
    state = {
        name: tensor
        for name, tensor in _tensors(trained)
        if (_is_first_replica(tensor) if isinstance(tensor, DTensor) else rank == 0)
    }
    state.update(_random_states(rank))
    shards = []
    for item in create_default_local_save_plan(state, is_coordinator=rank == 0).items:
        tensor, offsets = state[item.index.fqn], item.index.offset
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        shards.append(Shard(item.index.fqn, tuple(offsets or ()), local.detach()))
    return shards


def _sizes_in(folder: Path) -> Sizes:
    """Reads the headers of all files."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (torch.Size(each.size), each.properties.dtype) for name, each in found.items()}  # type: ignore[union-attr]


def load_trained(folder: Path, trained: Mapping[str, Trained], rank: int) -> None:
    """Puts weights, optimizer states and this rank's generators back, in place.

    A rank that there was not when the checkpoint was written keeps its generators. Raises `BrokenCheckpoint` if the checkpoint
    does not have just what is trained here; nothing was changed then.
    """
    sizes = _sizes_in(folder)
    state, moments = {}, {}
    for name, one in trained.items():
        _check_weights(folder, sizes, name, one.parameters)
        state.update(_weights(name, one.parameters))
        moments[name] = _room_for_moments(sizes, name, one.parameters)
        state.update({f"{name}/{key}/{of}": t for of, own in moments[name].items() for key, t in own.items()})
    generators = {name: tensor for name, tensor in _random_states(rank).items() if name in sizes}
    _read(folder, {**state, **generators})
    for name, one in trained.items():
        one.optimizer.state.clear()
        one.optimizer.state.update({one.parameters[of]: own for of, own in moments[name].items()})
    _set_random_states(generators)


def load_weights(folder: Path, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Puts the weights of `name` alone back, in place. Raises `BrokenCheckpoint` as `load_trained` does."""
    _check_weights(folder, _sizes_in(folder), name, parameters)
    _read(folder, _weights(name, parameters))


def _check_weights(folder: Path, sizes: Sizes, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    prefix = f"{name}/{WEIGHT}/"
    found = {key.removeprefix(prefix): size for key, (size, _) in sizes.items() if key.startswith(prefix)}
    if found.keys() != parameters.keys():
        only = sorted(found.keys() ^ parameters.keys())
        raise BrokenCheckpoint(
            f"checkpoint {folder} has {len(found)} weights of the {name}, the recipe's has {len(parameters)}; only one of them "
            f"has {', '.join(only[:5])}{' and more' if len(only) > 5 else ''}. Use the recipe that it was written with"
        )
    for of, parameter in parameters.items():
        if found[of] != parameter.shape:
            raise BrokenCheckpoint(
                f"checkpoint {folder}: {name} {of} has shape {tuple(found[of])}, the recipe's model has "
                f"{tuple(parameter.shape)}. Use the model that it was written with"
            )


def _read(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Fills the tensors, or this rank's shards of them, in place."""
    reader = HuggingFaceStorageReader(str(folder))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        # The ranks need not talk for it: each one reads the files' headers. Where they do talk, they pickle.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, storage_reader=reader, planner=planner, no_dist=True)


def _tensors(trained: Mapping[str, Trained]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, one in trained.items():
        yield from _weights(name, one.parameters).items()
        for of, parameter in one.parameters.items():
            for key, value in one.optimizer.state.get(parameter, {}).items():
                yield f"{name}/{key}/{of}", value


def _weights(name: str, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {f"{name}/{WEIGHT}/{of}": parameter.detach() for of, parameter in parameters.items()}


def _room_for_moments(
    sizes: Sizes, name: str, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, torch.Tensor]]:
    """For the optimizer states that the checkpoint has, by parameter: sharded as that, or a number beside it."""
    room: dict[str, dict[str, torch.Tensor]] = {}
    for key, (size, dtype) in sizes.items():
        first, _, rest = key.partition("/")
        what, _, of = rest.partition("/")
        if first != name or what == WEIGHT or of not in parameters:
            continue
        like = parameters[of].detach()
        if size == like.shape:
            made = torch.zeros_like(like, dtype=dtype)
        else:
            local = like.to_local() if isinstance(like, DTensor) else like
            made = torch.zeros(size, dtype=dtype, device=local.device)
        room.setdefault(of, {})[what] = made
    return room


def _is_first_replica(tensor: DTensor) -> bool:
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    return not any(
        placement.is_replicate() and place
        for placement, place in zip(tensor.placements, coordinate, strict=True)
    )


def _random_states(rank: int) -> dict[str, torch.Tensor]:
    states = {f"{_RANDOM}/{rank}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states[f"{_RANDOM}/{rank}/cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: Mapping[str, torch.Tensor]) -> None:
    for name, state in states.items():
        if name.endswith("/cuda"):
            torch.cuda.set_rng_state(state)
        else:
            torch.set_rng_state(state)
