"""A staged version's bytes in a vLLM worker, wherever they lie: opened, read as tensors, verified once more, closed.

                 SharedFile ---> FileVersion: mapped from the file that the engine's own process verified
    open_version DeviceMemory -> device_version.DeviceVersion: opened on the worker's own GPU
Invariants: tensors are views, valid until `close`; after `verify` has returned they were what the learner wrote, all the time
since `open_version`. Called by `vllm_worker`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

import torch

from asyncrl.weight_sync.device_version import DeviceVersion
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.mappings import Mappings
from asyncrl.weight_sync.pieces import whole
from asyncrl.weight_sync.wire import DeviceMemory, Offer


class OpenVersion(Protocol):
    """Bytes that may be read until `close`."""

    data: torch.Tensor

    def verify(self) -> None:
        """Raises `ChecksumError` if they changed since."""

    def close(self) -> None:
        """May be called twice."""


_FILES: Final = Mappings(private=True)
"""Of this worker. Private, as torch wants a buffer that can be written; nothing writes it, so that the pages stay the file's."""


class FileVersion:
    """Of a file. Nobody writes it while it is mapped: see `slots`."""

    def __init__(self, offer: Offer, inode: int) -> None:
        """`inode`: of the file that was verified. Raises `WeightSyncError` if the name leads to another one by now."""
        mapped = _FILES.of(offer)
        if mapped.inode != inode:
            raise WeightSyncError(
                f"version {offer.version}: {offer.source} is not the file that was verified"
            )
        self.data = torch.frombuffer(mapped.data, dtype=torch.uint8)

    def verify(self) -> None:
        """It was, and these are the same pages."""

    def close(self) -> None:
        """The mapping is kept for the next version in this file."""
        self.data = torch.empty(0, dtype=torch.uint8)


def open_version(offer: Offer, inode: int, device: torch.device) -> OpenVersion:
    """`inode` is that of the verified file, for an offer of one; `device` is the worker's. Raises `WeightSyncError`."""
    if isinstance(offer.source, DeviceMemory):
        return DeviceVersion(offer, device)
    return FileVersion(offer, inode)


def tensors_of(offer: Offer, version: OpenVersion) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, view) of each tensor."""
    for spec in offer.plan.tensors:
        yield spec.name, whole(version.data, spec)
