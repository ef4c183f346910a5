"""Logprobs in vocabulary chunks of several sizes, and all at once as log_softmax, on the same tensors in one run.

    OMP_NUM_THREADS=2 python tools/bench_vocabulary.py --json out.json

Forward and backward of the output head alone, in turns, the first turn left out. Peak memory is the process's resident set above
what it was with inputs and gradients in place; each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from asyncrl.learner.logprobs import token_logprobs, token_logprobs_and_entropies

ONCE = 0
"""In place of a chunk's MiB: all at once."""
DEADLINE_S = 500.0


def step(args: argparse.Namespace, tensors: tuple[torch.Tensor, ...], mebibytes: int) -> None:
    hidden, weight, targets = tensors
    hidden.grad = weight.grad = None
    if mebibytes == ONCE:
        log_p = torch.log_softmax((hidden @ weight.T).float(), -1)
        out = log_p.gather(-1, targets[:, None]).sum()
        if args.entropy:
            out = out - 0.01 * (log_p.exp() * log_p).sum()
    else:
        rows = max(1, mebibytes * 2**20 // (4 * args.vocabulary))
        if args.entropy:
            logprobs, entropies = token_logprobs_and_entropies(hidden, weight, targets, 1.0, rows)
            out = logprobs.sum() + 0.01 * entropies.sum()
        else:
            out = token_logprobs(hidden, weight, targets, 1.0, rows).sum()
    out.backward()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """In this process: one way."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    tensors = (
        torch.randn(args.tokens, args.width, dtype=dtype).requires_grad_(),
        (torch.randn(args.vocabulary, args.width) * 0.02).to(dtype).requires_grad_(),
        torch.randint(0, args.vocabulary, (args.tokens,)),
    )
    for tensor in tensors[:2]:
        tensor.grad = torch.ones_like(tensor)
    before = resident("VmRSS")
    seconds = []
    for _ in range(args.rounds + 1):
        start = time.perf_counter()
        step(args, tensors, args.way)
        seconds.append(time.perf_counter() - start)
    return {
        "chunk": f"{args.way} MiB" if args.way else "all at once",
        "tokens_per_s": args.tokens / statistics.median(seconds[1:]),
        "peak_bytes": resident("VmHWM") - before,
    }


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--entropy", action="store_true")
    parser.add_argument("--chunks", default="4,16,64,256", help="MiB of float32 logits, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--way", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        print(json.dumps(measure(args)))
        return
    rows = []
    for way in [*map(int, args.chunks.split(",")), ONCE]:
        command = [sys.executable, *sys.argv, "--way", str(way)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(box=None, pad_edge=False)
    for name in ("chunk", "tokens/s", "peak GB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["chunk"], f"{row['tokens_per_s']:,.0f}", f"{row['peak_bytes'] / 1e9:.2f}")
    Console(width=80).print(
        f"{args.tokens} tokens, vocabulary {args.vocabulary}, width {args.width}, {args.dtype}"
        + (", with entropy" if args.entropy else ""),
        table,
        sep="\n",
    )
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": None}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
