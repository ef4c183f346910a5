"""Training every weight, LoRA and QLoRA: time, memory and bytes of a version, in one run.

    python tools/bench_lora.py --json out.json

One GRPO step over the same rollouts, each learner in a process of its own, steps in turns, the first left out. `state`
is what it holds between steps (weights, gradients left out, AdamW); `peak` is the resident set at its highest, Python and all.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import rich
from bench_learner import rollouts, write_model
from learner_sides import VERSION, resident_mb
from rich.table import Table

WAIT_S = 300.0
SIDES: dict[str, dict[str, Any] | None] = {
    "every weight": None,
    "LoRA, merged": {},
    "LoRA, adapter": {"sync": "adapter"},
    "QLoRA (nf4)": {"quantise": "nf4"},
}


def learn(
    pipe: Any, lora: dict[str, Any] | None, folder: str, table: pa.Table, args: argparse.Namespace
) -> None:
    """A step for each message until None comes."""
    from asyncrl.learner.config import LearnerConfig
    from asyncrl.learner.lora_config import LoraConfig
    from asyncrl.learner.step import Learner

    made = None if lora is None else LoraConfig(rank=args.rank, **lora)
    config = LearnerConfig(device="cpu", cores=args.threads, tokens_per_microbatch=args.tokens, lora=made)
    learner = Learner(config, folder, 1.0)
    plan = learner.plan(2**28, args.wire)
    pipe.send(None)
    while pipe.recv() is not None:
        start = time.perf_counter()
        learner.train(table, VERSION)
        trained = time.perf_counter()
        for bucket in plan.buckets:
            learner.gather(plan, bucket)
        gathered = time.perf_counter()
        policy = learner.trained["policy"]
        held = [*policy.module.parameters()]
        held += [each for state in policy.optimizer.state.values() for each in state.values()]
        state = sum(each.numel() * each.element_size() for each in held)
        figures = {"step_s": trained - start, "gather_s": gathered - trained, "state_mb": state / 2**20}
        pipe.send({**figures, "peak_mb": resident_mb("VmHWM"), "version_mb": plan.total_bytes / 2**20})


def bench_learners(args: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    spawn, table = multiprocessing.get_context("spawn"), rollouts(args)
    sides: dict[str, tuple[Any, Any]] = {}
    for name, lora in SIDES.items():
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=learn, args=(theirs, lora, folder, table, args), daemon=True)
        process.start()
        sides[name] = (ours, process)
        _answer(name, ours)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, (pipe, _) in sides.items():
            pipe.send("step")
            steps[name].append(_answer(name, pipe))
    for pipe, process in sides.values():
        pipe.send(None)
        process.join(timeout=20)
        process.kill()
    return {name: _medians(taken[1:]) for name, taken in steps.items()}


def _answer(name: str, pipe: Any) -> Any:
    if not pipe.poll(WAIT_S):
        raise TimeoutError(f"{name!r} did not answer within {WAIT_S:g} s")
    return pipe.recv()


def _medians(taken: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in taken) for name in taken[0]}


def show(found: dict[str, dict[str, float]], title: str) -> None:
    table = Table(title=title)
    names = list(next(iter(found.values())))
    for column in ("", *names):
        table.add_column(column, justify="right")
    for side, figures in found.items():
        table.add_row(side, *(f"{figures[name]:,.4g}" for name in names))
    rich.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {
        "hidden": 512,
        "layers": 8,
        "heads": 8,
        "key_heads": 4,
        "vocabulary": 8192,
        "rank": 16,
        "rounds": 5,
    }
    sizes |= {"prompts": 4, "rollouts": 4, "prompt_tokens": 32, "median": 120, "longest": 1000, "seed": 0}
    sizes |= {"tokens": 4096, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--sigma", type=float, default=0.8, help="of the lengths' logarithm")
    parser.add_argument("--wire", default="bfloat16", help="type of what is sent")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="asyncrl-bench-") as folder:
        parameters = write_model(folder, args)
        found = bench_learners(args, folder)
    show(found, f"{parameters / 1e6:.1f} M parameters, adapters of rank {args.rank}")
    if args.json:
        args.json.write_text(
            json.dumps({"settings": vars(args) | {"json": str(args.json)}, "found": found}, indent=2)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
