"""Weight sync over shared memory against memcpy, in one run: one sender and N receivers, each a process of its own.

    python tools/bench_weight_sync.py --mb 988 --tensors 290 --json out.json

memcpy is what no transport over shared memory can beat: a copy of every tensor into warm shared memory, and a copy out
of it. A sync is from `begin` until the receivers have the bytes in tensors of their own, with checksums made and
verified. The first sync of either is left out (first touch of pages).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.plan import Plan, make_plan
from asyncrl.weight_sync.publisher import Publisher
from asyncrl.weight_sync.receiver import Receiver
from asyncrl.weight_sync.report import SyncReport
from asyncrl.weight_sync.shm import map_version
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.wire import Offer

Weights = dict[str, torch.Tensor]


def copy_out(flat: torch.Tensor, plan: Plan, weights: Weights) -> None:
    """`flat`: the bytes of a version, uint8 [total_bytes]."""
    for bucket in plan.buckets:
        for spec in bucket.tensors:
            part = flat[spec.offset : spec.offset + spec.size]
            weights[spec.name].copy_(part.view(getattr(torch, spec.dtype)).view(spec.shape))


def blank(plan: Plan) -> Weights:
    tensors = [spec for bucket in plan.buckets for spec in bucket.tensors]
    return {spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in tensors}


class CopyingTarget:
    """The least that an engine does: map and verify, then copy into tensors of its own."""

    def __init__(self) -> None:
        self._weights: Weights = {}

    async def stage(self, offer: Offer) -> None:
        self._weights = self._weights or blank(offer.plan)
        self._mapped = await asyncio.to_thread(map_version, offer)

    async def apply(self, offer: Offer) -> float:
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._mapped, dtype=torch.uint8)
        await asyncio.to_thread(copy_out, flat, offer.plan, self._weights)
        del self._mapped
        return time.monotonic() - started

    async def discard(self, version: int) -> None:
        del self._mapped

    async def probe(self, tokens: Sequence[int]) -> list[float]:
        return [float(next(iter(self._weights.values())).flatten()[0])] * (len(tokens) - 1)


def receive(endpoint: str, engine_id: str, last_version: int, threads: int) -> None:
    torch.set_num_threads(threads)

    async def run() -> None:
        receiver = Receiver(CopyingTarget(), endpoint, engine_id)
        receiving = asyncio.create_task(receiver.run())
        await receiver.wait_for_version(last_version, timeout_s=600)
        receiving.cancel()
        await asyncio.wait({receiving}, timeout=10)

    asyncio.run(run())


def memcpy_seconds(run_id: str, plan: Plan, weights: Weights, rounds: int) -> list[float]:
    """Of a copy into warm shared memory and one out of it, in this process."""
    slots, back, seconds = Slots(run_id, plan), blank(plan), []
    slot = slots.next()
    mapped = torch.from_file(str(slot.path), shared=True, size=plan.total_bytes, dtype=torch.uint8)
    for _ in range(rounds + 1):
        started = time.monotonic()
        for bucket in plan.buckets:
            for spec in bucket.tensors:
                slot.write(spec, weights[spec.name])
        copy_out(mapped, plan, back)
        seconds.append(time.monotonic() - started)
    slots.close()
    return seconds[1:]


def sync_reports(args: argparse.Namespace, run_id: str, plan: Plan, weights: Weights) -> list[SyncReport]:
    spawn = multiprocessing.get_context("spawn")
    with Publisher(WeightSyncConfig(timeout_s=300.0), run_id, plan) as publisher:
        names = [f"engine-{i}" for i in range(args.receivers)]
        processes = [
            spawn.Process(target=receive, args=(publisher.endpoint, name, args.syncs, args.threads))
            for name in names
        ]
        for process in processes:
            process.start()
        try:
            publisher.wait_for_engines(set(names), timeout_s=120)
            reports = []
            for version in range(args.syncs + 1):
                publisher.begin(version)
                for bucket in plan.buckets:
                    publisher.write(bucket, weights)
                reports.append(publisher.commit())
            return reports[1:]
        finally:
            for process in processes:
                process.join(timeout=20)
                process.kill()


def measure(args: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    elements = args.mb * 10**6 // args.tensors // dtype.itemsize
    weights = {f"layer.{i}": torch.randn(elements).to(dtype) for i in range(args.tensors)}
    plan = make_plan(
        [(name, args.dtype, tuple(w.shape)) for name, w in weights.items()], args.bucket_mb * 10**6
    )
    run_id = f"bench-{os.getpid()}"
    memcpy = statistics.median(memcpy_seconds(run_id, plan, weights, args.syncs))
    reports = sync_reports(args, run_id, plan, weights)
    middle = {
        "seconds": [r.seconds for r in reports],
        "write_s": [r.write_s for r in reports],
        "stage_s": [max(e.stage_s for e in r.engines.values()) for r in reports],
        "apply_s": [max(e.apply_s for e in r.engines.values()) for r in reports],
        "stall_s": [r.max_stall_s for r in reports],
    }
    result: dict[str, object] = {name: round(statistics.median(values), 4) for name, values in middle.items()}
    seconds = statistics.median(middle["seconds"])
    return {
        "mb": plan.total_bytes / 1e6,
        "tensors": args.tensors,
        "buckets": len(plan.buckets),
        "receivers": args.receivers,
        "syncs": args.syncs,
        "memcpy_in_and_out_s": round(memcpy, 4),
        **result,
        "mb_per_s": round(plan.total_bytes / 1e6 / seconds),
        "sync_over_memcpy": round(seconds / memcpy, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--receivers", type=int, default=1)
    parser.add_argument("--syncs", type=int, default=5, help="rounds measured, after one that is not")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    result = measure(args)
    for name, value in result.items():
        print(f"{name:>22}  {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
