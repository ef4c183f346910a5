"""A checkpoint of so many ranks goes on with so many others: bit for bit what was written, and the same next step.

one rank --A--> two ranks --B--> four ranks in two replicas --C--> one rank
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.checkpoint_folder import newest
from asyncrl.learner.tiny_model import character_tokenizer, new_model

DEADLINE_S = 250
TOLERANCE = 1e-5

RANK = textwrap.dedent(
    """
    import os, signal, sys, types
    from pathlib import Path
    import pyarrow as pa, torch
    from safetensors.torch import save_file
    from asyncrl.learner import checkpoint
    from asyncrl.learner.config import LearnerConfig
    from asyncrl.learner.objective_config import PPO
    from asyncrl.learner.sharding_config import ShardingConfig
    from asyncrl.learner.step import Learner

    folder, rank, ranks, address, replicas = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
    learner = Learner(
        LearnerConfig(
            device="cpu", ranks=ranks, learning_rate=3e-4, minibatches_per_step=2, tokens_per_microbatch=120,
            objective=PPO(), sharding=ShardingConfig(replicas=replicas), start_timeout_s=60, step_timeout_s=60,
        ),
        folder, 0.9, rank, ranks, address,
    )
    whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def dump(name):
        state = {}
        for which, one in learner.trained.items():
            for of, parameter in one.parameters.items():
                state[f"{which}/{of}"] = whole(parameter.detach()).clone()
                state.update({f"{which}/{of}/{k}": whole(v).clone() for k, v in one.optimizer.state[parameter].items()})
        if rank == 0:
            save_file(state, str(folder / name))

    def train(name):
        learner.train(pa.ipc.open_file(str(folder / name)).read_all() if rank == 0 else None, 4)

    def write(name):
        learner.checkpoint(folder / name)
        assert learner.checkpoint_finished(60) == folder / name

    def die_while_writing(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    for action, *arguments in (line.split() for line in sys.argv[6].split(";")):
        if action == "restore":
            learner.restore(folder / arguments[0])
        elif action == "killed":  # the last rank dies in the middle of a checkpoint
            if rank == ranks - 1:
                checkpoint.write_shards = die_while_writing
            learner.checkpoint(folder / arguments[0])
            try:
                learner.checkpoint_finished(60)
            except checkpoint.CheckpointFailed as error:
                (folder / f"error-{rank}").write_text(str(error))
        else:
            {"dump": dump, "train": train, "write": write}[action](*arguments)
    os._exit(0)  # as test_learner_ranks says
    """
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    new_model(tokenizer, hidden_size=64, layers=2, heads=2, max_tokens=128, seed=3).save_pretrained(folder)
    random = np.random.default_rng(0)
    for index in range(4):
        with pa.ipc.new_file(str(folder / f"batch-{index}"), BATCH) as writer:
            writer.write_table(_table(random, groups=4))
    return folder


def _table(random: np.random.Generator, groups: int) -> pa.Table:
    rows: list[dict[str, object]] = []
    for group in range(groups):
        prompt = random.integers(0, 13, random.integers(2, 9)).tolist()
        for _ in range(3):
            size = int(random.integers(2, 30))
            rows.append(
                {
                    "rollout_id": len(rows),
                    "group_id": group,
                    "prompt_tokens": prompt,
                    "tokens": random.integers(0, 13, size).tolist(),
                    "logprobs": random.normal(-2.7, 0.3, size).tolist(),
                    "versions": random.integers(2, 5, size).tolist(),
                    "trainable": [True, *(random.random(size - 1) > 0.2).tolist()],
                    "reward": float(len(rows) % 3 == 0),
                    "finish_reason": "stop",
                    "greedy": False,
                    "cost": 0.0,
                }
            )
    return pa.Table.from_pylist(rows, schema=BATCH)


def _run(folder: Path, ranks: int, actions: str, *, replicas: int = 1, killed: bool = False) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), str(ranks), address, str(replicas), actions],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for rank, process in enumerate(processes):
            _, errors = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == (-9 if killed and rank == ranks - 1 else 0), errors[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=10)


def _same(folder: Path, one: str, other: str, tolerance: float = 0.0) -> None:
    ours, theirs = load_file(folder / one), load_file(folder / other)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name in ours:
        if tolerance:
            np.testing.assert_allclose(ours[name], theirs[name], atol=tolerance, rtol=0, err_msg=name)
        else:
            assert np.array_equal(ours[name], theirs[name]), name


def test_a_checkpoint_goes_on_with_another_number_of_ranks(folder: Path) -> None:
    a, b, c = "checkpoints/step-2", "checkpoints/step-3", "checkpoints/step-4"
    _run(folder, 1, f"train batch-0;train batch-1;write {a};dump a;train batch-2;dump b-of-1")
    _run(
        folder,
        2,
        f"restore {a};dump a-on-2;train batch-2;write {b};dump b;train batch-3;dump c-of-2;killed checkpoints/step-5",
        killed=True,
    )
    _same(folder, "a-on-2", "a")
    _same(folder, "b", "b-of-1", TOLERANCE)
    # The rank that died left nothing that counts, and the other one knows.
    assert newest(folder / "checkpoints") == folder / b
    assert "step-5 was not written" in (folder / "error-0").read_text()
    _run(folder, 4, f"restore {b};dump b-on-4;train batch-3;write {c};dump c", replicas=2)
    _same(folder, "b-on-4", "b")
    _same(folder, "c", "c-of-2", TOLERANCE)
    _run(folder, 1, f"restore {b};dump b-on-1;restore {c};dump c-on-1")
    _same(folder, "b-on-1", "b")
    _same(folder, "c-on-1", "c")
    files = sorted(path.name for path in (folder / c).iterdir())
    assert files == ["checkpoint.json", *(f"rank-0000{rank}.safetensors" for rank in range(4))]
    # Replicas write nothing twice.
    sizes = [sum(path.stat().st_size for path in (folder / name).glob("*.safetensors")) for name in (b, c)]
    assert sizes[1] < 1.1 * sizes[0]
