"""The example of `docs/environments.md` runs as it is printed, with the recipe that stands below it."""

import asyncio
import re
import tomllib
from pathlib import Path

import msgspec

from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.generators.config import EnvironmentConfig
from asyncrl.generators.environment import BUILT_IN, Transcript
from asyncrl.generators.turns import Turns
from asyncrl.learner.tiny_model import character_tokenizer

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "environments.md").read_text()


def test_the_example_plays_a_game_to_its_end(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    (section,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "my_environments.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = character_tokenizer("0123456789+-=")
    tokenizer.save_pretrained(tmp_path)
    config = msgspec.convert(tomllib.loads(section)["environment"], EnvironmentConfig)
    guesses, heard = ["50", "25", "37"], []

    async def play():
        turns = Turns(config, str(tmp_path))
        try:
            prompt, answer, versions = tokenizer.encode("="), [], []
            for guess in guesses:
                said = [*tokenizer.encode(guess), tokenizer.eos_token_id]
                answer, versions = answer + said, versions + [0] * len(said)
                reply = await turns.next_turn(prompt, answer, versions, '{"answer": 37}')
                heard.append(reply and tokenizer.decode(reply))
                answer, versions = answer + (reply or []), versions + [ENVIRONMENT] * len(reply or [])
        finally:
            await turns.close()

    asyncio.run(play())
    assert heard == ["-", "+", None]


def test_the_document_names_every_setting_and_all_of_a_transcript():
    named = set(re.findall(r"^\| `(\w+)`", DOCUMENT, re.MULTILINE))
    attributes = {*Transcript.__struct_fields__, "last_turn", "replies"}
    assert named == attributes | {field.name for field in msgspec.structs.fields(EnvironmentConfig)}
    assert all(f"`{name}`" in DOCUMENT for name in BUILT_IN)
