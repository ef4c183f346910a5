"""The part of weight sync that runs inside a vLLM worker: reads a version from shared memory into the model.

vLLM imports this module in each worker before the model is built (`worker_extension_cls`); the import registers
`SharedMemoryWeights` as the weight transfer backend `BACKEND`, and ties the life of the worker to that of its engine.
Nothing else imports it, as it imports vLLM at once.

Invariants
----------
- The bytes were verified by the engine's own process (`asyncrl.weight_sync.shm.map_version`) before the pause; here
  they are only read, and the mapping is gone before `finish_weight_update` returns.
- Between `start_weight_update` and the end of `finish_weight_update` the model cannot compute: vLLM moves each layer to
  the meta device and brings it back when its last tensor came. The scheduler is paused meanwhile.
- An update that leaves a parameter without new bytes raises and names it; the engine is unusable then.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from asyncrl.weight_sync.errors import IncompleteWeights, WeightSyncError
from asyncrl.weight_sync.plan import Bucket
from asyncrl.weight_sync.vllm_adapter import replace_adapter
from asyncrl.weight_sync.wire import Offer

BACKEND = "asyncrl"
OWNER_VARIABLE = "ASYNCRL_ENGINE_OWNER"
"""Environment variable with the process id of the engine's own process, which this one must not outlive."""


class WorkerExtension:
    """What `worker_extension_cls` names: importing its module is one purpose, the method that it adds to vLLM's worker the other."""

    def replace_adapter(self, offer: dict[str, Any], inode: int) -> None:
        """Called by the engine between two steps. Raises `IncompleteWeights` before anything changed."""
        worker: Any = self
        taken = msgspec.convert(offer, Offer)
        assert taken.plan.adapter is not None
        # Copied: the adapter is kept, and the file is written again two versions later.
        tensors = {name: tensor.clone() for bucket in _mapped(taken, inode) for name, tensor in bucket}
        replace_adapter(worker.model_runner.lora_manager, tensors, taken.plan.adapter, taken.version)


def _end_with(owner: int) -> None:
    """Kill this engine's processes when the process `owner` ends: its own kill leaves it no time to end them, and vLLM's
    engine core would wait for requests for ever.

    Waits, in a thread of its own, for the end of `owner`; unblocked by the kernel; ends with this process.
    """
    descriptor = os.pidfd_open(owner)

    def wait() -> None:
        select.select([descriptor], [], [])
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None and parent.pid != owner:
            os.kill(parent.pid, signal.SIGKILL)  # one of several workers: the parent is the engine core
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="asyncrl-owner", daemon=True).start()


@dataclasses.dataclass
class NoInit(WeightTransferInitInfo):
    """Shared memory needs no rendezvous."""


@dataclasses.dataclass
class OfferedUpdate(WeightTransferUpdateInfo):
    """`offer` is an `Offer` as plain dicts and lists: vLLM carries nothing else between its processes. `inode` is that
    of the file whose bytes were verified."""

    offer: dict[str, Any]
    inode: int


class SharedMemoryWeights(WeightTransferEngine[NoInit, OfferedUpdate]):
    """vLLM's weight-transfer lifecycle over the `shm` transport, for CPU and CUDA workers alike.

    Called by vLLM's worker: `start_weight_update`, `update_weights` (which calls `receive_weights`) and
    `finish_weight_update`, once each per version.
    """

    init_info_cls = NoInit
    update_info_cls = OfferedUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: OfferedUpdate) -> None:
        """Load every tensor of the offer. Raises `IncompleteWeights` if the model has parameters that it lacks."""
        offer = msgspec.convert(update_info.offer, Offer)
        expected = {name for name, _ in self.model.named_parameters()}
        load: Callable[..., set[str] | None] = getattr(self.model, "load_weights")  # noqa: B009 (vLLM's models have it)
        loaded: set[str] = set()
        for bucket in _mapped(offer, update_info.inode):
            loaded |= load(bucket) or set()
        missing = sorted(name for name in expected - loaded if not self._is_tied(name))
        if missing:
            raise IncompleteWeights(
                f"version {offer.version}: the offer has no bytes for {len(missing)} of {len(expected)} parameters of "
                f"{self.model_config.model}, first {missing[:3]}. Learner and engine must run one architecture."
            )

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        if self.device.type == "cpu" and self._tied():
            self._repack_heads()

    def shutdown(self) -> None:
        """Holds nothing between updates."""

    def _tied(self) -> bool:
        return bool(getattr(self.model_config.hf_text_config, "tie_word_embeddings", False))

    def _is_tied(self, name: str) -> bool:
        return self._tied() and "lm_head" in name.split(".")

    def _repack_heads(self) -> None:
        # On the CPU an output head computes from a packed copy of its weight. A tied head receives no tensor of its
        # own, so vLLM leaves the copy of the version before in place.
        for module in self.model.modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _mapped(offer: Offer, inode: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """(name, view) of each tensor, bucket by bucket, in the bytes that were verified. Raises `WeightSyncError` if the file is
    another one by now."""
    # MAP_PRIVATE and never written to: the pages stay those of the shared file, without a copy.
    data = torch.from_file(offer.location, shared=False, size=offer.plan.total_bytes, dtype=torch.uint8)
    # Of the name that was just mapped: a file that replaces it later does not touch these pages.
    if os.stat(offer.location).st_ino != inode:
        raise WeightSyncError(f"version {offer.version}: {offer.location} is not the file that was verified")
    for bucket in offer.plan.buckets:
        yield _tensors(data, bucket)


def _tensors(data: torch.Tensor, bucket: Bucket) -> list[tuple[str, torch.Tensor]]:
    """(checkpoint name, view) of each tensor of `bucket` within the version's bytes `data` [total_bytes]."""
    return [
        (
            spec.name,
            data[spec.offset : spec.offset + spec.size].view(getattr(torch, spec.dtype)).view(spec.shape),
        )
        for spec in bucket.tensors
    ]


if BACKEND not in WeightTransferEngineFactory._registry:  # a forked or re-imported worker registers once
    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeights)

if OWNER_VARIABLE in os.environ:
    _end_with(int(os.environ[OWNER_VARIABLE]))
