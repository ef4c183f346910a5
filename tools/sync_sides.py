"""The two sides of a weight sync in the benchmark: a publisher for each transport, and engines that do the least that one does.
Called by `bench_weight_sync`; each receiver is a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence

import torch
from sync_models import Weights, blank

from asyncrl.weight_sync import chunks
from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.device_memory import slots_on
from asyncrl.weight_sync.device_version import DeviceVersion
from asyncrl.weight_sync.mappings import Mappings
from asyncrl.weight_sync.pieces import whole
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.receiver import Receiver
from asyncrl.weight_sync.rolling_publisher import RollingPublisher
from asyncrl.weight_sync.wire import DeviceMemory, Offer

TRANSPORTS = ("shm", "tcp", "collective", "ipc")
START_S = 120.0
TIMEOUT_S = 300.0

AnyPublisher = Publisher | CollectivePublisher


def copy_out(version: torch.Tensor, plan: Plan, weights: Weights) -> None:
    """`version`: its bytes, uint8 [total_bytes]."""
    for spec in plan.tensors:
        weights[spec.name].copy_(whole(version, spec))


class CopyingTarget:
    """Verify, then copy into tensors of its own. `slow_s`: staging takes so much longer."""

    def __init__(self, slow_s: float) -> None:
        self._slow_s = slow_s
        self._weights: Weights = {}
        self._mappings = Mappings(private=True)

    async def stage(self, offer: Offer) -> None:
        on_gpu = isinstance(offer.source, DeviceMemory)
        self._weights = self._weights or blank(offer.plan, "cuda" if on_gpu else "cpu")
        await asyncio.sleep(self._slow_s)
        if on_gpu:
            with contextlib.closing(DeviceVersion(offer, torch.device("cuda"))) as version:
                version.verify()
        else:
            await asyncio.to_thread(self._mappings.verified, offer)

    async def apply(self, offer: Offer) -> float:
        started = time.monotonic()
        await asyncio.to_thread(self._copy, offer)
        return time.monotonic() - started

    def _copy(self, offer: Offer) -> None:
        if isinstance(offer.source, DeviceMemory):
            with contextlib.closing(DeviceVersion(offer, torch.device("cuda"))) as version:
                copy_out(version.data, offer.plan, self._weights)
                version.verify()
            return
        copy_out(
            torch.frombuffer(self._mappings.of(offer).data, dtype=torch.uint8), offer.plan, self._weights
        )

    async def discard(self, version: int) -> None:
        """Nothing is held."""

    def hold(self) -> None:
        """No streams."""

    def release(self) -> None:
        """No streams."""

    async def probe(self, tokens: Sequence[int]) -> list[float]:
        raise RuntimeError("the benchmark does not probe")


def chunk_of(kilobytes: int) -> None:
    """What `tcp` asks for and gives at once, in this process."""
    chunks.CHUNK_BYTES = kilobytes << 10  # type: ignore[misc]


def receive(
    endpoint: str, engine_id: str, last_version: int, threads: int, slow_s: float, chunk_kb: int
) -> None:
    """A receiver's process: ends when it has `last_version`."""
    torch.set_num_threads(threads)
    chunk_of(chunk_kb)

    async def run() -> None:
        receiver = Receiver(CopyingTarget(slow_s), endpoint, engine_id)
        receiving = asyncio.create_task(receiver.run())
        await receiver.wait_for_version(last_version, timeout_s=600)
        await asyncio.sleep(0.2)  # its answer is on its way
        receiving.cancel()
        await asyncio.wait({receiving}, timeout=10)

    asyncio.run(run())


def publisher_of(transport: str, run_id: str, plan: Plan, lag: int, delta: bool) -> AnyPublisher:
    """`lag`: as `max_lag_versions`. Raises ValueError for what cannot be."""
    if transport == "collective":
        if lag:
            raise ValueError("--lag: expected 0 with collective, which sends to all engines at once")
        config = WeightSyncConfig(transport="collective", timeout_s=TIMEOUT_S)
        return CollectivePublisher(config, plan)
    config = WeightSyncConfig(transport=transport, timeout_s=TIMEOUT_S, delta=delta)  # type: ignore[arg-type]
    device = slots_on(torch.device("cuda"), plan) if transport == "ipc" else None
    if lag:
        return RollingPublisher(config, run_id, plan, max_lag_versions=lag, device=device)
    return Publisher(config, run_id, plan, device=device)


@contextlib.contextmanager
def receivers(
    publisher: AnyPublisher, count: int, last_version: int, threads: int, slow_s: float, chunk_kb: int
) -> Iterator[list[str]]:
    """`count` processes that have joined; the first is the slow one. Yields their names."""
    spawn = multiprocessing.get_context("spawn")
    names = [f"engine-{index}" for index in range(count)]
    processes = [
        spawn.Process(
            target=receive,
            args=(publisher.endpoint, name, last_version, threads, 0.0 if index else slow_s, chunk_kb),
        )
        for index, name in enumerate(names)
    ]
    for process in processes:
        process.start()
    try:
        publisher.wait_for_engines(set(names), START_S)
        yield names
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
            process.join()
