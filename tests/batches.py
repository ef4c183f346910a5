"""Random batches for the learner's tests: groups of rollouts that share a prompt, as the buffer hands them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from asyncrl.buffer.schema import BATCH
from asyncrl.learner.tiny_model import character_tokenizer, new_model

VOCABULARY = 13
Row = dict[str, Any]


def write_folder(folder: Path, **batches: pa.Table) -> None:
    """A tiny model with its tokenizer, and beside them each batch as an Arrow file of its name."""
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    new_model(tokenizer, hidden_size=64, layers=2, heads=2, max_tokens=128, seed=3).save_pretrained(folder)
    for name, table in batches.items():
        with pa.ipc.new_file(str(folder / name), table.schema) as writer:
            writer.write_table(table)


def batch(
    random: np.random.Generator,
    groups: int,
    answer: Callable[[np.random.Generator, int, int], Row],
    *,
    rollouts: int = 3,
    prompt_tokens: int | tuple[int, int] = (2, 9),
) -> pa.Table:
    """`rollouts` answers to each of `groups` prompts of so many tokens, or [low, high). `answer(random, group, number)` gives the columns
    of an answer; those that it leaves out say that it cost nothing, was sampled and came to its end."""
    rows: list[Row] = []
    for group in range(groups):
        size = prompt_tokens if isinstance(prompt_tokens, int) else random.integers(*prompt_tokens)
        prompt = random.integers(0, VOCABULARY, size).tolist()
        for number in range(rollouts):
            common = {"rollout_id": len(rows), "group_id": group, "prompt_tokens": prompt}
            rest = {"cost": 0.0, "greedy": False, "finish_reason": "stop"}
            rows.append(common | rest | answer(random, group, number))
    return pa.Table.from_pylist(rows, schema=BATCH)


def plain(random: np.random.Generator, index: int) -> Row:
    """Of mixed versions, its first token trainable and most of the others; every third of `index` is rewarded."""
    size = int(random.integers(2, 30))
    return {
        "tokens": random.integers(0, VOCABULARY, size).tolist(),
        "logprobs": random.normal(-2.7, 0.3, size).tolist(),
        "versions": random.integers(2, 5, size).tolist(),
        "trainable": [True, *(random.random(size - 1) > 0.2).tolist()],
        "reward": float(index % 3 == 0),
    }


def aged(random: np.random.Generator, number: int, *, context: bool) -> Row:
    """Ages 0 to 2, number 2 wholly fresh, in number 1 an environment's words; all of it context where `context` says so.
    The reward is the test's to add, so that it is drawn last."""
    size = int(random.integers(3, 15))
    versions = np.sort(random.integers(4 if number == 2 else 2, 5, size))
    if number == 1:
        versions[1 : size // 2] = -1
    trainable = (versions >= 0) & (random.random(size) > 0.15) & (not context)
    logprobs = np.where(versions >= 0, random.normal(-2.7, 0.25, size), 0.0)
    return {
        "tokens": random.integers(0, VOCABULARY, size).tolist(),
        "logprobs": logprobs.tolist(),
        "versions": versions.tolist(),
        "trainable": trainable.tolist(),
        "reward": float(random.integers(0, 4)) / 2,
    }
