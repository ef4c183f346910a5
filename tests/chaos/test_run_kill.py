"""A whole run that is killed, stopped and resumed again and again: every prompt is admitted once and in order, and trained once."""

import itertools
import random
import time
from collections import Counter

import msgspec
import pyarrow.compute as pc
import pytest
from transformers import AutoTokenizer

from asyncrl.buffer.reading import read_log
from asyncrl.generators.prompts import Frontier, open_source
from asyncrl.runtime.facts import StepFacts
from asyncrl.runtime.metrics import read_facts
from asyncrl.runtime.run_folder import RunFolder
from tests.e2e.runs import launched, tiny_model

STEPS = 60
SETTINGS = (
    f"run.steps={STEPS}",
    "evaluation.source=",
    "checkpoints.every_steps=3",
    "pools.0.fake.step_s=0.01",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def go_on_for(run, chance):
    """Until a step of this start is done, and a random while longer."""
    run.wait_for_step()
    time.sleep(chance.uniform(0.0, 1.5))
    assert run.process.poll() is None, run.text


def test_a_run_that_is_killed_and_resumed_again_and_again_trains_every_prompt_once(tmp_path, model):
    chance = random.Random(time.time_ns())
    with launched(tmp_path, model, *SETTINGS) as run:
        go_on_for(run, chance)
        run.kill()
        with launched(tmp_path, model, "learner.ranks=2", start="resume") as again:
            again.wait_for_step()
            again.command("pause")
            again.wait_until(lambda: again.status()["snapshot"]["state"] == "paused", timeout_s=20)
            again.command("continue")
            again.command("resume", expect=1)  # it is up
            again.command("stop")
            assert again.end(60) == 130, again.text
            assert again.summary["outcome"] == "stopped" and again.summary["conservation"]["holds"]
        with launched(tmp_path, model, *SETTINGS, start="launch --resume") as again:
            go_on_for(again, chance)
            again.kill()
            with launched(tmp_path, model, start="resume") as last:
                assert last.end(180) == 0, last.text
    assert last.summary["outcome"] == "finished" and last.summary["steps_done"] == STEPS
    assert last.summary["conservation"]["holds"] and last.summary["rollouts_trained"] == STEPS * 16
    assert last.summary["tokens_past_bound"] == 0
    check_prompts(RunFolder(last.folder), model)
    check_metrics(RunFolder(last.folder))


def check_prompts(folder, model):
    """As in a run that was never interrupted: what it admits is the walk from its beginning on."""
    log = read_log(folder.rollouts)
    admitted = [(row["position"], row["prompt_id"]) for row in log.prompts.to_pylist()]
    walk = Frontier(open_source(folder.read_recipe().prompts, AutoTokenizer.from_pretrained(model)), seed=0)
    assert admitted == [(i, prompt.prompt_id) for i, prompt in enumerate(walk.take(len(admitted)))]
    states = log.states.filter(pc.equal(log.states["state"], "TRAINED")).to_pylist()
    assert len({row["rollout_id"] for row in states}) == len(states) == STEPS * 16
    rollouts_of = Counter(row["group_id"] for row in states)
    assert set(rollouts_of.values()) == {4} and len(rollouts_of) == STEPS * 4
    # With a bound of K = 2 versions, three steps' prompts are under way at most: those before them are all trained.
    prompt_of = {row["group_id"]: row["position"] for row in log.prompts.to_pylist()}
    trained = sorted(prompt_of[group] for group in rollouts_of)
    assert trained[: 4 * (STEPS - 2)] == list(range(4 * (STEPS - 2)))


def check_metrics(folder):
    """Steps are counted on, and time as well; what was done twice is there twice, and nothing is left out."""
    facts = list(read_facts(folder.metrics))
    steps = [fact.step for fact in facts if isinstance(fact, StepFacts)]
    assert set(steps) == set(range(1, STEPS + 1))
    backwards = [(a, b) for a, b in itertools.pairwise(steps) if b != a + 1]
    assert len(backwards) <= 3 and all(b <= a + 1 for a, b in backwards)
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(facts))
    stalls = [fact.checkpoint_stall_s for fact in facts if isinstance(fact, StepFacts)]
    # One may be of the step that the stop cut short.
    assert sum(stall > 0 for stall in stalls) >= STEPS // 3 - 1
    checkpoints = sorted(path.parent.name for path in folder.checkpoints.glob("*/run.json"))
    assert checkpoints == [f"step-{STEPS - 3}", f"step-{STEPS}"]
    newest = msgspec.json.decode((folder.checkpoints / f"step-{STEPS}" / "run.json").read_bytes())
    assert newest["version"] == STEPS
