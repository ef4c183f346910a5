"""Adapters on two gloo ranks: the gradients, the merged weights and the base of one rank; in 4 bits the base is shared out, too."""

from __future__ import annotations

import textwrap
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from batches import Row, batch, write_folder
from rank_processes import run_ranks
from safetensors.torch import load_file

TOLERANCE = 1e-5
LORAS = ('{"rank": 3}', '{"rank": 3, "quantise": "nf4"}', '{"rank": 3, "sync": "adapter"}')

RANK = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import msgspec, pyarrow as pa, torch
    from safetensors.torch import save_file
    from asyncrl.learner.config import LearnerConfig
    from asyncrl.learner.lora_config import LoraConfig
    from asyncrl.learner.step import Learner
    from gathered import gathered

    folder, out, rank, ranks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    tensors, facts = {}, []
    for index, (address, text) in enumerate(zip(sys.argv[5].split(","), sys.argv[6:], strict=True)):
        config = LearnerConfig(
            device="cpu", ranks=ranks, max_grad_norm=1e9, minibatches_per_step=2, tokens_per_microbatch=60,
            lora=msgspec.json.decode(text, type=LoraConfig), learning_rate=0.1, start_timeout_s=60, step_timeout_s=60,
        )
        learner = Learner(config, folder, 0.9, rank, ranks, address)
        policy = learner.trained["policy"]
        policy.optimizer = torch.optim.SGD(policy.parameters.values(), lr=0.1)  # so that changes are gradients
        with policy.module.adapters_off():
            base = learner.logprobs([3, 10, 4, 11, 7])
        for step in range(2):
            table = pa.ipc.open_file(str(Path(folder) / f"batch-{step}")).read_all() if rank == 0 else None
            learner.train(table, 4 if rank == 0 else -1)
        tensors.update({f"{index}/sent/{n}": t for n, t in gathered(learner, learner.plan(20_000)).items()})
        tensors.update({f"{index}/trained/{n}": p.detach().full_tensor() for n, p in policy.parameters.items()})
        learner.save(out / f"model-{index}")
        held = sum(p.to_local().untyped_storage().nbytes() for p in policy.module.parameters() if not p.requires_grad)
        facts.append((base, learner.logprobs([3, 10, 4, 11, 7]), held))
        learner.close()
    save_file(tensors, str(out / f"weights-{rank}"))
    (out / f"facts-{rank}").write_bytes(msgspec.json.encode(facts))
    os._exit(0)  # past a thread of torch's that can abort the process on the way out of the interpreter
    """
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    random = np.random.default_rng(0)
    # With one group, a minibatch leaves the second rank nothing to do.
    write_folder(
        folder, **{f"batch-{step}": batch(random, groups, _answer) for step, groups in enumerate((5, 1))}
    )
    return folder


def _answer(random: np.random.Generator, group: int, number: int) -> Row:
    size = int(random.integers(1, 20))
    return {
        "tokens": random.integers(0, 13, size).tolist(),
        "logprobs": random.normal(-2.7, 0.3, size).tolist(),
        "versions": np.sort(random.integers(2, 5, size)).tolist(),
        "trainable": (random.random(size) >= 0.2).tolist(),
        "reward": float(random.integers(0, 3)) / 2,
    }


def _run(folder: Path, out: Path, ranks: int) -> tuple[list[dict[str, torch.Tensor]], list[list[list]]]:
    """Tensors and facts of each rank."""
    run_ranks(RANK, folder, out, ranks, *LORAS)
    tensors = [load_file(out / f"weights-{rank}") for rank in range(ranks)]
    return tensors, [msgspec.json.decode((out / f"facts-{rank}").read_bytes()) for rank in range(ranks)]


def test_two_ranks_do_what_one_does(folder: Path, tmp_path: Path) -> None:
    (one,), (alone,) = _run(folder, tmp_path / "one", 1)
    (first, second), facts = _run(folder, tmp_path / "two", 2)
    assert set(one) == set(first)
    assert set(second) == {name for name in one if "/sent/" not in name}
    for name, tensor in one.items():
        assert name not in second or torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, atol=TOLERANCE, rtol=1e-4)
    moved = [name for name in one if "lora_B" in name and "/trained/" in name]
    assert moved and all(one[name].abs().max() > 1e-4 for name in moved)
    for (base, own, held), *others in zip(alone, *facts, strict=True):
        for other_base, other_own, other_held in others:
            assert other_base == pytest.approx(base, abs=TOLERANCE)
            assert other_own == pytest.approx(own, abs=TOLERANCE)
            assert other_held < 0.52 * held
    assert (
        alone[1][2] < 0.3 * alone[0][2]
    )  # 4 bits and a scale for 64, against 32 bits; the embedding stays as it is
    assert (tmp_path / "two" / "model-1" / "adapter" / "adapter_model.safetensors").is_file()
