"""The parts of `gpu_check` about whole versions: sums, `ipc`, `collective`. Called by `gpu_parts`; asyncrl is imported within."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from asyncrl.weight_sync.plan import Plan

BUCKET_BYTES = 256 * 2**20


def weights_and_plan(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, torch.Tensor], Plan]:
    """Equal bf16 tensors, `args.mb` in all."""
    from asyncrl.weight_sync.plan import make_plan

    count = args.mb * 10**6 // args.tensors // 2
    weights = {
        f"layer.{i}": torch.randn(count, device=device).to(torch.bfloat16) for i in range(args.tensors)
    }
    return weights, make_plan([(name, "bfloat16", (count,)) for name in weights], BUCKET_BYTES)


def sums(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    import xxhash
    from gpu_parts import timed

    from asyncrl.weight_sync.device_sum import bucket_sum
    from asyncrl.weight_sync.plan import make_plan

    size = args.mb * 10**6
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    (bucket,) = make_plan([("all", "uint8", (size,))], size).buckets
    on_device = timed(device, lambda: bucket_sum(data, bucket))
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def copy_and_hash() -> None:
        host.copy_(data)
        with memoryview(host.numpy()) as view:  # type: ignore[arg-type]
            xxhash.xxh3_64_intdigest(view)

    on_host = timed(device, copy_and_hash)
    return {
        "on_device_gb_per_s": size / 1e9 / on_device,
        "copied_and_xxh3_gb_per_s": size / 1e9 / on_host,
        "times_faster": on_host / on_device,
    }


# ---- ipc ------------------------------------------------------------------------------------------------------------


def version(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    from device_peers import make_slots, write
    from gpu_parts import Child, timed

    weights, plan = weights_and_plan(args, device)
    found: list[dict[str, float]] = []
    with contextlib.closing(make_slots(plan, device)) as slots:
        reader = Child({}, _read_version, str(device))
        try:
            write_s = timed(device, lambda: write(slots, plan, 0, weights))
            for number in range(6):
                reader.send(write(slots, plan, number, weights))
                found.append(reader.answer())
        finally:
            reader.end()
    figures = {name: statistics.median(each[name] for each in found[1:]) for name in found[0]}
    whole = write_s + sum(figures.values())
    return {
        "write_and_sum_s": write_s,
        **figures,
        "whole_s": whole,
        "whole_gb_per_s": plan.total_bytes / 1e9 / whole,
    }


def _read_version(connection: Connection, device_name: str) -> None:
    from gpu_parts import settle
    from host_memory import open_host_memory

    from asyncrl.weight_sync.device_version import DeviceVersion, open_memory
    from asyncrl.weight_sync.version_bytes import tensors_of

    device = torch.device(device_name)
    own: dict[str, torch.Tensor] = {}
    with contextlib.suppress(EOFError):
        while True:
            offer: Any = connection.recv()
            marks = [time.perf_counter()]
            opener = open_host_memory if device.type == "cpu" else open_memory
            opened = DeviceVersion(offer, device, opener)
            marks.append(time.perf_counter())
            opened.verify()
            marks.append(time.perf_counter())
            for name, tensor in tensors_of(offer, opened):
                own.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
            del tensor
            settle(device)
            marks.append(time.perf_counter())
            opened.verify()
            opened.close()
            marks.append(time.perf_counter())
            names = ("open_s", "verify_s", "copy_s", "verify_again_and_close_s")
            connection.send({name: marks[i + 1] - marks[i] for i, name in enumerate(names)})


# ---- collective -----------------------------------------------------------------------------------------------------


def collective(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Sender and receiver are processes of their own; with one GPU both are on it."""
    import one_gpu
    from gpu_parts import Child

    gpus = torch.cuda.device_count() if device.type == "cuda" else 2
    sender, receiver = (
        Child(one_gpu.environment(rank, gpus), work, args, str(device))
        for rank, work in enumerate((_send, _receive))
    )
    try:
        plan, address = sender.answer()
        receiver.send((plan, address))
        begun, sent = sender.answer()
        received = receiver.answer()
    finally:
        sender.end()
        receiver.end()
    # One clock for all processes of a machine.
    whole = [end - start for start, end in zip(begun, received, strict=True)]
    busy = [end - start for start, end in zip(begun, sent, strict=True)]
    seconds = statistics.median(whole[1:])
    return {
        "first_with_group_s": whole[0],
        "sender_busy_s": statistics.median(busy[1:]),
        "version_s": seconds,
        "gb_per_s": plan.total_bytes / 1e9 / seconds,
    }


VERSIONS = 4
PAUSE_S = 1.0
"""Between two versions: the receiver waits for the next, and has read the words about the last."""


def _send(connection: Connection, args: argparse.Namespace, device_name: str) -> None:
    from asyncrl.weight_sync.collective_sender import CollectiveSender
    from asyncrl.weight_sync.collective_words import Stream
    from asyncrl.weight_sync.pieces import cut

    device = torch.device(device_name)
    weights, plan = weights_and_plan(args, device)
    sender = CollectiveSender(plan, 0, "127.0.0.1", device, 600.0)
    connection.send((plan, sender.address))
    begun, sent = [], []
    for number in range(VERSIONS):
        time.sleep(PAUSE_S)
        begun.append(time.monotonic())
        sender.begin(Stream(name="check", version=number, size=2, made=number > 0, timeout_s=600.0))
        for bucket in plan.buckets:
            sender.send(bucket, cut(plan, bucket, weights), lambda: None)
        sender.drain(lambda: None)
        sender.tell_checksums()
        sent.append(time.monotonic())
        time.sleep(PAUSE_S)
        sender.end()
    connection.send((begun, sent))
    with contextlib.suppress(EOFError):
        connection.recv()
    sender.close()


def _receive(connection: Connection, args: argparse.Namespace, device_name: str) -> None:
    from asyncrl.weight_sync.collective_fetch import CollectiveFetch
    from asyncrl.weight_sync.wire import Group, Offer

    plan, address = connection.recv()
    fetch = CollectiveFetch("check")
    backend = "nccl" if device_name.startswith("cuda") else "gloo"

    async def run() -> list[float]:
        ends = []
        for number in range(VERSIONS):
            source = Group(backend=backend, stores=(address,), name="check", rank=1, size=2, made=number > 0)
            offer = Offer(version=number, source=source, plan=plan, checksums=())
            await fetch.fetch(offer, 600.0)
            ends.append(time.monotonic())
        return ends

    connection.send(asyncio.run(run()))
    fetch.close()
