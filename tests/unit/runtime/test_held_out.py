"""When evaluations are made, what becomes of those that fail, and what the answers come to."""

import asyncio
import functools
import math
from pathlib import Path

import msgspec
import pytest

from asyncrl.generators.evaluation import HeldOutAnswer
from asyncrl.generators.evaluation_config import EvaluationConfig
from asyncrl.generators.score import CostMissing
from asyncrl.recipes import load_recipe
from asyncrl.runtime import held_out
from asyncrl.runtime.held_out import Evaluations
from asyncrl.runtime.held_out_results import NothingScored, evaluation_of, sentence
from asyncrl.runtime.observer import Observer
from asyncrl.runtime.watch import PartFailed

ROOT = Path(__file__).resolve().parents[3]
answer = functools.partial(
    HeldOutAnswer, final="7", tokens=4, truncated=False, oldest_version=2, newest_version=2
)
RIGHT, WRONG = answer(reward=1.0), answer(reward=0.0, final="8", tokens=8)
FAILED = answer(reward=0.0, final="", failure="reward: it hung", oldest_version=-1, newest_version=-1)


def found_of(answers, **changes):
    config = EvaluationConfig(source="s", **({"rollouts_per_prompt": len(answers[0])} | changes))
    return evaluation_of(config, answers, step=3, seconds=9.0, took_s=1.5)


def test_what_answers_come_to():
    spanning = answer(reward=1.0, oldest_version=1, newest_version=3, truncated=True)
    found = found_of([[RIGHT, RIGHT, WRONG, WRONG], [RIGHT, WRONG, WRONG, WRONG], [spanning] * 4], k=[1, 4])
    assert (found.prompts, found.rollouts_per_prompt, found.step) == (3, 4, 3)
    assert (found.version, found.oldest_version, found.answers_over_versions) == (3, 1, 4)
    assert found.accuracy.value == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert found.pass_at[1] == found.accuracy  # pass@1 is the mean
    assert found.pass_at[4].value == 1.0 and found.pass_at[4].standard_error == 0.0
    assert found.maj_at[4].value == pytest.approx((0.5 + 0 + 1) / 3)
    assert found.truncated.value == pytest.approx(1 / 3) and found.tokens.value == pytest.approx(
        (6 + 7 + 4) / 3
    )
    text = sentence(found)
    assert "versions 1 to 3 (4 answers span several)" in text and "pass@4 1.000 +- 0.000" in text


def test_one_answer_each_has_no_pass_at_k_and_the_reward_decides_what_is_right():
    partly = answer(reward=0.6)
    found = found_of([[partly], [WRONG]], correct_reward=0.5)
    assert found.accuracy.value == 0.5 and found.reward.value == 0.3
    assert found.pass_at == {} and found.maj_at == {}
    assert found_of([[partly], [WRONG]]).accuracy.value == 0.0
    assert "version 2:" in sentence(found) and math.isnan(found_of([[RIGHT]]).accuracy.standard_error)


def test_answers_that_failed_count_as_wrong_and_are_told_of():
    found = found_of([[RIGHT], [FAILED]], correct_reward=-1.0)
    assert (found.accuracy.value, found.failed, found.version) == (0.5, 1, 2)
    assert "1 answers could not be scored" in sentence(found)
    with pytest.raises(NothingScored, match="all 2 held-out answers failed, the first with: reward: it hung"):
        found_of([[FAILED], [FAILED]])


# ---- when -----------------------------------------------------------------------------------------------------------


class Sink:
    """View and metrics."""

    def __init__(self):
        self.facts, self.notes = [], []

    def write(self, fact):
        self.facts.append(fact)

    def note(self, text):
        self.notes.append(text)


class Asked:
    """What the engines do: `ask` of a label waits for `answers[label]`."""

    def __init__(self, monkeypatch, **settings):
        self.answers, self.began = {}, []
        monkeypatch.setattr(held_out, "ask", self.ask)
        recipe = load_recipe(ROOT / "recipes" / "quickstart.toml", ["run.steps=10"])
        evaluation = msgspec.structs.replace(recipe.evaluation, **settings)
        self.sink = Sink()
        recipe = msgspec.structs.replace(recipe, evaluation=evaluation)
        self.observer = Observer(recipe, self.sink, self.sink, 0.0)
        self.evaluations = Evaluations(recipe, ["a prompt"], self.observer)

    async def ask(self, fleet, prompts, config, max_new_tokens, label, version):
        assert max_new_tokens == 160 and version == self.observer.version
        self.began.append(label)
        waits = self.answers.get(label)
        return [[RIGHT]] if waits is None else await waits

    @property
    def told(self):
        return [(type(fact).__name__, fact.step) for fact in self.sink.facts]


def hanging():
    return asyncio.get_running_loop().create_future()


def test_they_are_due_every_so_many_steps_and_not_at_the_last(monkeypatch):
    async def run():
        asked = Asked(monkeypatch, every_steps=3)
        await asked.evaluations.before(None, 0)
        for step in range(1, 11):
            await asked.evaluations.after_step(None, step)
            await asyncio.sleep(0)
        await asked.evaluations.settle()
        await asked.evaluations.after(None, 10)
        assert asked.told == [("Evaluation", step) for step in (0, 3, 6, 9, 10)]
        assert asked.observer._held_out.step == 10 and asked.observer._held_out.under_way_step == -1

    asyncio.run(run())


def test_none_between_where_none_is_asked_for_and_none_at_all_without_prompts(monkeypatch):
    async def run():
        asked = Asked(monkeypatch)
        for step in range(1, 11):
            await asked.evaluations.after_step(None, step)
        assert asked.began == []
        nothing = Evaluations(load_recipe(ROOT / "recipes" / "quickstart.toml", []), [], asked.observer)
        await nothing.before(None, 0)
        await nothing.after(None, 5)
        assert asked.began == [] and asked.sink.facts == [] and not nothing.wanted

    asyncio.run(run())


def test_steps_go_on_beside_one_and_the_next_one_due_is_left_out(monkeypatch):
    async def run():
        asked = Asked(monkeypatch, every_steps=2)
        asked.answers["2"] = hanging()
        for step in range(1, 6):
            await asked.evaluations.after_step(None, step)
            await asyncio.sleep(0)
        assert asked.told == [("EvaluationMissed", 4)]
        assert asked.sink.facts[0].reason == "the one before was still under way"
        assert asked.observer._held_out.under_way_step == 2
        asked.answers["2"].set_result([[WRONG]])
        await asyncio.sleep(0.01)
        await asked.evaluations.after_step(None, 6)
        await asked.evaluations.settle()
        assert asked.told == [("EvaluationMissed", 4), ("Evaluation", 2), ("Evaluation", 6)]

    asyncio.run(run())


def test_with_one_version_the_next_step_waits(monkeypatch):
    async def run():
        asked = Asked(monkeypatch, every_steps=2, one_version=True)
        asked.answers["2"] = hanging()
        stepping = asyncio.create_task(asked.evaluations.after_step(None, 2))
        await asyncio.sleep(0.02)
        assert not stepping.done()
        asked.answers["2"].set_result([[RIGHT]])
        await stepping
        assert asked.told == [("Evaluation", 2)]

    asyncio.run(run())


def test_a_mistake_of_the_recipe_is_no_evaluation_missed(monkeypatch):
    async def run():
        asked = Asked(monkeypatch, every_steps=2)
        failed = asked.answers["2"] = hanging()
        await asked.evaluations.after_step(None, 2)
        failed.set_exception(PartFailed("fake-0 failed: no cost", raised=CostMissing("no cost")))
        with pytest.raises(PartFailed, match="no cost"):
            await asked.evaluations.settle()
        assert asked.told == []

    asyncio.run(run())


@pytest.mark.parametrize("error", [PartFailed("late\nand its log"), NothingScored("all failed")])
def test_only_the_one_before_training_ends_the_run(monkeypatch, error):
    async def failing():
        raise error

    async def run():
        asked = Asked(monkeypatch, every_steps=2)
        for label in "0", "2", "10":
            asked.answers[label] = failing()
        with pytest.raises(type(error)):
            await asked.evaluations.before(None, 0)
        await asked.evaluations.after_step(None, 2)
        await asked.evaluations.settle()
        await asked.evaluations.after(None, 10)
        assert asked.told == [("EvaluationMissed", 2), ("EvaluationMissed", 10)]
        assert asked.sink.facts[0].reason == str(error).splitlines()[0]
        assert all("no held-out evaluation at step" in note for note in asked.sink.notes)

    asyncio.run(run())


def test_an_error_of_ours_is_raised_and_a_run_that_ends_gives_up_what_is_under_way(monkeypatch):
    async def broken():
        raise LookupError("a bug")

    async def run():
        asked = Asked(monkeypatch, every_steps=1)
        asked.answers["1"], asked.answers["3"] = broken(), hanging()
        await asked.evaluations.after_step(None, 1)
        await asyncio.sleep(0.01)
        with pytest.raises(LookupError):
            await asked.evaluations.after_step(None, 2)
        await asked.evaluations.after_step(None, 3)
        await asyncio.sleep(0)
        await asked.evaluations.close()
        await asked.evaluations.close()
        assert asked.answers["3"].cancelled() and asked.told == []

    asyncio.run(run())
