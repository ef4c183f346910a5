"""The part of weight sync that runs inside a vLLM worker: reads a version into the model.

vLLM imports this module in each worker before the model is built (`worker_extension_cls`); the import registers
`OfferedWeights` as the weight transfer backend `BACKEND`, and ties the life of the worker to that of its engine.
Nothing else imports it, as it imports vLLM at once.

Invariants
----------
- The bytes were verified before the pause: a file's by the engine's own process (`asyncrl.weight_sync.mappings`), device
  memory's here (`verify_device_memory`), and once more when they are loaded. Nothing is open when `finish_weight_update` returns.
- Between `start_weight_update` and the end of `finish_weight_update` the model cannot compute: vLLM moves each layer to
  the meta device and brings it back when its last tensor came. The scheduler is paused meanwhile.
- A plan is loaded without its bytes first (`fit_of`): an update that would leave an element of a parameter without new bytes, or
  has bytes without a place, is not begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import msgspec
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from asyncrl.weight_sync.cuda_memory import device_uuid
from asyncrl.weight_sync.device_version import DeviceVersion
from asyncrl.weight_sync.errors import ChecksumError, WeightSyncError
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.version_bytes import OpenVersion, open_version, tensors_of
from asyncrl.weight_sync.vllm_adapter import replace_adapter
from asyncrl.weight_sync.vllm_fit import fit_of
from asyncrl.weight_sync.wire import Offer
from asyncrl.weight_sync.worker_owner import end_with

BACKEND = "asyncrl"
OWNER_VARIABLE = "ASYNCRL_ENGINE_OWNER"
"""Environment variable with the process id of the engine's own process, which this one must not outlive."""


class WorkerExtension:
    """What `worker_extension_cls` names: importing its module is one purpose, the methods that it adds to vLLM's worker the other."""

    def replace_model(self, offer: bytes, inode: int) -> None:
        """Called by the engine between two steps: vLLM's whole lifecycle of an update in one call, as each call of its own would
        lengthen the pause by a round trip. What it raises leaves weights that nobody can vouch for."""
        worker: Any = self
        worker.start_weight_update()
        worker.update_weights({"offer": offer, "inode": inode})
        worker.finish_weight_update()

    def replace_adapter(self, offer: bytes, inode: int) -> None:
        """Called by the engine between two steps. Raises `IncompleteWeights` and `ChecksumError` before anything changed."""
        worker: Any = self
        taken = msgspec.msgpack.decode(offer, type=Offer)
        assert taken.plan.adapter is not None
        with contextlib.closing(open_version(taken, inode, worker.device)) as version:
            # Copied: the adapter is kept, and the memory is written again two versions later.
            tensors = {name: tensor.clone() for name, tensor in tensors_of(taken, version)}
            version.verify()
        replace_adapter(worker.model_runner.lora_manager, tensors, taken.plan.adapter, taken.version)

    def verify_device_memory(self, offer: dict[str, Any]) -> list[int | str]:
        """Called by the engine, which cannot see the bytes itself, while it generates. Returns what is wrong, as vLLM would log an
        error here as one of its own: nothing; the bucket, its expected and its actual sum; or a text."""
        worker: Any = self
        try:
            with contextlib.closing(DeviceVersion(msgspec.convert(offer, Offer), worker.device)) as version:
                version.verify()
        except ChecksumError as error:
            return [error.bucket, error.expected, error.got]
        except WeightSyncError as error:
            return [str(error)]
        return []

    def fit_of(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Called by the engine between two steps: a `Fit`, as plain dicts."""
        worker: Any = self
        model, tied = worker.model_runner.model, is_tied(worker.model_config)
        found = fit_of(model, msgspec.convert(plan, Plan), lambda name: tied and "lm_head" in name.split("."))
        plain: dict[str, Any] = msgspec.to_builtins(found)
        return plain

    def gpu_uuid(self) -> str:
        """Of the GPU that this worker computes on; empty for a worker on the CPU."""
        worker: Any = self
        return device_uuid(worker.device) if worker.device.type == "cuda" else ""


@dataclasses.dataclass
class NoInit(WeightTransferInitInfo):
    """An offer says where its bytes are: no rendezvous."""


@dataclasses.dataclass
class OfferedUpdate(WeightTransferUpdateInfo):
    """`offer` is an `Offer` in MessagePack, as vLLM carries plain values alone between its processes. `inode` is that of the
    file whose bytes were verified."""

    offer: bytes
    inode: int


class OfferedWeights(WeightTransferEngine[NoInit, OfferedUpdate]):
    """vLLM's weight-transfer lifecycle over staged offers, for CPU and CUDA workers alike.

    Called by vLLM's worker, which `replace_model` calls: `start_weight_update`, `update_weights` (which calls `receive_weights`) and
    `finish_weight_update`, once each per version.
    """

    init_info_cls = NoInit
    update_info_cls = OfferedUpdate
    _version: OpenVersion | None = None
    """That which is being loaded."""

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: OfferedUpdate) -> None:
        """Load every tensor of the offer, whose plan was found to fit the model (`fit`)."""
        offer = msgspec.msgpack.decode(update_info.offer, type=Offer)
        self._version = version = open_version(offer, update_info.inode, self.device)
        load: Callable[..., object] = getattr(self.model, "load_weights")  # noqa: B009 (vLLM's models have it)
        load(tensors_of(offer, version))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        if self.device.type == "cpu" and is_tied(self.model_config):
            self._repack_heads()
        if self._version is not None:
            # After the reload's end, which reads what layers are still missing: such as those whose rows vLLM pads.
            self._version.verify()
            self._close()

    def shutdown(self) -> None:
        self._close()

    def _close(self) -> None:
        version, self._version = self._version, None
        if version is not None:
            version.close()

    def _repack_heads(self) -> None:
        # On the CPU an output head computes from a packed copy of its weight. A tied head receives no tensor of its
        # own, so vLLM leaves the copy of the version before in place.
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def is_tied(config: Any) -> bool:
    """Whether the model's output head is its embedding, by its `ModelConfig`."""
    return bool(getattr(config.hf_text_config, "tie_word_embeddings", False))


if BACKEND not in WeightTransferEngineFactory._registry:  # a forked or re-imported worker registers once
    WeightTransferEngineFactory.register_engine(BACKEND, OfferedWeights)

if OWNER_VARIABLE in os.environ:
    end_with(int(os.environ[OWNER_VARIABLE]))
