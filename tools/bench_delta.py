"""Deltas between versions of the weights: what they cost and save, in one run.

    python tools/bench_delta.py --megabytes 128 --rounds 3 --link-mb-s 50 --json FILE

`density`: bfloat16 weights of which a share moved by one last bit: encode and apply against a copy of the same bytes, and what
goes over the wire. `training`: which share of the bfloat16 (and float32) weights of a small language model AdamW changes in a
step, and what that comes to as a delta. `link`: one version pulled over loopback and over a link of the given rate, whole
and as a delta (of 2 %), with the checks that an engine makes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import mmap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import rich
import torch
from rich.table import Table

from asyncrl.weight_sync import delta
from asyncrl.weight_sync.checksum import bucket_checksum
from asyncrl.weight_sync.plan import Plan, make_plan
from asyncrl.weight_sync.pulling import Puller
from asyncrl.weight_sync.serving import ChunkServer
from asyncrl.weight_sync.wire import Offer, Served

DENSITIES: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5)
RATES: Final = (1e-7, 1e-6, 1e-5)
"""Learning rates."""
BUCKET_BYTES: Final = 16 << 20
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--link-mb-s", type=float, default=50.0)
    parser.add_argument("--parts", default="density,training,link")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    parts: dict[str, Callable[[], list[Row]]] = {
        "density": lambda: list(densities(asked.megabytes << 20, asked.rounds)),
        "training": lambda: list(training()),
        "link": lambda: asyncio.run(links(asked.megabytes << 20, asked.rounds, asked.link_mb_s * 1e6)),
    }
    found = {name: parts[name]() for name in asked.parts.split(",")}
    for name, rows in found.items():
        show(name, rows)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


def show(title: str, rows: list[Row]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    rich.print(table)


# ---- density -----------------------------------------------------------------------------------------------------------


def weights(size: int) -> np.ndarray:
    """bfloat16 of a normal distribution, as uint16: [size / 2]."""
    drawn = np.random.default_rng(0).standard_normal(size // 2, dtype=np.float32)
    return ((drawn * np.float32(0.02)).view(np.uint32) >> 16).astype(np.uint16)


def moved(base: np.ndarray, share: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    new = base.copy()
    places = rng.random(len(base), dtype=np.float32) < share
    new[places] += rng.choice(np.array([1, 65535], np.uint16), int(places.sum()))
    return new


def densities(size: int, rounds: int) -> Iterator[Row]:
    base = weights(size)
    for share in DENSITIES:
        new, times = moved(base, share, 1), []
        for _ in range(rounds):
            times.append(one_round(base, new))
        encode_s, apply_s, copy_s = (min(each[index] for each in times) for index in range(3))
        yield {
            "changed": share,
            "of the bytes": times[0][3] / size,
            "bytes an item": times[0][3] / (share * len(base)),
            "encode GB/s": size / encode_s / 1e9,
            "apply GB/s": size / apply_s / 1e9,
            "memcpy GB/s": size / copy_s / 1e9,
        }


def one_round(base: np.ndarray, new: np.ndarray) -> tuple[float, float, float, int]:
    """Seconds of encode, apply and copy, and bytes of the delta. Raises if it does not come out right."""
    got = base.copy()
    item = BUCKET_BYTES // 2
    starts = range(0, len(base), item)
    views = [tuple(memoryview(each[at : at + item]).cast("B") for each in (base, new, got)) for at in starts]
    began = time.perf_counter()
    made = [delta.encode(old, now, 2) for old, now, _ in views]
    encoded = time.perf_counter()
    for encoding, (_, now, target) in zip(made, views, strict=True):
        delta.apply(target, encoding) if encoding is not None else target.__setitem__(slice(None), now)
    applied = time.perf_counter()
    if not np.array_equal(got, new):
        raise RuntimeError("a delta did not lead to the new bytes")
    copied = time.perf_counter()
    np.copyto(got, new)
    end = time.perf_counter()
    size = sum(
        len(each) if each is not None else view[1].nbytes for each, view in zip(made, views, strict=True)
    )
    return encoded - began, applied - encoded, end - copied, size


# ---- training ----------------------------------------------------------------------------------------------------------


def training() -> Iterator[Row]:
    """The float32 masters of a small transformer, and their bfloat16 copies, before and after the last of 10 steps."""
    for rate in RATES:
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(
            {
                "tokens": torch.nn.Embedding(2048, 192),
                "body": torch.nn.TransformerEncoder(
                    torch.nn.TransformerEncoderLayer(192, 4, 512, dropout=0.0, batch_first=True), 4
                ),
                "head": torch.nn.Linear(192, 2048),
            }
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        before = flat(model)
        for _ in range(10):
            before = flat(model)
            step(model, optimizer)
        after = flat(model)
        for dtype, width in (("bfloat16", 2), ("float32", 4)):
            old, new = (as_items(each, dtype) for each in (before, after))
            made = delta.encode(memoryview(old).cast("B"), memoryview(new).cast("B"), width)
            yield {
                "learning rate": rate,
                "dtype": dtype,
                "parameters": len(new),
                "changed": float(np.mean(old != new)),
                "of the bytes": len(made) / new.nbytes if made is not None else 1.0,
            }


def step(model: torch.nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    tokens = torch.randint(0, 2048, (4, 64)) ** 2 % 2048
    logits = model["head"](model["body"](model["tokens"](tokens[:, :-1])))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def as_items(values: torch.Tensor, dtype: str) -> np.ndarray:
    cast = values.to(getattr(torch, dtype))
    return cast.view(torch.uint16 if dtype == "bfloat16" else torch.uint32).numpy()


# ---- link --------------------------------------------------------------------------------------------------------------


async def links(size: int, rounds: int, bytes_per_s: float) -> list[Row]:
    base = weights(size)
    plan = make_plan([(f"t{i}", "bfloat16", (size // 2 // 16,)) for i in range(16)], BUCKET_BYTES)
    rows = []
    for name, rate in (("loopback", None), (f"{bytes_per_s / 1e6:g} MB/s", bytes_per_s)):
        for share in (1.0, 0.02):
            seconds, pulled = [], 0
            for _ in range(rounds):
                took, pulled = await pulled_once(plan, base, moved(base, 0.02, 2), share < 1, rate)
                seconds.append(took)
            rows.append(
                {
                    "link": name,
                    "sent": "delta of 2 %" if share < 1 else "whole",
                    "MB on the wire": pulled / 1e6,
                    "seconds": min(seconds),
                    "GB/s of weights": size / min(seconds) / 1e9,
                }
            )
    return rows


async def pulled_once(
    plan: Plan, base: np.ndarray, new: np.ndarray, deltas: bool, rate: float | None
) -> tuple[float, int]:
    """Seconds and bytes of the second of two versions."""
    versions = [mapped(plan, each) for each in (base, new)]
    puller = Puller("bench")
    with ChunkServer("127.0.0.1", deltas=deltas) as server:
        for number, (bytes_, sums) in enumerate(versions):
            server.open(number, memoryview(bytes_), plan, sums)
            endpoint = server.endpoint
            async with contextlib.AsyncExitStack() as stack:
                if rate is not None and number:
                    endpoint = await stack.enter_async_context(slow_link(endpoint, rate))
                began = time.perf_counter()
                source = Served(endpoint=endpoint)
                await puller.fetch(Offer(version=number, source=source, plan=plan, checksums=sums), 600)
                took = time.perf_counter() - began
        pulled = puller.bytes_pulled
        for number in (0, 1):
            server.close_version(number, 10)
    puller.close()
    return took, pulled


def mapped(plan: Plan, values: np.ndarray) -> tuple[mmap.mmap, tuple[int, ...]]:
    made = mmap.mmap(-1, plan.total_bytes)
    made[: values.nbytes] = memoryview(values).cast("B")
    return made, tuple(bucket_checksum(made, bucket) for bucket in plan.buckets)


@contextlib.asynccontextmanager
async def slow_link(endpoint: str, bytes_per_s: float) -> AsyncIterator[str]:
    """TCP in front of the server, whose answers come at `bytes_per_s`."""
    host, port = endpoint.removeprefix("tcp://").split(":")

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, rate: float | None) -> None:
        due = time.perf_counter()
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                if rate is not None:
                    due = max(due, time.perf_counter()) + len(data) / rate
                    await asyncio.sleep(due - time.perf_counter())
                sink.write(data)
                await sink.drain()
        sink.close()

    async def accept(engine: asyncio.StreamReader, to_engine: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(host, int(port))
        task = asyncio.current_task()
        assert task is not None
        carried[task] = (to_engine, to_server)
        await asyncio.gather(carry(engine, to_server, None), carry(server, to_engine, bytes_per_s))

    carried: dict[asyncio.Task[Any], tuple[asyncio.StreamWriter, ...]] = {}
    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"tcp://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        for side in (side for sides in carried.values() for side in sides):
            side.close()
        if carried:
            await asyncio.wait(carried, timeout=5)


if __name__ == "__main__":
    main()
