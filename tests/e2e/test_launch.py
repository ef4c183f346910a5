"""The whole system, launched as a user does: Ray, buffer, engines, learner, weight sync, summary, and a clean end."""

import re
import stat
import time

import pyarrow.compute as pc
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.buffer.reading import read_log
from tests.e2e.runs import VLLM, launched, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def check_sound(summary, steps):
    assert summary["outcome"] == "finished" and summary["steps_done"] == steps
    assert summary["versions_published"] == steps
    assert summary["conservation"]["holds"] and summary["rollouts_trained"] == steps * 16
    assert summary["tokens_past_bound"] == 0 and summary["tokens_trained"] > 0


@pytest.mark.vllm
def test_a_run_on_real_vllm(tmp_path, model):
    (tmp_path / "brevity.py").write_text(
        "def reward(answer_text, payload):\n    return 1 / (1 + len(answer_text))\n"
    )
    own_reward = 'rewards.terms=[{ function = "brevity:reward" }]'  # a random model's sums are all wrong
    with launched(tmp_path, model, *VLLM, "weight_sync.verify=always", "run.steps=6", own_reward) as run:
        run.wait_for_step()
        children = run.descendants()
        assert run.end() == 0, run.text
        assert run.left_over(children) == []
    check_sound(run.summary, steps=6)
    mismatch = run.summary["mismatch"]
    assert mismatch["tokens"] > 0 and mismatch["max"] <= 1e-3
    assert run.summary["rollouts_over_versions"] > 0
    assert run.summary["held_out_before"]["version"] == 0 and run.summary["held_out_after"]["version"] == 6
    assert (run.folder / "report.png").stat().st_size > 10_000
    trained = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    before = AutoModelForCausalLM.from_pretrained(model)
    assert any((a != b).any() for a, b in zip(trained.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(run.folder / "model").decode([1, 2]) is not None
    check_log(run.folder / "rollouts", steps=6)


def check_log(folder, steps):
    """What lies on disk agrees with what was trained."""
    log = read_log(folder)
    trained = log.states.filter(pc.equal(log.states["state"], "TRAINED"))["rollout_id"].to_pylist()
    assert len(set(trained)) == len(trained) == steps * 16
    assert set(trained) <= set(log.segments["rollout_id"].to_pylist())
    assert max(log.segments["version"].to_pylist()) >= 1


def test_two_learner_ranks_two_engines_and_wandb(tmp_path, model):
    with launched(tmp_path, model, "learner.ranks=2", "telemetry.wandb=offline") as run:
        run.wait_for_step()
        children = run.descendants()
        assert run.end() == 0, run.text
        assert run.left_over(children) == []
    check_sound(run.summary, steps=3)
    assert list(run.folder.glob("wandb/offline-run-*/*.wandb"))


def test_ctrl_c_ends_cleanly_and_keeps_what_was_learned(tmp_path, model):
    with launched(tmp_path, model, "run.steps=100000", "evaluation.source=") as run:
        run.wait_for_step()
        children = run.descendants()
        began = time.monotonic()
        run.interrupt()
        assert run.end(30) == 130, run.text
        assert time.monotonic() - began < 15
        assert run.left_over(children) == []
    assert run.summary["outcome"] == "stopped" and run.summary["conservation"]["holds"]
    assert (run.folder / "model" / "config.json").is_file()


def test_a_second_ctrl_c_ends_at_once(tmp_path, model):
    with launched(tmp_path, model, "run.steps=100000", "evaluation.source=") as run:
        run.wait_for_step()
        children = run.descendants()
        run.interrupt()
        time.sleep(0.3)
        began = time.monotonic()
        run.interrupt()
        assert run.end(30) == 130, run.text
        assert time.monotonic() - began < 5
        assert run.left_over(children) == []


def test_the_death_of_the_learner_ends_the_run_and_names_it(tmp_path, model):
    with launched(tmp_path, model, "run.steps=100000", "evaluation.source=") as run:
        run.wait_for_step()
        children = run.descendants()
        began = time.monotonic()
        run.part("LearnerPart").kill()
        assert run.end(60) == 1, run.text
        assert time.monotonic() - began < 45
        assert run.left_over(children) == []
    outcome = run.summary["outcome"]
    assert outcome.startswith("failed: ") and "learner-0" in outcome


@pytest.mark.parametrize("shards", [1, 2])
def test_a_run_outlives_the_death_of_its_buffer(tmp_path, model, shards):
    with launched(tmp_path, model, "run.steps=12", f"buffer.shards={shards}") as run:
        run.wait_for_step()
        for deaths in (1, 2):
            run.part("BufferPart.run").kill()
            run.wait_for(r"^note +buffer shard \d died; recovered [\d,]+ rollouts", times=deaths)
        children = run.descendants()
        assert run.end(180) == 0, run.text
        assert run.left_over(children) == []
    check_sound(run.summary, steps=12)
    assert run.summary["buffer"]["recoveries"] == 2
    check_log(run.folder / "rollouts", steps=12)
    assert stat.S_IMODE((run.folder / "keys").stat().st_mode) == 0o700


def test_a_buffer_that_cannot_read_its_log_back_ends_the_run_with_its_traceback(tmp_path, model):
    with launched(tmp_path, model, "run.steps=100000", "evaluation.source=") as run:
        run.wait_for_step()
        # What the disk spoiled is found when the next process reads it back.
        for base in (run.folder / "rollouts" / "0").glob("base-*.msgpack"):
            base.write_bytes(base.read_bytes()[:-1])
        run.part("BufferPart.run").kill()
        assert run.end(60) == 1, run.text
    assert run.summary["outcome"].startswith("failed: buffer-0 failed")
    assert "LogDamaged" in run.text and "recovery.py" in run.text


def test_a_fault_that_comes_again_after_a_restore_ends_the_run_with_its_traceback(tmp_path, model):
    # A fake engine gives every rollout of a prompt the same answer; only chance makes their rewards differ.
    dice = "import random\n\ndef reward(answer_text, payload):\n    return random.random()\n"
    (tmp_path / "dice.py").write_text(dice)
    changes = (
        "learner.learning_rate=1e30",
        "learner.on_fault=restore",
        "learner.max_restores=1",
        'rewards.terms=[{ function = "dice:reward" }]',
        "evaluation.source=",
    )
    with launched(tmp_path, model, "run.steps=50", *changes) as run:
        assert run.end(180) == 1, run.text
    outcome = run.summary["outcome"]
    assert outcome.startswith("failed: learner-0 failed: NonFinite") and "learner fault: " in outcome
    assert re.search(r"rollouts \d+ \(versions 0-0\)", outcome) and "restored 1 times" in outcome
    assert run.text.count("the run goes on from step 0") == 1
    assert "step.py" in run.text  # the traceback, not only the message
    faults = re.findall(
        r"^after step (\d): learner-0", (run.folder / "logs" / "faults.log").read_text(), re.M
    )
    assert len(faults) == 2 and len(set(faults)) == 1


def test_nothing_outlives_a_killed_launcher(tmp_path, model):
    with launched(tmp_path, model, "run.steps=100000", "evaluation.source=", *VLLM) as run:
        run.wait_for_step()
        children = run.descendants()
        run.tree.kill()
        run.end(10)
        assert run.left_over(children, grace_s=45) == []
