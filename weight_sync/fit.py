"""Whether a plan's tensors are the engine's model, name by name and element by element: known before the first byte is written. Pure.

A loader takes what it is given: a fused matrix one of whose parts is missing keeps uninitialised memory there, and a tensor that is
too long is cut, both without an error. So the workers load the plan's tensors once without their bytes (`vllm_fit`), and here it is
decided what that shows. Called by `generators.vllm_weights`, once for each plan, when its first version is staged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from asyncrl.weight_sync.plan import Plan

_NAMED: Final = 3
"""How many names an error lists."""


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker's part of the model took of a plan."""

    refused: dict[str, str] = {}
    """Tensor -> what the model's loader said: it has no such parameter, or one of another shape."""
    taken: dict[str, int] = {}
    """Tensor -> elements that were copied into this worker's parameters."""
    lacking: dict[str, tuple[int, int]] = {}
    """Parameter of the engine -> (elements that nothing was copied into, elements). None that is complete."""


def misfit(plan: Plan, fits: Sequence[Fit]) -> str:
    """What keeps `plan` from being loaded, given what each of an engine's workers took of it; empty: nothing."""
    shapes = {spec.name: spec.shape for spec in plan.tensors}
    refused = {name: said for fit in fits for name, said in fit.refused.items()}
    if refused:
        return _listed("refused", {name: f"{shapes.get(name)}: {said}" for name, said in refused.items()})
    lacking = {
        name: f"{missing} of {size} elements get no bytes"
        for fit in fits
        for name, (missing, size) in fit.lacking.items()
    }
    if lacking:
        return _listed("lacking", lacking)
    cut = {}
    for spec in plan.tensors:
        size = math.prod(spec.shape)
        # A worker takes its slice of a tensor, or the whole of it where it has a copy.
        taken = sum(fit.taken.get(spec.name, 0) for fit in fits)
        if taken < size:
            cut[spec.name] = f"{spec.shape} has {size} elements, {taken} have a place"
    return _listed("too large", cut) if cut else ""


def _listed(what: str, found: dict[str, str]) -> str:
    first = "; ".join(f"{name} {text}" for name, text in sorted(found.items())[:_NAMED])
    return f"{len(found)} {what}: {first}" + ("; ..." if len(found) > _NAMED else "")
