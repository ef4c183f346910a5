"""Inside a vLLM worker: loads a plan's names and shapes into the model without their bytes, to see whether they fit.

The model's own loaders run, on tensors that have a shape and no memory; what they would copy is counted. Afterwards every parameter
is the one that it was before.

Invariants: called between two steps; nothing is written to a parameter; a model that is not put back raises.
Called by `vllm_worker`; imports vLLM at once.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import (
    get_layer_params_buffers,
    get_layer_tensors,
    get_tensor_load_numel,
)

from asyncrl.weight_sync.fit import Fit
from asyncrl.weight_sync.plan import Plan, TensorSpec

REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, ValueError)
"""With what loaders meet names that they do not know, and other shapes."""
Load = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]


def fit_of(model: nn.Module, plan: Plan, tied: Callable[[str], bool]) -> Fit:
    """What `model` takes of `plan`. `tied`: says of a parameter's name that it is another one's, which nothing is loaded into."""
    load: Load = getattr(model, "load_weights")  # noqa: B009 (vLLM's models have it)
    with _without_memory(model), torch.no_grad():
        parameters = {
            name: tensor
            for name, tensor in model.named_parameters()
            if not tied(name) and not _is_made_by_attention(model, name)
        }
        counter = _Counter(model)
        with counter:
            try:
                load(counter.offered(plan.tensors))
            except REFUSALS as error:
                refused = _refused(load, counter, plan) or {counter.present: _said(error)}
                return Fit(refused=refused)
        lacking = {}
        for name, tensor in parameters.items():
            size = get_tensor_load_numel(tensor)
            missing = size - counter.filled[_memory(tensor)]
            if missing > 0:
                lacking[name] = (missing, size)
    return Fit(taken=dict(counter.taken), lacking=lacking)


def _refused(load: Load, counter: _Counter, plan: Plan) -> dict[str, str]:
    """Each tensor by itself: which ones the model does not take, and why."""
    found = {}
    for spec in plan.tensors:
        try:
            load(counter.offered([spec]))
        except REFUSALS as error:
            found[spec.name] = _said(error)
    return found


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is copied into the model's tensors, and copies nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.filled: Counter[int] = Counter()
        """Memory of a parameter -> its elements that were written."""
        self.taken: Counter[str] = Counter()
        """Offered tensor -> its elements that were copied."""
        self.present = ""
        """The tensor that was offered last."""
        self._owned = {_memory(tensor) for tensor in [*model.parameters(), *model.buffers()]}
        self._names: dict[int, str] = {}
        self._offered: list[torch.Tensor] = []

    def offered(self, specs: Iterable[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor without memory) for the model's loader."""
        for spec in specs:
            tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
            self._offered.append(tensor)  # kept, so that no other one comes to have its place
            self._names[_memory(tensor)] = self.present = spec.name
            yield spec.name, tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if args else None
        in_place = func._schema.is_mutable and func._schema.name.endswith("_")
        if not in_place or not isinstance(target, torch.Tensor) or _memory(target) not in self._owned:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            source = args[1]
            if source.numel() != target.numel():
                raise ValueError(f"shape {tuple(source.shape)} does not fit {tuple(target.shape)}")
            # One that was cast or laid out anew on the way is a tensor of its own: it was made of the one offered last.
            self.taken[self._names.get(_memory(source), self.present)] += source.numel()
        self.filled[_memory(target)] += target.numel()
        return target


@contextlib.contextmanager
def _without_memory(model: nn.Module) -> Iterator[None]:
    """Within it the model has the parameters that its loaders know, not those that it computes with, which may be packed."""
    layers = list(model.modules())
    taken: list[nn.Module] = []
    try:
        for layer in layers:
            info = get_layerwise_info(layer)
            info.kernel_tensors = get_layer_params_buffers(layer)
            info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
            taken.append(layer)
            restore_layer_on_meta(layer, info)
            for tensor in get_layer_tensors(layer).values():
                # A reload leaves its own loader on them, which waits for bytes.
                if hasattr(tensor, "weight_loader"):
                    tensor.weight_loader = _get_original_loader(tensor)
        yield
    finally:
        for layer in taken:
            info = get_layerwise_info(layer)
            _place_kernel_tensors(layer, info)
            info.reset()  # type: ignore[no-untyped-call]


def _is_made_by_attention(model: nn.Module, name: str) -> bool:
    """Scales of a KV cache, which have values of their own where a checkpoint has none."""
    return bool(is_deferred_attention_layer(model.get_submodule(name.rpartition(".")[0])))


def _memory(tensor: torch.Tensor) -> int:
    """The same for all views of one memory, also where there is none behind it."""
    return int(tensor.untyped_storage()._cdata)
