"""`recipes/gsm8k.toml` on the committed sample of real rows: its prompts, its chat template, its reward."""

import asyncio
import json
import string
from pathlib import Path

import pytest

from asyncrl.generators.prompts import Frontier, held_out, open_source
from asyncrl.generators.reward_pool import RewardPool
from asyncrl.generators.tokens import load_tokenizer
from asyncrl.learner.tiny_model import character_tokenizer
from asyncrl.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "tests" / "data" / "gsm8k_sample.jsonl"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(
        ROOT / "recipes" / "gsm8k.toml",
        [
            f'prompts.source="{SAMPLE}"',
            f'evaluation.source="{SAMPLE}"',
            "evaluation.prompts=50",
            "rewards.workers=1",
        ],
    )


@pytest.fixture(scope="module")
def prompts(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = character_tokenizer(string.printable)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = load_tokenizer(str(folder))
    source = open_source(recipe.prompts, tokenizer)
    assert len(held_out(recipe.prompts, recipe.evaluation, tokenizer)) == 50
    return tokenizer, Frontier(source, recipe.prompts.seed).take(source.size)


def test_each_prompt_is_one_user_message_after_the_system_s(recipe, prompts):
    tokenizer, taken = prompts
    assert len({p.prompt_id for p in taken}) == len(taken) == 200
    for prompt in taken[:20]:
        text = tokenizer.decode(prompt.tokens)
        assert text.startswith(f"<system>{recipe.prompts.system}</system><user>")
        assert text.endswith("</user><assistant>")
        question = json.loads(prompt.payload)["question"]
        assert "".join(c for c in question if c in string.printable) in text


def test_the_recipe_s_reward_knows_right_from_wrong(recipe, prompts):
    async def score():
        pool = RewardPool(recipe.rewards)
        try:
            for prompt in prompts[1]:
                gold = json.loads(prompt.payload)["answer"].split("####")[1].strip()
                wrong = str(int(gold.replace(",", "")) + 1)
                assert (await pool.score(f"So it is \\boxed{{{gold}}}.", prompt.payload)).reward == 1.0
                assert (await pool.score(f"So it is \\boxed{{{wrong}}}.", prompt.payload)).reward == 0.0
        finally:
            await pool.close()

    asyncio.run(score())
