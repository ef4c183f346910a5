"""The parts of `gpu_check` that need no engine: `python tools/gpu_parts.py PART OUT --mb N --tensors N --device cuda|cpu`.

Each writes its figures to OUT as JSON. Rates are in GB/s (10^9 bytes), medians of several rounds after one that is not counted.
Nothing is imported at the top that a part does not need: some run where there is torch alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ROUNDS = 5
ANSWER_S = 300.0


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Median seconds of a round."""
    seconds = []
    for _ in range(ROUNDS + 1):
        settle(device)
        started = time.perf_counter()
        work()
        settle(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


class Child:
    """A process that runs `work(connection, ...)` under `environment`."""

    def __init__(self, environment: dict[str, str], work: Callable[..., None], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_entered, args=(environment, work, theirs, *arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def send(self, message: object) -> None:
        self._connection.send(message)

    def answer(self) -> Any:
        if not self._connection.poll(ANSWER_S):
            raise TimeoutError(f"no answer within {ANSWER_S:g} s")
        return self._connection.recv()

    def end(self) -> None:
        self._connection.close()
        self._process.join(timeout=20)
        self._process.kill()


def _entered(environment: dict[str, str], work: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(environment)
    work(*arguments)


# ---- copies ---------------------------------------------------------------------------------------------------------


def memcpy(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    size = args.mb * 10**6
    on_gpu, beside = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    pageable = torch.zeros(size, dtype=torch.uint8)
    ways = {
        "to_gpu_pinned": lambda: on_gpu.copy_(pinned, non_blocking=True),
        "to_host_pinned": lambda: pinned.copy_(on_gpu, non_blocking=True),
        "to_gpu_pageable": lambda: on_gpu.copy_(pageable),
        "to_host_pageable": lambda: pageable.copy_(on_gpu),
        "on_gpu": lambda: beside.copy_(on_gpu),
    }
    return {f"{name}_gb_per_s": size / 1e9 / timed(device, way) for name, way in ways.items()}


def ipc(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    from asyncrl.weight_sync.cuda_memory import Allocation

    size = args.mb * 10**6
    started = time.perf_counter()
    memory = Allocation(size, device)
    allocate_s = time.perf_counter() - started
    reader = Child({}, _read_memory, str(device), size)
    try:
        reader.send(memory.handle)
        found: dict[str, float] = reader.answer()
    finally:
        reader.end()
        memory.free()
    return {"allocate_s": allocate_s, **found}


def _read_memory(connection: Connection, device_name: str, size: int) -> None:
    from asyncrl.weight_sync.cuda_memory import opened

    device = torch.device(device_name)
    own = torch.empty(size, dtype=torch.uint8, device=device)
    handle: bytes = connection.recv()
    started = time.perf_counter()
    with opened(handle, size, device) as theirs:
        open_s = time.perf_counter() - started
        copy_s = timed(device, lambda: own.copy_(theirs))
    started = time.perf_counter()
    with opened(handle, size, device):
        pass
    again_s = time.perf_counter() - started
    connection.send(
        {"open_s": open_s, "open_and_close_again_s": again_s, "copy_gb_per_s": size / 1e9 / copy_s}
    )


# ---- groups ---------------------------------------------------------------------------------------------------------


def nccl(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    import one_gpu

    from asyncrl.weight_sync.process_group import serve_store

    store, address = serve_store("127.0.0.1")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 2
    ranks = [
        Child(one_gpu.environment(rank, gpus), _broadcast, address, rank, _own(device, rank), args.mb * 10**6)
        for rank in range(2)
    ]
    try:
        figures: list[dict[str, float]] = [rank.answer() for rank in ranks]
    finally:
        for rank in ranks:
            rank.end()
        del store
    return {"ranks_on_one_gpu": float(gpus == 1), **figures[1]}


def _own(device: torch.device, rank: int) -> str:
    return f"cuda:{rank % torch.cuda.device_count()}" if device.type == "cuda" else "cpu"


def _broadcast(connection: Connection, address: str, rank: int, device_name: str, size: int) -> None:
    from asyncrl.weight_sync.process_group import PeerGroup, connect_store, wait_for

    device = torch.device(device_name)
    buffer = torch.full((size,), rank, dtype=torch.uint8, device=device)
    settle(device)
    started = time.perf_counter()
    group = PeerGroup(connect_store(address), "check", rank, 2, device, ANSWER_S, "127.0.0.1")
    group_s = time.perf_counter() - started
    seconds = timed(device, lambda: wait_for(group.broadcast(buffer), lambda: None))
    if int(buffer.count_nonzero()):
        raise RuntimeError(f"rank {rank}: expected zeros from rank 0")
    connection.send({"group_s": group_s, "broadcast_gb_per_s": size / 1e9 / seconds})
    group.drop()


def main() -> int:
    import gpu_versions

    parts: dict[str, Callable[[argparse.Namespace, torch.device], dict[str, float]]] = {
        "memcpy": memcpy,
        "ipc": ipc,
        "nccl": nccl,
        "sum": gpu_versions.sums,
        "version": gpu_versions.version,
        "collective": gpu_versions.collective,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=parts)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mb", type=int, default=988)
    parser.add_argument("--tensors", type=int, default=290)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device("cpu") if args.device == "cpu" else torch.device("cuda", 0)
    args.out.write_text(json.dumps(parts[args.part](args, device)))
    return 0


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent))
    sys.exit(main())
