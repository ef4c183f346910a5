"""`weight_sync.ranks.Ranks` over the learner's process group: gloo or NCCL, no pickle. Made by `step`."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist


class GroupRanks:
    """The ranks of the default process group. Each call is one or two collectives, sizes and then bytes, on `device`, and ends within the
    group's timeout."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._device = device

    def share(self, message: bytes) -> bytes:
        """See `Ranks`."""
        if self.size == 1:
            return message
        length = torch.tensor([len(message)], dtype=torch.int64, device=self._device)
        dist.broadcast(length, src=0)
        size = int(length.item())
        if size == 0:
            return b""
        body = self._tensor(message, size) if self.rank == 0 else self._empty(size)
        dist.broadcast(body, src=0)
        return bytes(body.cpu().numpy())

    def collect(self, message: bytes) -> list[bytes]:
        """See `Ranks`."""
        if self.size == 1:
            return [message]
        length = torch.tensor([len(message)], dtype=torch.int64, device=self._device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        sizes = [int(each.item()) for each in lengths]
        if not any(sizes):
            return [b""] * self.size
        bodies = [self._empty(max(sizes)) for _ in range(self.size)]
        dist.all_gather(bodies, self._tensor(message, max(sizes)))
        return [bytes(body[:size].cpu().numpy()) for body, size in zip(bodies, sizes, strict=True)]

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _tensor(self, message: bytes, size: int) -> torch.Tensor:
        """`message`, with zeros after it: [size]."""
        padded = np.frombuffer(message.ljust(size, b"\0"), dtype=np.uint8).copy()
        return torch.from_numpy(padded).to(self._device)
