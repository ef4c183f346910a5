from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.learner.config import SFTConfig
from asyncrl.learner.sft import Pair, SFTProgress, sft_tokenizer, train_sft


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _config(**settings: object) -> SFTConfig:
    defaults = {"hidden_size": 64, "heads": 2, "layers": 2, "steps": 40, "pairs_per_step": 16}
    defaults |= {"warmup_steps": 5, "learning_rate": 5e-3}
    return SFTConfig(source="copies", **{**defaults, **settings})  # type: ignore[arg-type]


def _pairs(config: SFTConfig) -> Iterator[Pair]:
    """`d=` -> `dd`: what a model learns in a few steps."""
    tokenizer, draw = sft_tokenizer(config), random.Random(0)
    while True:
        digit = str(draw.randint(0, 9))
        answer = [*tokenizer.encode(digit * 2), tokenizer.eos_token_id]
        yield tokenizer.encode(digit + "="), answer, [True] * len(answer)


def test_a_model_learns_its_pairs_and_loads_elsewhere(tmp_path: Path) -> None:
    config, seen = _config(cosine_decay=True), list[SFTProgress]()
    train_sft(config, _pairs(config), tmp_path / "model", progress=seen.append)
    assert [p.step for p in seen] == list(range(1, 41))
    assert seen[0].loss > 2 and seen[-1].loss < 0.5
    rates = [p.learning_rate for p in seen]
    assert rates[:5] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3])
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] == pytest.approx(0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = torch.tensor([tokenizer.encode("7=")])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0]) == "7=77<eos>"


def test_the_same_seed_gives_the_same_model_and_init_goes_on_from_one(tmp_path: Path) -> None:
    config = _config(steps=3)
    for name in ("a", "b"):
        train_sft(config, _pairs(config), tmp_path / name)
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    more = _config(steps=1, init=str(tmp_path / "a"), learning_rate=1e-9)
    assert sft_tokenizer(more).get_vocab() == sft_tokenizer(config).get_vocab()
    train_sft(more, _pairs(more), tmp_path / "c")
    c = AutoModelForCausalLM.from_pretrained(tmp_path / "c").state_dict()
    assert all(torch.allclose(a[name], c[name], atol=1e-6) for name in a)


def test_too_few_pairs_and_empty_ones_are_refused_and_leave_no_folder(tmp_path: Path) -> None:
    config = _config(steps=3)
    with pytest.raises(ValueError, match=r"gave 20 pairs, .* = 48 are needed"):
        train_sft(config, itertools.islice(_pairs(config), 20), tmp_path / "model")
    for pair in (([1], [], []), ([], [2], [True]), ([1], [2, 3], [False, False])):
        with pytest.raises(ValueError, match="step 1: a pair has an empty prompt, or nothing to imitate"):
            train_sft(config, itertools.repeat(pair), tmp_path / "model")
    with pytest.raises(ValueError, match="step 1: 16 flags for 32 answer tokens"):
        train_sft(config, itertools.repeat(([1], [2, 3], [True])), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_is_not_imitated_is_context_alone(tmp_path: Path) -> None:
    """`d=` -> `d;` (not imitated: another each time) `d`: the loss goes to nothing as if the noise were not there, and the
    model does not learn to say it."""
    config, seen = _config(steps=100), list[SFTProgress]()
    tokenizer, draw = sft_tokenizer(config), random.Random(0)

    def noisy() -> Iterator[Pair]:
        while True:
            digit, noise = str(draw.randint(0, 9)), str(draw.randint(0, 9))
            answer = [*tokenizer.encode(digit + noise + ";" + digit), tokenizer.eos_token_id]
            yield tokenizer.encode(digit + "="), answer, [True, False, False, True, True]

    train_sft(config, noisy(), tmp_path / "model", progress=seen.append)
    assert seen[-1].loss < 0.2 < math.log(10) / 5  # which one noisy token of five would cost at least


def test_a_folder_that_is_there_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="never overwritten"):
        train_sft(_config(), iter(()), tmp_path)


@pytest.mark.parametrize("tokens_per_pass", [1, 12, 40])
def test_the_step_does_not_depend_on_what_is_packed_together(
    tokens_per_pass: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(steps=4, warmup_steps=0, learning_rate=1e-2)

    def pairs() -> Iterator[Pair]:
        draw = random.Random(1)
        while True:
            size = draw.choice([1, 2, 5, 20])
            answer = [draw.randrange(10) for _ in range(size)]
            yield [draw.randrange(10), 11], answer, [True, *(draw.random() < 0.7 for _ in range(size - 1))]

    losses: list[list[float]] = []
    for name, limit in (("whole", 10_000), ("parts", tokens_per_pass)):
        monkeypatch.setattr("asyncrl.learner.sft.TOKENS_PER_PASS", limit)
        seen = list[SFTProgress]()
        train_sft(config, pairs(), tmp_path / name, progress=seen.append)
        losses.append([progress.loss for progress in seen])
    # From the second on, a loss shows what the gradients before it were.
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1
