"""The process group of the learner's ranks, and how one batch reaches all of them.

Invariants: every wait on a collective ends after the group's timeout; nothing is pickled; one rank needs no socket.
Called by `model` (device mesh), `step` (one process per rank) and `sft` (one rank, in process).
"""

from __future__ import annotations

import datetime
import logging
import os
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

logger = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]
_LOOPBACK = ("127.0.0.1", "localhost")


def init_distributed(
    rank: int,
    ranks: int,
    address: str,
    device: Device,
    timeout_s: float,
    *,
    start_timeout_s: float | None = None,
    replicas: int = 1,
    on_host: bool = False,
) -> DeviceMesh:
    """Joins the process group of the learner (gloo on CPU, NCCL on CUDA) and returns its mesh of shape [ranks], or with several
    replicas [replicas, shards]: consecutive ranks are the shards of one replica.

    `on_host`: tensors in host memory are reduced as well (NCCL knows none). `address` is `host:port`, where rank 0 listens; with one rank it is not used and no socket is opened. Each collective
    may take `timeout_s`, the meeting of the ranks `start_timeout_s` (default: the same). Raises what torch raises
    (`DistNetworkError`, `DistStoreError`) if the ranks do not meet in time.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"learner rank must be within 0..{ranks - 1}, got {rank}")
    if ranks % replicas:
        raise ValueError(f"learner.sharding.replicas = {replicas} must divide the learner's {ranks} ranks")
    if dist.is_initialized():
        raise RuntimeError(
            "this process already is in a process group: close the learner that opened it first, or use a process of its own"
        )
    store = _meet(rank, ranks, address, start_timeout_s or timeout_s)
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        backend=_backend(device, on_host=on_host),
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    logger.info("learner rank=%d ranks=%d device=%s joined", rank, ranks, device)
    if replicas == 1:
        return init_device_mesh(device, (ranks,))
    return init_device_mesh(device, (replicas, ranks // replicas), mesh_dim_names=("replica", "shard"))


def _backend(device: Device, *, on_host: bool) -> str:
    if device == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if on_host else "nccl"


def _meet(rank: int, ranks: int, address: str, timeout_s: float) -> Store:
    if ranks == 1:
        return HashStore()
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        raise ValueError(f"learner address must be host:port, got {address!r}")
    if host in _LOOPBACK:
        # gloo listens on the interface of the host's name unless told; ranks that meet on loopback stay there.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return TCPStore(
        host, int(port), ranks, is_master=rank == 0, timeout=datetime.timedelta(seconds=timeout_s)
    )


def this_device(device: str) -> torch.device:
    """The device of this rank, after `init_distributed`. `device`: cpu or cuda, as a mesh names its type."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def leave_distributed() -> None:
    """Leaves the process group, so that this process may join another."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_table(
    table: pa.Table | None, version: int, rank: int, device: torch.device
) -> tuple[pa.Table, int]:
    """Rank 0's table and version, on every rank. A collective of two broadcasts: header, then Arrow IPC bytes.

    Rank 0 gives the table, the others None. Raises ValueError if it is the other way round.
    """
    if (rank == 0) != (table is not None):
        raise ValueError(f"the batch is given on rank 0 and on no other, got {type(table)} on rank {rank}")
    if dist.get_world_size() == 1 and table is not None:
        return table, version
    body = _pack(table) if table is not None else None
    header = torch.tensor([0 if body is None else len(body), version], dtype=torch.int64, device=device)
    dist.broadcast(header, src=0)
    size, version = (int(value) for value in header.tolist())
    if body is None:
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
    else:
        buffer = torch.from_numpy(np.frombuffer(body, dtype=np.uint8).copy()).to(device)
    dist.broadcast(buffer, src=0)
    if table is None:
        table = pa.ipc.open_stream(pa.py_buffer(buffer.cpu().numpy())).read_all()
    return table, version


def _pack(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
