"""Runs that go on from a checkpoint: to the same weights, bit for bit, and after faults of the learner in the same launch."""

import contextlib
import random
import time

import psutil
import pyarrow.compute as pc
import pytest

from asyncrl.buffer.reading import read_log
from tests.e2e.runs import VLLM, launched, tiny_model

EXACT = (
    *VLLM,
    "run.deterministic=true",
    "run.steps=8",
    "staleness.max_staleness_versions=0",
    "pools.0.concurrency=1",
    "pools.0.max_concurrency=1",
    "weight_sync.prefix_cache=false",
    "checkpoints.every_steps=2",
    "prompts.rollouts_per_prompt=2",
    "sampling.max_new_tokens=24",
    "evaluation.source=",
    "learner.learning_rate=1e-2",
    'rewards.terms=[{ function = "brevity:reward" }]',
)
BREVITY = "def reward(answer_text, payload):\n    return 1 / (1 + len(answer_text))\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def folder_of(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "brevity.py").write_text(BREVITY)
    return folder


def answers(run):
    """What was trained, in the order in which it was: (prompt, tokens)."""
    log = read_log(run.folder / "rollouts")
    tokens = {}
    for row in log.segments.select(["rollout_id", "start", "tokens"]).to_pylist():
        answer = tokens.setdefault(row["rollout_id"], [])
        assert row["start"] == len(answer)
        answer += row["tokens"]
    prompts = {row["group_id"]: row["prompt_id"] for row in log.prompts.to_pylist()}
    trained = log.states.filter(pc.equal(log.states["state"], "TRAINED")).to_pylist()
    return [(prompts[row["group_id"]], tokens[row["rollout_id"]]) for row in trained]


@pytest.mark.vllm
def test_a_deterministic_run_that_is_killed_ends_with_the_same_weights(tmp_path, model):
    whole, cut = folder_of(tmp_path, "whole"), folder_of(tmp_path, "cut")
    with launched(whole, model, *EXACT) as uninterrupted:
        assert uninterrupted.end(240) == 0, uninterrupted.text
    with launched(cut, model, *EXACT) as run:
        run.wait_for(r"^step +[3-5]/")
        time.sleep(random.uniform(0.0, 0.5))
        run.kill()
        assert not (run.folder / "model").exists()
        with launched(cut, model, start="resume") as again:
            assert again.end(240) == 0, again.text
    assert "goes on from step" in again.text
    assert answers(again) == answers(uninterrupted) and len(answers(again)) == 8 * 8
    weights = [(r.folder / "model" / "model.safetensors").read_bytes() for r in (uninterrupted, again)]
    assert weights[0] == weights[1] != (model / "model.safetensors").read_bytes()


def kill_in_a_step(run):
    """A rank of the learner, while it trains: Ray names a process by what it does."""

    def killed():
        for process in run.descendants():
            with contextlib.suppress(psutil.Error):
                if "LearnerPart.train" in " ".join(process.cmdline()):
                    process.kill()
                    return True
        return False

    run.wait_until(killed, timeout_s=30, every_s=0.01)


def test_a_run_whose_learner_dies_goes_on_from_its_last_checkpoint(tmp_path, model):
    changes = (
        "learner.on_fault=restore",
        "learner.ranks=2",
        "checkpoints.every_steps=2",
        "evaluation.source=",
    )
    with launched(tmp_path, model, "run.steps=25", "pools.0.fake.step_s=0.01", *changes) as run:
        run.wait_for(r"^step +[4-9]/")
        kill_in_a_step(run)
        run.wait_for(
            r"^note +learner-\d failed: .* it was training batch \d+ .*; the run goes on from step \d+$"
        )
        assert run.end(180) == 0, run.text
    assert run.summary["outcome"] == "finished" and run.summary["steps_done"] == 25
    assert run.summary["conservation"]["holds"] and run.summary["rollouts_trained"] == 25 * 16
    trained = read_log(run.folder / "rollouts").states
    trained = trained.filter(pc.equal(trained["state"], "TRAINED"))["rollout_id"].to_pylist()
    assert len(set(trained)) == len(trained) == 25 * 16
    assert "it was training batch" in (run.folder / "logs" / "faults.log").read_text()
