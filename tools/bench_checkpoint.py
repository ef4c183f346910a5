"""Checkpoints of one learner rank against `torch.save` of the same state while training stands still, in one run.

    python tools/bench_checkpoint.py --mb 200 --json out.json

`stall` is how long training stands still, `written_alone` how long it takes until a checkpoint is whole, on the disk, under its
name, with nothing beside it. Steps are measured alone and from the moment on at which a checkpoint begins to be written;
`unfinished_after_a_step` counts those that took longer than the step. The first one allocates the copy on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.checkpoint_folder import check
from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.step import Learner
from asyncrl.learner.tiny_model import character_tokenizer, new_model

ALPHABET = "0123456789+=;"
STATES_PER_WEIGHT = 3
"""The master and AdamW's two moments."""
WAIT_S = 600.0


def write_base(folder: Path, megabytes: int) -> None:
    """A model whose checkpoints are about that large."""
    tokenizer = character_tokenizer(ALPHABET)
    hidden = 512
    per_layer = 4 * hidden**2 + 6 * hidden**2  # attention; the feed-forward is twice as wide
    layers = max(1, round(megabytes * 1e6 / (4 * STATES_PER_WEIGHT * per_layer)))
    model = new_model(tokenizer, hidden_size=hidden, layers=layers, heads=8, max_tokens=512, seed=0)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def table(rollouts: int, tokens: int) -> pa.Table:
    random = np.random.default_rng(0)
    rows = [
        {
            "rollout_id": index,
            "group_id": index // 4,
            "prompt_tokens": random.integers(0, 13, 16).tolist(),
            "tokens": random.integers(0, 13, tokens).tolist(),
            "logprobs": random.normal(-2.7, 0.3, tokens).tolist(),
            "versions": [0] * tokens,
            "trainable": [True] * tokens,
            "reward": float(index % 2),
            "finish_reason": "stop",
            "cost": 0.0,
            "greedy": False,
        }
        for index in range(rollouts)
    ]
    return pa.Table.from_pylist(rows, schema=BATCH)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def standing_still(learner: Learner, path: Path) -> float:
    """`torch.save` of weights and optimizer, to the disk."""
    one = learner.trained["policy"]

    def save() -> None:
        weights = {name: parameter.detach() for name, parameter in one.parameters.items()}
        with path.open("wb") as file:
            torch.save({"weights": weights, "optimizer": one.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())

    return seconds(save)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    write_base(folder / "base", args.mb)
    config = LearnerConfig(device="cpu", cores=args.threads, learning_rate=1e-5)
    learner = Learner(config, folder / "base", 1.0)
    batch = table(args.rollouts, args.tokens)
    learner.train(batch, 0)
    alone = [seconds(lambda: learner.train(batch, 0)) for _ in range(args.rounds)]
    stalls, beside, saved, unfinished = [], [], [], 0
    for index in range(args.rounds + 1):
        path = folder / f"step-{index}"
        stalls.append(seconds(lambda path=path: learner.checkpoint(path)))
        beside.append(seconds(lambda: learner.train(batch, 0)))
        unfinished += not path.exists()
        learner.checkpoint_finished(WAIT_S)
        saved.append(standing_still(learner, folder / f"saved-{index}"))
    # Nothing runs beside this one: how fast the writing itself is.
    quiet = seconds(lambda: (learner.checkpoint(folder / "step-900"), learner.checkpoint_finished(WAIT_S)))
    checked = seconds(lambda: check(folder / "step-900"))
    restored = seconds(lambda: learner.restore(folder / "step-900"))
    learner.close()
    size = sum(path.stat().st_size for path in (folder / "step-900").iterdir())
    middle = statistics.median
    return {
        "state_mb": round(size / 1e6, 1),
        "stall_first_s": round(stalls[0], 4),
        "stall_s": round(middle(stalls[1:]), 4),
        "written_alone_s": round(quiet, 3),
        "step_alone_s": round(middle(alone), 3),
        "step_while_writing_s": round(middle(beside[1:]), 3),
        "unfinished_after_a_step": unfinished,
        "torch_save_s": round(middle(saved[1:]), 3),
        "stall_over_torch_save": round(middle(stalls[1:]) / middle(saved[1:]), 4),
        "check_s": round(checked, 3),
        "restore_s": round(restored, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=200, help="of a checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="measured, after one that is not")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200, help="of each rollout's answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is to be measured; default: a temporary one"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-checkpoint-") as folder:
        result = measure(args, Path(folder))
    for name, value in result.items():
        print(f"{name:>26}  {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
