"""Batches that are split in many ways, and a script for `rank_processes` that takes their gradients under given settings."""

from __future__ import annotations

import textwrap
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
from rank_processes import run_ranks
from safetensors.numpy import load_file

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.sharding_config import ShardingConfig
from asyncrl.learner.tiny_model import character_tokenizer, new_model

SCRIPT = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import msgspec, pyarrow as pa, torch
    from safetensors.torch import save_file
    from asyncrl.learner.config import LearnerConfig
    from asyncrl.learner.objective_config import GRPO
    from asyncrl.learner.step import Learner

    class Recorder(torch.optim.SGD):
        "Moves nothing, and keeps the gradients that it is given: whole, and unscaled as max_grad_norm is large."
        def step(self):
            self.seen = [p.grad.to(torch.float32).full_tensor().clone() for g in self.param_groups for p in g["params"]]

    folder, out, rank, ranks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    batches = sorted(Path(folder).glob("batch-*"))
    gradients, norms = {}, []
    for index, (address, text) in enumerate(zip(sys.argv[5].split(","), sys.argv[6:], strict=True)):
        settings = msgspec.json.decode(text)
        objective = GRPO(entropy_bonus=0.1)  # so that a group of one has a gradient
        config = msgspec.convert({
            "ranks": ranks, "max_grad_norm": 1e9, "start_timeout_s": 60, "step_timeout_s": 60,
            "tokens_per_microbatch": 120, **settings}, LearnerConfig)
        config = msgspec.structs.replace(config, objective=objective)
        learner = Learner(config, folder, 0.9, rank, ranks, address)
        policy = learner.trained["policy"]
        policy.optimizer = Recorder(policy.parameters.values(), lr=0.0)
        for batch in batches:
            metrics = learner.train(pa.ipc.open_file(str(batch)).read_all() if rank == 0 else None, 4)
            norms.append(metrics.grad_norm)
            for name, gradient in zip(policy.parameters, policy.optimizer.seen, strict=True):
                gradients[f"{index}/{batch.name}/{name}"] = gradient.cpu()
        learner.close()
    if rank == 0:
        save_file(gradients, str(out / "gradients"))
    (out / f"norms-{rank}").write_bytes(msgspec.json.encode(norms))
    os._exit(0)  # as Ray ends its workers
    """
)

SPLITS = ([1], [2], [3, 1], [1, 1, 1], [4, 4, 4, 4], [7, 2, 1, 3], [2] * 9, [16])
"""Sizes of a batch's groups. Fewer rollouts than ranks: some ranks have nothing."""


def write_cases(folder: Path) -> Path:
    """A tiny model and the batches. Returns `folder`."""
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    new_model(tokenizer, hidden_size=64, layers=2, heads=2, max_tokens=256, seed=3).save_pretrained(folder)
    for seed, sizes in enumerate(SPLITS):
        table = _table(np.random.default_rng(seed), sizes)
        with pa.ipc.new_file(str(folder / f"batch-{seed}"), table.schema) as writer:
            writer.write_table(table)
    return folder


def on_one_rank(folder: Path, out: Path) -> dict[str, np.ndarray]:
    """The gradients of the batches in `folder`, by `0/BATCH/PARAMETER`, of one rank on the CPU in passes that hold all."""
    run_ranks(SCRIPT, folder, out, 1, settings(8192))
    gradients: dict[str, np.ndarray] = load_file(out / "gradients")
    assert len(gradients) == len(SPLITS) * len({name.rpartition("/")[2] for name in gradients})
    assert min(msgspec.json.decode((out / "norms-0").read_bytes())) > 0.01
    return gradients


def _table(random: np.random.Generator, sizes: list[int]) -> pa.Table:
    rows: list[dict[str, object]] = []
    for group, size in enumerate(sizes):
        prompt = random.integers(0, 13, random.integers(2, 9)).tolist()
        for _ in range(size):
            length = int(min(200, random.lognormal(2.7, 0.9) + 1))  # past the budget of a pass at times
            trainable = (random.random(length) > 0.2).tolist()
            rows.append(
                {
                    "rollout_id": len(rows),
                    "group_id": group,
                    "prompt_tokens": prompt,
                    "tokens": random.integers(0, 13, length).tolist(),
                    "logprobs": random.normal(-2.7, 0.3, length).tolist(),
                    "versions": random.integers(2, 5, length).tolist(),
                    # Some rollouts are context as a whole.
                    "trainable": [True, *trainable[1:]]
                    if not rows or random.random() > 0.2
                    else [False] * length,
                    "reward": float(random.integers(0, 3)),
                    "cost": 0.0,
                    "greedy": False,
                    "finish_reason": "stop",
                }
            )
    return pa.Table.from_pylist(rows, schema=BATCH)


def settings(tokens_per_microbatch: int = 120, device: str = "cpu", **more: object) -> str:
    """`more`: the compute type as `dtype`, else of `[learner.sharding]`."""
    dtype = {"dtype": more.pop("dtype")} if "dtype" in more else {}
    msgspec.convert(more, ShardingConfig)  # says at once what is misspelt
    return msgspec.json.encode(
        {"device": device, "tokens_per_microbatch": tokens_per_microbatch, "sharding": more, **dtype}
    ).decode()
