"""Checkpoints of one rank: what was written comes back, training meanwhile, and what cannot be written or read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from asyncrl.learner import checkpoint as under_test
from asyncrl.learner.checkpoint import BrokenCheckpoint, CheckpointFailed, newest, whole
from asyncrl.learner.checkpoint_folder import MANIFEST, partial_of, read_manifest
from asyncrl.learner.shard_file import write_shards
from asyncrl.learner.step import Learner
from asyncrl.learner.trained import Trained

Open = Callable[..., Learner]
Tables = Callable[..., pa.Table]
WAIT_S = 60


def _state(learner: Learner) -> dict[str, torch.Tensor]:
    """All masters and optimizer states."""
    state = {}
    for name, one in learner.trained.items():
        for of, parameter in one.parameters.items():
            state[f"{name}/{of}"] = parameter.detach().full_tensor().clone()
            for key, value in one.optimizer.state.get(parameter, {}).items():
                state[f"{name}/{of}/{key}"] = (
                    value.full_tensor() if hasattr(value, "full_tensor") else value
                ).clone()
    return state


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def _write(learner: Learner, folder: Path) -> Path:
    learner.checkpoint(folder)
    assert learner.checkpoint_finished(WAIT_S) == folder
    return folder


def test_a_restored_learner_goes_on_as_the_one_before(
    learner: Open, make_table: Tables, tmp_path: Path
) -> None:
    settings = {"warmup_steps": 3, "decay_steps": 9, "minibatches_per_step": 2}
    one = learner(**settings)
    for seed in (1, 2):
        one.train(make_table(seed=seed), 4)
    folder = _write(one, tmp_path / "step-2")
    want_there, random = _state(one), torch.get_rng_state()
    torch.rand(7)
    metrics = [one.train(make_table(seed=seed), 4) for seed in (3, 4)]
    want = _state(one)

    other = learner(**settings)
    other.restore(folder)
    _same(_state(other), want_there)
    assert torch.equal(torch.get_rng_state(), random)
    for seed, before in zip((3, 4), metrics, strict=True):
        again = other.train(make_table(seed=seed), 4)
        assert (again.loss, again.grad_norm, again.learning_rate, again.optimizer_steps) == (
            before.loss,
            before.grad_norm,
            before.learning_rate,
            before.optimizer_steps,
        )
    _same(_state(other), want)
    assert other.trained["policy"].norms == one.trained["policy"].norms


def test_a_learner_may_go_back_to_its_own_checkpoint(
    learner: Open, make_table: Tables, tmp_path: Path
) -> None:
    """As after a fault. A checkpoint of before the first step has no optimizer states, and neither has what goes back to it."""
    one = learner()
    before = _state(one)
    _write(one, tmp_path / "step-0")
    one.train(make_table(), 4)
    assert len(_state(one)) == 4 * len(before)
    one.restore(tmp_path / "step-0")
    _same(_state(one), before)
    assert one.trained["policy"].steps_taken == 0


def test_all_that_is_trained_comes_back(learner: Open, make_table: Tables, tmp_path: Path) -> None:
    from asyncrl.learner.objective_config import PPO

    one = learner(objective=PPO())
    one.train(make_table(), 4)
    want = _state(one)
    assert {name.split("/")[0] for name in want} == {"policy", "critic"}
    _write(one, tmp_path / "step-1")
    other = learner(objective=PPO())
    other.restore(tmp_path / "step-1")
    _same(_state(other), want)
    assert other.trained["critic"].steps_taken == one.trained["critic"].steps_taken > 0
    with pytest.raises(BrokenCheckpoint, match="has policy, critic, the recipe trains policy"):
        learner().restore(tmp_path / "step-1")


def test_training_goes_on_while_it_is_written(
    learner: Open, make_table: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is held up until a step was taken; the checkpoint has the state of before it."""
    one = learner()
    one.train(make_table(seed=1), 4)
    want, trained = _state(one), threading.Event()

    def after_the_step(*arguments: object) -> object:
        assert trained.wait(WAIT_S)
        return write_shards(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(under_test, "write_shards", after_the_step)
    one.checkpoint(tmp_path / "step-1")
    one.train(make_table(seed=2), 4)
    assert one.checkpoint_finished(0.0) is None
    assert not whole(tmp_path / "step-1") and newest(tmp_path) is None
    trained.set()
    assert one.checkpoint_finished(WAIT_S) == tmp_path / "step-1" == newest(tmp_path)
    later = _state(one)
    assert not torch.equal(later["policy/model.norm.weight"], want["policy/model.norm.weight"])
    one.restore(tmp_path / "step-1")
    _same(_state(one), want)


def test_the_next_one_waits_and_takes_its_own_state(
    learner: Open, make_table: Tables, tmp_path: Path
) -> None:
    """The copy on the host is used again, and only when it was written."""
    one, wants = learner(), []
    for step in range(4):
        one.train(make_table(seed=step), 4)
        one.checkpoint(tmp_path / f"step-{step}")
        wants.append(_state(one))
    assert one.checkpoint_finished(WAIT_S) == tmp_path / "step-3"
    for step, want in enumerate(wants):
        one.restore(tmp_path / f"step-{step}")
        _same(_state(one), want)


def test_a_folder_that_is_there_is_never_overwritten(learner: Open, tmp_path: Path) -> None:
    one = learner()
    _write(one, tmp_path / "step-1")
    with pytest.raises(CheckpointFailed, match=r"step-1 is there already; a checkpoint is never overwritten"):
        one.checkpoint(tmp_path / "step-1")
    assert whole(tmp_path / "step-1")


def test_a_disk_that_fails_is_told_once_and_the_next_one_may_do(
    learner: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write into a full disk: there is nothing of that name then, and nothing left beside it."""
    one = learner()
    _write(one, tmp_path / "step-1")

    def full(path: Path, shards: object) -> None:
        with open("/dev/full", "wb", buffering=0) as disk:
            disk.write(b"0")

    with monkeypatch.context() as patched:
        patched.setattr(under_test, "write_shards", full)
        one.checkpoint(tmp_path / "step-2")
        with pytest.raises(CheckpointFailed, match=r"step-2 was not written: .*No space left"):
            one.checkpoint_finished(WAIT_S)
    assert os.listdir(tmp_path) == ["step-1"]
    assert one.checkpoint_finished(0.0) == tmp_path / "step-1"
    _write(one, tmp_path / "step-3")
    assert newest(tmp_path) == tmp_path / "step-3"


def test_what_a_dead_writer_left_is_removed(learner: Open, tmp_path: Path) -> None:
    left = partial_of(tmp_path / "step-7")
    left.mkdir(parents=True)
    (left / "rank-00000.safetensors").write_bytes(b"half")
    _write(learner(), tmp_path / "step-8")
    assert os.listdir(tmp_path) == ["step-8"]


def test_nothing_changes_when_a_broken_one_is_restored(
    learner: Open, make_table: Tables, tmp_path: Path
) -> None:
    one = learner()
    one.train(make_table(), 4)
    folder = _write(one, tmp_path / "step-1")
    one.train(make_table(seed=1), 4)
    want = _state(one)
    path = folder / "rank-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BrokenCheckpoint, match=r"rank-00000.safetensors has another checksum"):
        one.restore(folder)
    _same(_state(one), want)
    assert whole(folder) and newest(tmp_path) is None  # sizes alone do not show it


def test_another_model_is_refused(learner: Open, untied_folder: Path, tmp_path: Path) -> None:
    folder = _write(learner(), tmp_path / "step-1")
    other = learner(untied_folder)
    want = _state(other)
    with pytest.raises(BrokenCheckpoint, match=r"only one of them has lm_head.weight"):
        other.restore(folder)
    _same(_state(other), want)


def test_nothing_in_a_checkpoint_is_pickled(learner: Open, make_table: Tables, tmp_path: Path) -> None:
    one = learner()
    one.train(make_table(), 4)
    folder = _write(one, tmp_path / "step-1")
    assert sorted(os.listdir(folder)) == [MANIFEST, "rank-00000.safetensors"]
    assert read_manifest(folder).steps_taken == {"policy": 1}


def test_rates_follow_from_the_steps_that_were_taken(learner: Open) -> None:
    one: Trained = learner(learning_rate=0.01, warmup_steps=4).trained["policy"]
    one.take_up(2, [0.5])
    assert one.learning_rate == pytest.approx(0.005) and list(one.norms.recent) == [0.5]


def test_a_failed_one_is_told_by_the_next_at_the_latest(
    learner: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = learner()
    with monkeypatch.context() as patched:
        patched.setattr(under_test, "write_shards", lambda path, shards: path.open("rb"))
        one.checkpoint(tmp_path / "step-1")
        one._checkpoints._writer.submit(lambda: None).result(WAIT_S)  # after the write
    with pytest.raises(CheckpointFailed, match=r"step-1 was not written: .*No such file"):
        one.checkpoint(tmp_path / "step-2")
    _write(one, tmp_path / "step-2")
