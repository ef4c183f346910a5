"""The planner's estimates against published step times, in one run: predicted, published, ratio.

    python tools/check_plan.py --json out.json

Three tables:
- steps: NeMo-RL's performance summary (H100, bfloat16, GRPO on OpenMathInstruct-2). Version 0.4 gives rollouts, mean
  sequence length, GPUs, tensor parallelism and total seconds; its recipes give the split of the asynchronous rows (half and
  half). Version 0.6 is the same run with newer software; its lengths follow from tokens a second. The learner is Megatron
  and runs two more forward passes (policy and reference logprobs), which are added.
- lengths: verl's fully asynchronous README (Qwen2.5-Math-7B, H20, 512 x 16 rollouts, 28K answers). It does not say how long
  answers were, so the mean is solved from one row's update time; generation and the other rows are then predicted.
- publish: published times to move a version, against bytes over the link.
One constant was set by these rows: train_compute, by the two that training bounds (Llama-3.1-8B and Qwen3-32B, 1 step off).
A ratio above 1 means that the plan says longer than was published.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asyncrl.recipes.gpus import GPUS, ClusterEntry
from asyncrl.recipes.model_sizes import shape_of
from asyncrl.recipes.plan_facts import Efficiency, Misfit, Workload
from asyncrl.recipes.plan_memory import fit_engine, learner_memory
from asyncrl.recipes.plan_model import ModelShape
from asyncrl.recipes.plan_speed import EngineSpeed, learner_time, train_flops

EFF = Efficiency()
LLAMA = {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False}
QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "tie_word_embeddings": False}
QWEN3 = {"vocab_size": 151936, "tie_word_embeddings": False, "head_dim": 128}
MIXED = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA | sizes(4096, 14336, 32, 32, 8),
    "Qwen3-32B": QWEN3 | {"model_type": "qwen3"} | sizes(5120, 25600, 64, 64, 8),
    "Qwen3-30B-A3B": MIXED | sizes(2048, 6144, 48, 32, 4) | {"moe_intermediate_size": 768},
    "Qwen3-235B-A22B": MIXED | sizes(4096, 12288, 94, 64, 4) | {"moe_intermediate_size": 1536},
    "Qwen2.5-Math-7B": QWEN2 | sizes(3584, 18944, 28, 28, 4),
}
# model, mode, rollouts, maximum sequence, mean sequence, generation GPUs, learner GPUs, tensor parallel, seconds
STEPS = (
    ("Llama-3.1-8B", "taking turns", 2048, 4096, 1060, 16, 16, 1, 97.7),
    ("Llama-3.1-8B", "1 step off", 2048, 4096, 1129, 8, 8, 1, 74.6),
    ("Qwen3-30B-A3B", "taking turns", 2048, 4096, 3154, 32, 32, 4, 225),
    ("Qwen3-30B-A3B", "1 step off", 2048, 4096, 3158, 16, 16, 2, 244),
    ("Qwen3-32B", "taking turns", 2048, 4096, 3206, 32, 32, 4, 393),
    ("Qwen3-32B", "1 step off", 2048, 4096, 3207, 32, 32, 4, 215),
    ("Qwen3-235B-A22B", "1 step off", 512, 8192, 5691, 128, 128, 8, 241),
    ("Qwen3-30B-A3B", "v0.6, taking turns", 2048, 4096, 3306, 32, 32, 4, 192),
    ("Qwen3-30B-A3B", "v0.6, 1 step off", 2048, 4096, 3358, 16, 16, 2, 152),
)
NEMO_PROMPT_TOKENS = 120
"""Of OpenMathInstruct-2's problems with the chat template, about; the summary gives prompt and answer together."""
# GPUs, generation seconds, old logprobs, update seconds
VERL = ((32, 357.41, 107.71, 269.80), (64, 150.72, 70.26, 133.41), (128, 177.85, 53.92, 113.81))
# system, model, parameters in G, link bytes/s, seconds
PUBLISH = (
    ("NeMo-RL, NCCL reshard", "4B", 4.0, 50e9, 0.27),
    ("NeMo-RL, NCCL reshard", "30B", 30.5, 50e9, 0.87),
    ("verl, bucketed NCCL, H20 16:16", "30B-A3B", 30.5, 50e9, 4.38),
    ("verl, bucketed NCCL, H20 64:64", "235B", 235.1, 50e9, 23.7),
    ("checkpoint-engine, broadcast, 8 x H800", "235B", 235.1, 200e9, 6.22),
    ("verl, full NCCL, H100", "72B", 72.7, 50e9, 28.8),
)


def work_of(rollouts: int, group: int, prompt: float, mean: float, longest: int) -> Workload:
    return Workload(
        prompts_per_step=rollouts // group,
        rollouts_per_prompt=group,
        prompt_tokens=prompt,
        mean_tokens=mean,
        max_tokens=longest,
        max_context_tokens=longest,
        tokens_per_microbatch=16384,
    )


def engine(model: ModelShape, gpu_type: str, tensor_parallel: int, work: Workload) -> EngineSpeed:
    gpu = GPUS[gpu_type]
    fit = fit_engine(model, gpu_type, gpu, tensor_parallel, work, EFF)
    if isinstance(fit, Misfit):
        raise SystemExit(f"{model.name}: {fit.shape}: {fit.reason}")
    return EngineSpeed(model=model, gpu=gpu, tensor_parallel=tensor_parallel, fit=fit, work=work, eff=EFF)


def train_s(model: ModelShape, gpu_type: str, gpus: int, work: Workload, forwards: int) -> float:
    """Compute alone, and `forwards` passes more: these learners do not shard as ours does."""
    gpu = GPUS[gpu_type]
    fit = learner_memory(model, "bfloat16", gpus, work.tokens_per_microbatch, 0.0)
    entry = ClusterEntry(gpu_type=gpu_type, gpus_per_node=8, nodes=max(1, gpus // 8))
    time = learner_time(model, entry, gpu, gpus, fit, work, EFF, wire_dtype="bfloat16", across_nodes=gpus > 8)
    extra = forwards * train_flops(model, work) / 3 / (gpus * gpu.flops_per_s * EFF.train_compute)
    return time.compute_s + extra


def steps(shapes: dict[str, ModelShape]) -> list[dict[str, Any]]:
    rows = []
    for name, mode, rollouts, longest, sequence, generation, learner, tp, seconds in STEPS:
        model, answer = shapes[name], sequence - NEMO_PROMPT_TOKENS
        work = work_of(rollouts, 32, NEMO_PROMPT_TOKENS, answer, longest - NEMO_PROMPT_TOKENS)
        speed, engines = engine(model, "H100", tp, work), generation // tp
        each = rollouts / engines
        generate = speed.batch_s(each, speed.fit.most_slots)
        train = train_s(model, "H100", learner, work, 2)
        if "step off" in mode:
            # With one batch of prompts ahead as many rollouts are under way as a step has.
            generate = each / speed.rollouts_per_s(min(each, speed.fit.most_slots))
        total = max(generate, train) if "step off" in mode else generate + train
        rows.append(
            row(f"{name}, {mode}, {learner} GPUs learn", total, seconds, generate=generate, train=train)
        )
    return rows


def lengths(model: ModelShape) -> tuple[float, list[dict[str, Any]]]:
    """The mean answer that makes the update of the first row take as long as published, and what follows."""
    low, high = 10.0, 28672.0
    for _ in range(60):
        mean = (low + high) / 2
        work = work_of(8192, 16, 200, mean, 28672)
        low, high = (mean, high) if train_s(model, "H20", 32, work, 0) < VERL[0][3] else (low, mean)
    work = work_of(8192, 16, 200, low, 28672)
    speed, rows = engine(model, "H20", 1, work), []
    for gpus, generation, logprobs, update in VERL:
        generate = speed.batch_s(8192 / gpus, speed.fit.most_slots)
        forward = train_flops(model, work) / 3 / (gpus * GPUS["H20"].flops_per_s * EFF.train_compute)
        rows.append(row(f"{gpus} GPUs, generation", generate, generation))
        rows.append(row(f"{gpus} GPUs, old logprobs", forward, logprobs))
        rows.append(row(f"{gpus} GPUs, update", train_s(model, "H20", gpus, work, 0), update))
    return low, rows


def publish() -> list[dict[str, Any]]:
    return [
        row(f"{system}, {model}", 2e9 * parameters / (link * EFF.link), seconds)
        for system, model, parameters, link, seconds in PUBLISH
    ]


def row(what: str, predicted: float, published: float, **parts: float) -> dict[str, Any]:
    return {
        "what": what,
        "predicted": predicted,
        "published": published,
        "ratio": predicted / published,
        **parts,
    }


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "what" else "right")
    for each in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.2f}" for value in each.values()))
    console.print(table, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    shapes = {name: shape_of(values, name) for name, values in MODELS.items()}
    mean, verl = lengths(shapes["Qwen2.5-Math-7B"])
    tables = {
        "steps, seconds (NeMo-RL, H100)": steps(shapes),
        f"seconds (verl, 7B, H20; mean answer solved from the first update: {mean:,.0f} tokens)": verl,
        "publishing a version, seconds": publish(),
    }
    for title, rows in tables.items():
        show(title, rows, Console(width=140))
    if chosen.json:
        chosen.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
