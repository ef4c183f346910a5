"""Processes of their own that tests of device memory and of groups talk to: one reads versions, one writes them, one is in a group.

On `cuda` they use a GPU's memory, on `cpu` the host's in its place (`host_memory`) and gloo for NCCL. Each ends when its
connection does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from host_memory import HostMemory, open_host_memory

from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.cuda_memory import Allocation
from asyncrl.weight_sync.device_memory import DeviceSlots
from asyncrl.weight_sync.device_version import DeviceVersion, open_memory
from asyncrl.weight_sync.errors import GroupBroken, WeightSyncError
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.process_group import PeerGroup, connect_store, wait_for
from asyncrl.weight_sync.version_bytes import tensors_of
from asyncrl.weight_sync.wire import Offer

ANSWER_S = 120.0
Weights = dict[str, torch.Tensor]


class Peer:
    """A process that runs `work(connection, *arguments)`, and this end of the connection."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, message: object) -> None:
        self.connection.send(message)

    def answer(self, timeout_s: float = ANSWER_S) -> Any:
        """The next one. Raises AssertionError if none comes, EOFError if the process has ended."""
        assert self.connection.poll(timeout_s), f"{self.process.name} did not answer within {timeout_s:g} s"
        return self.connection.recv()

    def ask(self, message: object) -> Any:
        self.send(message)
        return self.answer()

    def end(self) -> None:
        self.connection.close()
        self.process.join(timeout=20)
        self.process.kill()
        self.process.join(timeout=20)


@contextlib.contextmanager
def peer(work: Callable[..., None], *arguments: Any) -> Iterator[Peer]:
    made = Peer(work, *arguments)
    try:
        yield made
    finally:
        made.end()


def make_slots(plan: Plan, device: torch.device, count: int = 2) -> DeviceSlots:
    if device.type == "cpu":
        return DeviceSlots(plan, HostMemory, count)
    return DeviceSlots(plan, lambda size: Allocation(size, device), count)


def write(slots: DeviceSlots, plan: Plan, version: int, weights: Weights) -> Offer:
    slot = slots.next()
    sums = tuple(slot.fill(bucket, cut(plan, bucket, weights)) for bucket in plan.buckets)
    slots.committed()
    return Offer(version=version, source=slot.source(sums), plan=plan, checksums=())


def read_versions(connection: Connection, device_name: str) -> None:
    """Each offer is opened, verified, held until the next message comes, read, verified again and closed."""
    device = torch.device(device_name)
    opener = open_host_memory if device.type == "cpu" else open_memory
    with contextlib.suppress(EOFError):
        while True:
            offer: Offer = connection.recv()
            try:
                with contextlib.closing(DeviceVersion(offer, device, opener)) as version:
                    version.verify()
                    connection.send("verified")
                    connection.recv()
                    found = {name: tensor.cpu().clone() for name, tensor in tensors_of(offer, version)}
                    version.verify()
                connection.send({name: tensor.view(torch.uint8).numpy() for name, tensor in found.items()})
            except WeightSyncError as error:
                connection.send(f"{type(error).__name__}: {error}")


def write_versions(connection: Connection, device_name: str, plan: Plan, weights: Weights) -> None:
    """One version; its memory lives as long as the process."""
    slots = make_slots(plan, torch.device(device_name), 1)
    connection.send(write(slots, plan, 1, weights))
    with contextlib.suppress(EOFError):
        connection.recv()
    slots.close()


def take_part(
    connection: Connection,
    device_name: str,
    environment: dict[str, str],
    address: str,
    rank: int,
    size: int,
    timeout_s: float,
) -> None:
    """A rank of one group after the other. Answers each name of a group when it has joined that, and each (bytes, seconds) with
    what a broadcast of so many gave: first and last byte, sum and seconds, or the error if it took longer, which ends the group.
    Rank 0 sends bytes 0, 1, 2, ..., 250, 0, ..."""
    os.environ.update(environment)
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = connect_store(address)
    group: PeerGroup | None = None
    with contextlib.suppress(EOFError):
        while True:
            message: str | tuple[int, float] = connection.recv()
            if isinstance(message, str):
                group = PeerGroup(store, message, rank, size, device, timeout_s, "127.0.0.1")
                connection.send("joined")
                continue
            assert group is not None
            try:
                connection.send(_broadcast(group, rank, device, *message))
            except WeightSyncError as error:
                group.drop()
                connection.send(f"{type(error).__name__}: {error}")
    if group is not None:
        group.drop()


def _broadcast(
    group: PeerGroup, rank: int, device: torch.device, count: int, limit_s: float
) -> tuple[int, int, int, float]:
    buffer = torch.zeros(count, dtype=torch.uint8, device=device)
    if rank == 0:
        buffer.copy_(torch.arange(count, device=device) % 251)
    started = time.monotonic()

    def look() -> None:
        if time.monotonic() > started + limit_s:
            raise GroupBroken(f"not there after {limit_s:g} s")

    wait_for(group.broadcast(buffer), look)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    return int(buffer[0]), int(buffer[-1]), int(buffer.sum(dtype=torch.int64)), seconds


def publish_collectively(
    connection: Connection,
    device_name: str,
    environment: dict[str, str],
    plan: Plan,
    kinds: dict[str, Weights],
) -> None:
    """The learner's side of `collective`: says its endpoint, then publishes each (version, kind) that it is told to, to the engines
    that joined, and answers with those that are out of service."""
    os.environ.update(environment)
    device = torch.device(device_name)
    placed = {kind: {name: t.to(device) for name, t in weights.items()} for kind, weights in kinds.items()}
    with (
        CollectivePublisher(WeightSyncConfig(timeout_s=ANSWER_S), plan, device=device) as publisher,
        contextlib.suppress(EOFError),
    ):
        connection.send(publisher.endpoint)
        while True:
            version, kind, engines = connection.recv()
            publisher.wait_for_engines(set(engines), timeout_s=ANSWER_S)
            publisher.begin(version)
            for bucket in plan.buckets:
                publisher.write(bucket, cut(plan, bucket, placed[kind]))
            connection.send(publisher.commit().out_of_service)
