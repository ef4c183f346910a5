"""The shipped recipe with a tool: its tokenizer, its lengths and its demonstrations go together."""

import itertools
from pathlib import Path

import pytest

from asyncrl.generators.calculator import calculator
from asyncrl.generators.environment import Transcript
from asyncrl.generators.prompts import pairs
from asyncrl.generators.rewards import sums
from asyncrl.generators.tasks import GeneratedTask
from asyncrl.learner.sft import sft_tokenizer
from asyncrl.recipes import load_recipe

ROWS = 400


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(Path(__file__).resolve().parents[3] / "recipes" / "calculator.toml")


@pytest.fixture(scope="module")
def demonstrations(recipe):
    """(text of the prompt, answer tokens, imitated): what the warm start trains, played with the environment itself."""
    tokenizer = sft_tokenizer(recipe.sft)
    environment = calculator(tokenizer, recipe.environment.settings)

    def reply(prompt, answer, imitated, payload):
        return environment(Transcript(prompt, answer, imitated, {}))

    walk = pairs("arithmetic:train", "solution", tokenizer, recipe.prompts, recipe.sft.seed, reply=reply)
    return tokenizer, [(tokenizer.decode(p), a, i) for p, a, i in itertools.islice(walk, ROWS)]


def test_every_demonstration_is_whole_and_worth_a_reward(recipe, demonstrations):
    """No character is lost on the way through the new tokenizer, and each answer fits with room to spare."""
    tokenizer, played = demonstrations
    task = GeneratedTask("arithmetic", "train", recipe.prompts.task, recipe.sft.seed)
    for index, (question, answer, _) in enumerate(played):
        row = task.row(index)
        text = tokenizer.decode(answer).replace("<eos>", "")
        expression = row.question.removesuffix("=")
        said = f"<tool>{expression}</tool><result>{row.answer}</result>{row.answer}"
        assert question == row.question and text == (said if isinstance(row.solution, list) else row.answer)
        assert sums(text, {"answer": row.answer}) == 1
        assert len(answer) < recipe.sampling.max_new_tokens
        assert len(question) <= recipe.longest_prompt_tokens


def test_what_the_calculator_says_is_not_imitated_and_all_else_is(demonstrations):
    tokenizer, played = demonstrations
    calls = 0
    for _, answer, imitated in played:
        given = [token for token, flag in zip(answer, imitated, strict=True) if not flag]
        said = [token for token, flag in zip(answer, imitated, strict=True) if flag]
        assert "result" not in tokenizer.decode(said)
        assert not given or tokenizer.decode(given).startswith("<result>")
        calls += bool(given)
    assert 0.2 < calls / ROWS < 0.4  # what the recipe says of the share of tool use
