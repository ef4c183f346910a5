from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.learner.tiny_model import character_tokenizer, new_model

ALPHABET = "0123456789+=; \nabs'tQS"
_TOKENIZER = character_tokenizer(ALPHABET)


@settings(max_examples=200, deadline=None)
@given(st.text(ALPHABET, max_size=40))
def test_encoding_is_one_token_per_character_and_back(text: str) -> None:
    ids = _TOKENIZER.encode(text)
    assert ids == [ALPHABET.index(character) for character in text]
    assert _TOKENIZER.decode(ids) == text


def test_the_folder_is_what_others_load(tmp_path: Path) -> None:
    model = new_model(_TOKENIZER, hidden_size=64, layers=2, heads=2, max_tokens=64, seed=1)
    _TOKENIZER.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = " 12+3\n\n 's  a;Qt S="
    assert tokenizer.encode(text) == _TOKENIZER.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = [*tokenizer.encode("3+9=12"), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3+9=12"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == len(ALPHABET) + 1
    assert loaded.config.pad_token_id == tokenizer.pad_token_id == len(ALPHABET)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_the_seed_decides_the_weights_and_leaves_the_callers_random_state() -> None:
    before = torch.get_rng_state()
    a, b, c = (
        new_model(
            _TOKENIZER, hidden_size=32, layers=1, heads=1, max_tokens=64, seed=s
        ).model.embed_tokens.weight
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("alphabet", ["", "aab", "aé"])
def test_a_wrong_alphabet_is_refused(alphabet: str) -> None:
    with pytest.raises(ValueError, match=r"sft\.alphabet must be ASCII"):
        character_tokenizer(alphabet)


def test_a_head_size_that_engines_lack_is_refused() -> None:
    with pytest.raises(ValueError, match="100 / 4 = 25"):
        new_model(_TOKENIZER, hidden_size=100, layers=1, heads=4, max_tokens=64, seed=0)
