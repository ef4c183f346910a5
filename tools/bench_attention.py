"""Attention over packed rollouts on the CPU: a call for each rollout, for those of equal length, or for padded groups, in one run.

    python tools/bench_attention.py --json out.json

`each`: rollouts as they come. `equal`: sorted by length, one call for those that are equally long (the learner's way). `padded
5 %`, `20 %`, `all`: sorted, then in groups that are padded to their longest by at most so much of their tokens; the copies
into the groups and back are not even counted. Times are the least of the rounds, forward and backward of one layer.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from asyncrl.learner.attention import Packing, packed_attention

WAYS: dict[str, float | None] = {
    "each": None,
    "equal": 0.0,
    "padded 5 %": 0.05,
    "padded 20 %": 0.2,
    "all": 1e9,
}
LOADS = {
    "200 of 8 to 32": (8, 33, 200),
    "50 of 20 to 160": (20, 161, 50),
    "40 of 50 to 400": (50, 401, 40),
    "4 of 500 to 3,000": (500, 3001, 4),
}


def run_lengths(lengths: np.ndarray, padding: float | None) -> list[int]:
    """Of what one call after the other does; `padding`: how much of a group's tokens at most, None: as they come."""
    if padding is None:
        return [int(length) for length in lengths]
    ordered = np.sort(lengths)[::-1].tolist()
    done: list[int] = []
    while ordered:
        longest, count, tokens = ordered[0], 1, ordered[0]
        while count < len(ordered) and (count + 1) * longest <= (1 + padding) * (tokens + ordered[count]):
            tokens += ordered[count]
            count += 1
        done += [longest] * count
        ordered = ordered[count:]
    return done


def seconds(lengths: list[int], args: argparse.Namespace) -> tuple[float, float]:
    """Forward and backward."""
    tensors = [
        torch.randn(1, sum(lengths), heads, args.size).transpose(1, 2).requires_grad_()
        for heads in (args.heads, args.key_heads, args.key_heads)
    ]
    packing, module = Packing.of(tuple(lengths)), torch.nn.Module()
    forward, backward = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        out, _ = packed_attention(module, *tensors, None, packing=packing)
        middle = time.perf_counter()
        torch.autograd.grad(out, tensors, torch.ones_like(out))
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return min(forward), min(backward)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="of a head")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table(title=f"milliseconds forward + backward, {args.threads} thread(s)")
    for heading in ("rollouts", *WAYS):
        table.add_column(heading, justify="left" if heading == "rollouts" else "right")
    result: dict[str, dict[str, tuple[float, float]]] = {}
    for name, (low, high, count) in LOADS.items():
        lengths = np.random.default_rng(0).integers(low, high, count)
        result[name] = {way: seconds(run_lengths(lengths, padding), args) for way, padding in WAYS.items()}
        table.add_row(name, *(f"{f * 1e3:.1f} + {b * 1e3:.1f}" for f, b in result[name].values()))
    Console(width=110).print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
