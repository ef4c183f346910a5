"""A checkpoint of so many ranks goes on with so many others: bit for bit what was written, and the same next step.

one rank --A--> two ranks --B--> four ranks in two replicas --C--> one rank
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
from batches import Row, batch, plain, write_folder
from rank_processes import run_ranks
from safetensors.numpy import load_file

from asyncrl.learner.checkpoint_folder import newest

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

    folder, rank, ranks, address, replicas = Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], int(sys.argv[6])
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

    for action, *arguments in (line.split() for line in sys.argv[7].split(";")):
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
    random = np.random.default_rng(0)
    write_folder(folder, **{f"batch-{index}": batch(random, 4, _answer) for index in range(4)})
    return folder


def _answer(random: np.random.Generator, group: int, number: int) -> Row:
    return plain(random, 3 * group + number)


def _run(folder: Path, ranks: int, actions: str, *, replicas: int = 1, killed: bool = False) -> None:
    """`killed`: the last rank is to die by SIGKILL."""
    out = folder / f"run-{len(list(folder.glob('run-*')))}"
    died = ranks - 1 if killed else None
    run_ranks(RANK, folder, out, ranks, str(replicas), actions, groups=1, died=died)


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
