"""What `[learner.sharding]` costs and saves: speed and peak memory of the learner's step under each setting, in one run.

    python tools/bench_sharding.py --json out.json
    python tools/bench_sharding.py --ranks 2 --cases "plain;kept;recomputed"

A new Llama of the given sizes and packed rollouts of the given length; forward, backward, clip and AdamW. Each setting in processes
of its own, one per rank; the first step is left out, and named apart, as a compiler works in it. Peak memory is what a rank's
resident set had at its highest, above what it was before the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.learner.distributed import init_distributed, leave_distributed
from asyncrl.learner.model import load_policy
from asyncrl.learner.optimizer import adamw
from asyncrl.learner.rows import assemble, rows_of
from asyncrl.learner.sharding_config import ShardingConfig

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"reshard_after_forward": False},
    "recomputed": {"activation_checkpointing": "full"},
    "compiled": {"compile": True},
    "compiled, recomputed": {"compile": True, "activation_checkpointing": "full"},
    "bfloat16": {"dtype": "bfloat16"},
}
DEADLINE_S = 500.0


def measure(args: argparse.Namespace, folder: str, rank: int, address: str, case: str) -> dict[str, Any]:
    """In a process of its own: one rank under one setting."""
    torch.set_num_threads(args.threads)
    more = dict(CASES[case])
    dtype = more.pop("dtype", "float32")
    mesh = init_distributed(rank, args.ranks, address, "cpu", DEADLINE_S)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    policy = load_policy(folder, mesh, dtype, sharding=msgspec.convert(more, ShardingConfig))
    parameters = list(policy.parameters())
    optimizer = adamw(parameters, (0.9, 0.95), 0.0)
    random = np.random.default_rng(rank)
    pairs = [
        (
            random.integers(0, args.vocabulary, 16).tolist(),
            random.integers(0, args.vocabulary, args.length).tolist(),
        )
        for _ in range(args.rollouts)
    ]
    part = assemble(rows_of(pairs), np.arange(args.rollouts))
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        (-policy(part, 1.0).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    told = {
        "first_s": seconds[0],
        "tokens_per_s": args.ranks * args.rollouts * (args.length + 16) / statistics.median(seconds[1:]),
        "peak_bytes": resident("VmHWM") - before,
        "parameters": sum(p.numel() for p in parameters),
    }
    leave_distributed()
    return told


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def run_case(args: argparse.Namespace, folder: str, case: str) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--rank", str(rank), "--at", f"{folder} {address} {case}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(args.ranks)
    ]
    try:
        told = [json.loads(p.communicate(timeout=DEADLINE_S)[0].splitlines()[-1]) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=10)
    return {"setting": case, **told[0], "peak_bytes": max(each["peak_bytes"] for each in told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of each rank")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--rollouts", type=int, default=16, help="of each rank, in one pass")
    parser.add_argument("--length", type=int, default=240)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", default=";".join(CASES), help="separated by semicolons")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--at", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.at:
        folder, address, case = args.at.split(" ", 2)
        print(json.dumps(measure(args, folder, args.rank, address, case)), flush=True)
        os._exit(0)  # a thread of torch's that is still there can abort the interpreter on its way out
    config = AutoConfig.for_model(
        "llama",
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        rows = [run_case(args, folder, case) for case in args.cases.split(";")]
    table = Table(box=None, pad_edge=False)
    for name in ("setting", "tokens/s", "peak MB a rank", "first step s"):
        table.add_column(name, justify="left" if name == "setting" else "right")
    for row in rows:
        figures = (f"{row['tokens_per_s']:,.0f}", f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['first_s']:.1f}")
        table.add_row(row["setting"], *figures)
    console = Console(width=100)
    tokens = args.rollouts * (args.length + 16)
    console.print(f"{args.ranks} ranks of {args.threads} threads, {tokens:,} tokens a rank and pass")
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": None}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
