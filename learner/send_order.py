"""The order in which parameters are sent, and what engines make of them. Pure.

Inference engines keep some neighbours as one matrix: the projections of a layer's attention to queries, keys and values, and
gate and up of its MLP. Sent one after the other they need no second look at the version. Called by `sending`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from asyncrl.weight_sync.plan import FUSED_LAYERS, Fused


def arranged(names: Sequence[str]) -> tuple[list[str], list[Fused]]:
    """`names`, which are in model order, with the parts of each fused parameter one after the other, where its first one
    stood; and these parameters. Where a part is missing nothing is fused."""
    ordered: list[str] = []
    fused: list[Fused] = []
    known, placed = set(names), set[str]()
    for name in names:
        if name in placed:
            continue
        group = next(_fused_with(name, known), None)
        parts = group.parts if group else (name,)
        if group:
            fused.append(group)
        ordered += parts
        placed.update(parts)
    return ordered, fused


def _fused_with(name: str, known: Collection[str]) -> Iterator[Fused]:
    """What `name` is a part of, if all its parts are there."""
    path = name.split(".")
    for whole, modules in FUSED_LAYERS.items():
        for place in (index for index, part in enumerate(path) if part in modules):
            parts = tuple(_renamed(path, place, module) for module in modules)
            if all(part in known for part in parts):
                yield Fused(name=_renamed(path, place, whole), parts=parts)


def _renamed(path: Sequence[str], place: int, module: str) -> str:
    return ".".join(module if index == place else part for index, part in enumerate(path))
