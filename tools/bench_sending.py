"""How fast the learner's ranks bring a version together, against making each tensor whole and against memcpy, in one run.

    python tools/bench_sending.py
    python tools/bench_sending.py --ranks 4 --wire float32 --json out.json

A new Llama of the given sizes, sharded over ranks in processes of their own (gloo); no engine: what is sent lands in memory of the
host. Each way is taken once to warm up, then `--rounds` times; the best counts, as ranks share cores with whatever else runs.

    memcpy       the version's bytes into other memory and out again, on one rank
    full tensors `full_tensor` and cast of each parameter, one after the other
    gather       every bucket brought to rank 0
    one          the same, and written with checksums while the next bucket is gathered
    all          every rank writes its own rows, with checksums
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.step import Learner
from asyncrl.weight_sync.pieces import put_summed
from asyncrl.weight_sync.pipeline import Pipeline
from asyncrl.weight_sync.plan import Bucket, Plan

DEADLINE_S = 400.0


def measure(args: argparse.Namespace, folder: str, rank: int, address: str) -> dict[str, float]:
    """In a process of its own: one rank. Seconds of each way, and `parameters` and `bytes` of the version."""
    torch.set_num_threads(args.threads)
    timeout_s = DEADLINE_S / 2
    config = LearnerConfig(
        device="cpu", ranks=args.ranks, start_timeout_s=timeout_s, step_timeout_s=timeout_s
    )
    learner = Learner(config, folder, 1.0, rank, args.ranks, address)
    plans = {senders: learner.plan(args.bucket_mb * 2**20, args.wire, senders) for senders in ("one", "all")}
    version = torch.zeros(plans["one"].total_bytes, dtype=torch.uint8)
    other = torch.zeros_like(version)
    ways: dict[str, Callable[[], object]] = {
        "memcpy": lambda: (other.copy_(version), version.copy_(other)) if rank == 0 else None,
        "full tensors": lambda: make_whole(learner, getattr(torch, args.wire)),
        "gather": lambda: [learner.gather(plans["one"], bucket) for bucket in plans["one"].buckets],
        "one": lambda: send(learner, plans["one"], plans["one"].buckets, version),
        "all": lambda: send(learner, plans["all"], plans["all"].of(rank), version),
    }
    seconds = {name: best(way, args.rounds) for name, way in ways.items()}
    parameters = sum(parameter.numel() for parameter in learner._policy.parameters())
    learner.close()
    return {**seconds, "parameters": parameters, "bytes": version.numel()}


def best(way: Callable[[], object], rounds: int) -> float:
    """Seconds from the moment when all ranks begin until all are done."""
    taken = []
    for _ in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        way()
        dist.barrier()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def make_whole(learner: Learner, dtype: torch.dtype) -> None:
    for parameter in learner._policy.parameters():
        parameter.detach().full_tensor().to(dtype)


def send(learner: Learner, plan: Plan, buckets: tuple[Bucket, ...], version: torch.Tensor) -> None:
    """As `runtime.sending` does it, on a rank that writes what it has of `plan`."""
    deadline = time.monotonic() + DEADLINE_S

    def write(item: tuple[Bucket, list[torch.Tensor]]) -> None:
        bucket, pieces = item
        put_summed(version, plan, bucket, pieces)

    with Pipeline(write) as pipeline:
        for bucket in buckets:
            pieces = learner.gather(plan, bucket)
            if len(pieces) == len(bucket.pieces):  # rank 0's, or one's own
                pipeline.put((bucket, pieces), deadline)
            del pieces
        pipeline.finish(deadline)


def run(args: argparse.Namespace, folder: str) -> dict[str, float]:
    """Rank 0's figures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--rank", str(rank), "--at", f"{folder} {address}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(args.ranks)
    ]
    try:
        told = [json.loads(each.communicate(timeout=DEADLINE_S)[0].splitlines()[-1]) for each in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=10)
    found: dict[str, float] = told[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--wire", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--bucket-mb", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.at:
        print(json.dumps(measure(args, args.at.split()[0], args.rank, args.at.split()[1])), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model(
            "llama", hidden_size=args.hidden, intermediate_size=args.hidden * 4, num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64, vocab_size=args.vocabulary,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        found = run(args, folder)
    parameters, size = found.pop("parameters"), found.pop("bytes")
    table = Table(box=None, pad_edge=False)
    for name in ("way", "ms", "times memcpy"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way, seconds in found.items():
        table.add_row(way, f"{1000 * seconds:.1f}", f"{seconds / found['memcpy']:.2f}")
    console = Console(width=100)
    console.print(
        f"{parameters / 1e6:.1f} M parameters as {args.wire}, {size / 1e6:.0f} MB, {args.ranks} ranks of {args.threads} threads"
    )
    console.print(table)
    if args.json:
        rows = {"parameters": parameters, "bytes": size, "seconds": found}
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
