"""The learner's step (packed rollouts, logprobs in vocabulary chunks) against a plain transformers loop with padding, in one run.

    python tools/bench_learner.py --json out.json

Same model, rollouts, optimizer and token budget of a micro-batch (in which padded tokens count); each side in a process of its
own, steps in turns, the first of each left out. Tokens are prompt and answer tokens without padding; a step is forward,
backward, clip and AdamW. Losses and gradient norms of the sides are compared: the tool ends with 1 if they differ by more than
1e-3 of their size. On a machine that others use as well, CPU seconds say more than seconds. Peak memory is the process's
resident set, the model and Python with it, at its highest and what of it came with the steps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from learner_sides import SIDES, VERSION, run_side
from rich.console import Console
from rich.table import Table

from asyncrl.buffer.schema import BATCH

START_S = 300.0
AGREE = 1e-3
WIDTH = 110


def rollouts(args: argparse.Namespace) -> pa.Table:
    """Log-normal answer lengths: half of them below the median, a long tail above it, cut off at the longest."""
    random = np.random.default_rng(args.seed)
    rows: dict[str, list[object]] = {name: [] for name in BATCH.names}
    for index in range(args.prompts * args.rollouts):
        length = int(np.exp(random.normal(np.log(args.median), args.sigma)).clip(4, args.longest))
        group = index // args.rollouts
        values: dict[str, object] = {
            "rollout_id": index,
            "group_id": group,
            "prompt_tokens": np.random.default_rng((args.seed, group)).integers(
                0, args.vocabulary, args.prompt_tokens
            ),
            "tokens": random.integers(0, args.vocabulary, length),
            "logprobs": random.normal(-np.log(args.vocabulary), 0.3, length),
            "versions": np.full(length, VERSION),
            "trainable": np.ones(length, dtype=bool),
            "reward": float(random.random()),
            "cost": 0.0,
            "greedy": False,
            "finish_reason": "stop",
        }
        for name in BATCH.names:
            rows[name].append(values[name])
    return pa.table(rows, schema=BATCH)


def write_model(folder: str, args: argparse.Namespace) -> int:
    """A Qwen2 with random weights; its parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.key_heads,
        max_position_embeddings=args.prompt_tokens + args.longest,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return int(model.num_parameters())


class Side:
    """A process that does a step when it is told to."""

    def __init__(self, name: str, folder: str, table: pa.Table, args: argparse.Namespace) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name, self._limit_s = name, args.step_timeout_s
        ours, theirs = spawn.Pipe()
        self._pipe: Connection = ours
        self._process: SpawnProcess = spawn.Process(
            target=run_side, args=(theirs, name, folder, table, args.tokens, args.threads), daemon=True
        )
        self._process.start()
        theirs.close()
        self.loaded_mb: float = self._answer(START_S)["loaded_mb"]
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        self._pipe.send("step")
        self.steps.append(self._answer(self._limit_s))

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(timeout=20)
        self._process.kill()
        self._pipe.close()

    def _answer(self, limit_s: float) -> Any:
        if not self._pipe.poll(limit_s):
            raise TimeoutError(f"side {self.name!r} did not answer within {limit_s:g} s")
        return self._pipe.recv()

    def figures(self, tokens: int) -> dict[str, float]:
        seconds = [step["seconds"] for step in self.steps[1:]]
        peak = self.steps[-1]["peak_mb"]
        return {
            "tokens_per_s": tokens / statistics.median(seconds),
            "step_s": statistics.median(seconds),
            "least_s": min(seconds),
            "most_s": max(seconds),
            "cpu_s": statistics.median(step["cpu_s"] for step in self.steps[1:]),
            "padding_percent": 100 * (self.steps[-1]["computed_tokens"] / tokens - 1),
            "peak_mb": peak,
            "steps_mb": peak - self.loaded_mb,
            "loss": self.steps[0]["loss"],
            "grad_norm": self.steps[0]["grad_norm"],
        }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    table = rollouts(args)
    lengths = [len(r["prompt_tokens"]) + len(r["tokens"]) for r in table.to_pylist()]
    sides: list[Side] = []
    with tempfile.TemporaryDirectory(prefix="asyncrl-bench-") as folder:
        parameters = write_model(folder, args)
        try:
            for name in args.sides:
                sides.append(Side(name, folder, table, args))
            for _ in range(1 + args.rounds):
                for side in sides:
                    side.step()
        finally:
            for side in sides:
                side.close()
    return {
        "parameters": parameters,
        "rollouts": len(lengths),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
        "sides": {side.name: side.figures(sum(lengths)) for side in sides},
        "steps": {side.name: side.steps for side in sides},
    }


def disagreements(result: dict[str, Any]) -> list[str]:
    """Of the first step's loss and gradient norm, against the first side's."""
    (first, want), *others = result["sides"].items()
    return [
        f"{name}: {figure} {have[figure]:.6g}, {first}: {want[figure]:.6g}"
        for name, have in others
        for figure in ("loss", "grad_norm")
        if abs(have[figure] - want[figure]) > AGREE * max(abs(want[figure]), AGREE)
    ]


def show(result: dict[str, Any]) -> None:
    title = f"{result['rollouts']} rollouts, {result['tokens']:,} tokens, longest {result['longest']:,}"
    table = Table(title=f"{title}; {result['parameters'] / 1e6:.1f} M parameters")
    for heading in (
        "side",
        "tokens/s",
        "times",
        "step s",
        "cpu s",
        "padding",
        "peak MB",
        "of steps",
        "loss",
        "norm",
    ):
        table.add_column(heading, justify="left" if heading == "side" else "right")
    first = next(iter(result["sides"].values()))
    for name, own in result["sides"].items():
        table.add_row(
            name,
            f"{own['tokens_per_s']:,.0f}",
            f"{own['tokens_per_s'] / first['tokens_per_s']:.2f}",
            f"{own['step_s']:.1f} ({own['least_s']:.1f}-{own['most_s']:.1f})",
            f"{own['cpu_s']:.1f}",
            f"{own['padding_percent']:.0f} %",
            f"{own['peak_mb']:,.0f}",
            f"{own['steps_mb']:,.0f}",
            f"{own['loss']:.5f}",
            f"{own['grad_norm']:.5f}",
        )
    Console(width=WIDTH).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=4, help="per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--median", type=float, default=150.0, help="answer tokens")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the lengths' logarithm")
    parser.add_argument("--longest", type=int, default=2000, help="answer tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch, padded ones included")
    parser.add_argument(
        "--rounds", type=int, default=3, help="steps measured of each side, after one that is not"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each side; they never run together")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-timeout-s", type=float, default=600.0)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    result = measure(args)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if wrong := disagreements(result):
        print("the sides do not compute the same:", *wrong, sep="\n  ")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
