"""A small real model and real batches for the learner's tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.step import Learner
from asyncrl.learner.tiny_model import character_tokenizer, new_model

sys.path.append(str(Path(__file__).parents[2]))  # what tests share

VOCABULARY = 13


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    new_model(tokenizer, hidden_size=64, layers=2, heads=2, max_tokens=128, seed=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def untied_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with an output weight of its own."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(model_folder, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def make_table() -> Callable[..., pa.Table]:
    return build_table


@pytest.fixture
def learner(model_folder: Path) -> Iterator[Callable[..., Learner]]:
    """Opens learners of one rank in this process, one after the other; the last one is closed at the end."""
    opened: list[Learner] = []

    def open_learner(path: Path = model_folder, temperature: float = 1.0, **settings: object) -> Learner:
        if opened:
            opened.pop().close()
        config = LearnerConfig(**{"device": "cpu", "learning_rate": 1e-3, **settings})  # type: ignore[arg-type]
        opened.append(Learner(config, path, temperature))
        return opened[-1]

    threads = torch.get_num_threads()
    try:
        yield open_learner
    finally:
        for one in opened:
            one.close()
        torch.set_num_threads(threads)


def build_table(
    groups: int = 4, rollouts: int = 4, *, seed: int = 0, longest: int = 20, masked: float = 0.2
) -> pa.Table:
    """Random prompts and answers of very different lengths; behaviour logprobs around those of a random model."""
    random = np.random.default_rng(seed)
    rows: dict[str, list[object]] = {name: [] for name in BATCH.names}
    for group in range(groups):
        prompt = random.integers(0, VOCABULARY, random.integers(2, 9))
        for _ in range(rollouts):
            size = int(random.integers(1, longest))
            rows["rollout_id"].append(100 + len(rows["rollout_id"]))
            rows["group_id"].append(7 * group + 5)
            rows["prompt_tokens"].append(prompt)
            rows["tokens"].append(random.integers(0, VOCABULARY, size))
            rows["logprobs"].append(random.normal(-2.7, 0.3, size))
            fresh = len(rows["rollout_id"]) % 2  # every other rollout is of version 4 as a whole
            rows["versions"].append(np.sort(random.integers(4 if fresh else 2, 5, size)))
            rows["trainable"].append(random.random(size) >= masked)
            rows["reward"].append(float(random.integers(0, 3)) / 2)
            rows["cost"].append(float(random.integers(0, 3)) / 4)
            rows["greedy"].append(False)
            rows["finish_reason"].append("stop")
    return pa.table(rows, schema=BATCH)


class Oracle:
    """One fixed case, computed by other projects (see data/README.md); as padded arrays, and flat as our columns are.

    Flat columns hold the tokens of all 13 rollouts, the environment's in between included, without padding.
    """

    def __init__(self) -> None:
        self.inputs = _load("oracle_inputs.npz")
        self.golden = _load("oracle_golden.npz")
        self.place = np.arange(12) < self.inputs["lens"][:, None]
        """[13, 12] bool: where there is a token."""
        self.row = torch.from_numpy(np.nonzero(self.place)[0])
        self.group = torch.from_numpy(self.inputs["group"])
        self.mask = self.flat_of(self.inputs["mask"]).bool()
        """[tokens] bool: where the policy sampled the token."""

    def flat(self, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return self.flat_of(self.inputs[name]).to(dtype)

    def want(self, name: str) -> torch.Tensor:
        """An output per token, flat."""
        return self.flat_of(self.golden[name])

    def flat_of(self, padded: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(padded[self.place])

    def per_token(self, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """An input per rollout, on each of its tokens."""
        return torch.from_numpy(self.inputs[name]).to(dtype)[self.row]


def _load(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "data" / name) as file:
        return dict(file)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()
