"""Prompts in a deterministic order: what the buffer is asked to admit. Called by whoever feeds the buffer, by the
held-out evaluation and by the warm start.

Invariants:
- `Frontier(source, seed, cursor)` gives the same prompts in the same order each time; `cursor` alone restores it.
- A finite source is walked in a new permutation each epoch; within an epoch every row comes exactly once.
- A generated task has no end: its rows come in order of their index, which is chance enough.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from asyncrl.generators.config import PromptsConfig
from asyncrl.generators.evaluation_config import EvaluationConfig
from asyncrl.generators.sources import Rows, SourceError, open_rows
from asyncrl.generators.tokens import PromptEncoder, TokenizerError, single_tokens


class Prompt(msgspec.Struct, frozen=True):
    """One prompt, as a source has it; `buffer.PromptRow` is one that has its position in the walk."""

    prompt_id: str
    """Stable: the source's name and the row's index."""
    tokens: list[int]
    payload: str
    """JSON object: the row's fields, and `prompt_id`, `question` and `answer` under these names."""


class PromptSource:
    """Prompts by index."""

    def __init__(self, rows: Rows, encoder: PromptEncoder, prompt_field: str, answer_field: str) -> None:
        self._rows, self._encoder = rows, encoder
        self._prompt_field, self._answer_field = prompt_field, answer_field

    @property
    def name(self) -> str:
        return self._rows.name

    @property
    def size(self) -> int | None:
        """Number of prompts; None where they never end."""
        return self._rows.size

    def __getitem__(self, index: int) -> Prompt:
        """Raises IndexError outside the source."""
        if index < 0 or (self.size is not None and index >= self.size):
            raise IndexError(f"prompt {index} of {self.name}, which has {self.size}")
        row, prompt_id = self._rows.row(index), f"{self.name}#{index}"
        for field in (self._prompt_field, self._answer_field):
            if row[field] is None:
                raise SourceError(f"{prompt_id}: {field!r} is null; leave such rows out of the source")
        question = row[self._prompt_field]
        fields = {**row, "prompt_id": prompt_id, "question": question, "answer": row[self._answer_field]}
        try:
            payload = msgspec.json.encode(fields).decode()
        except TypeError as error:
            raise SourceError(f"{prompt_id}: a field cannot be written as JSON: {error}") from error
        return Prompt(prompt_id=prompt_id, tokens=self._encoder.encode(question), payload=payload)


def open_source(config: PromptsConfig, tokenizer: Any, source: str = "") -> PromptSource:
    """The prompts of `source` (default: `config.source`) with the fields, template and task settings of `config`.

    Raises `SourceError` or `TokenizerError`. The first prompt is made here so that both come early; a tokenizer that
    lacks one of its characters is refused.
    """
    fields = (config.prompt_field, config.answer_field)
    rows = open_rows(source or config.source, fields, config.task, config.seed)
    encoder = PromptEncoder(tokenizer, config.chat_template, config.system)
    prompts = PromptSource(rows, encoder, *fields)
    first = prompts[0]
    if encoder.has_unknown(first.tokens):
        raise TokenizerError(
            f"{first.prompt_id}: the tokenizer does not know all characters of {first.payload}; is it this model's?"
        )
    return prompts


def held_out(config: PromptsConfig, evaluation: EvaluationConfig, tokenizer: Any) -> list[Prompt]:
    """The first `evaluation.prompts` prompts of its source, fewer where that has fewer; none where it is empty."""
    if not evaluation.source:
        return []
    source = open_source(config, tokenizer, evaluation.source)
    count = evaluation.prompts if source.size is None else min(evaluation.prompts, source.size)
    return Frontier(source, config.seed).take(count)


class Frontier:
    """A walk through a source that can be taken up again at any point."""

    def __init__(self, source: PromptSource, seed: int, cursor: int = 0) -> None:
        """`cursor`: how many prompts were taken since the walk began."""
        self._source, self._seed, self._cursor = source, seed, 0
        self.go_to(cursor)

    @property
    def cursor(self) -> int:
        """Position of the prompt that is taken next."""
        return self._cursor

    def go_to(self, cursor: int) -> None:
        """The walk goes on at that position, as if it had been walked so far."""
        if cursor < 0:
            raise ValueError(f"cursor of {self._source.name} must be >= 0, got {cursor}")
        self._cursor = cursor

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts; a finite source begins a new epoch when the last is over."""
        taken = [self._source[self._index(self._cursor + k)] for k in range(n)]
        self._cursor += n
        return taken

    def _index(self, position: int) -> int:
        size = self._source.size
        if size is None:
            return position
        epoch, within = divmod(position, size)
        return permuted(within, size, f"{self._seed}/{epoch}")


def permuted(index: int, size: int, key: str) -> int:
    """Where a keyed permutation of range(size) sends `index`: random access, no table.

    A balanced Feistel network of four rounds (Luby and Rackoff, 1988) over the next power of four, walked along its
    cycle until it is back inside the range (Black and Rogaway, 2002); fewer than four steps on average.
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is outside of range({size})")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    # Ends: the network permutes a finite set, so the cycle comes back to `index` at the latest.
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(4):
            digest = hashlib.blake2b(f"{key}/{round_number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        index = left << half_bits | right
        if index < size:
            return index


Demonstration = tuple[list[int], list[int], list[bool]]
"""Prompt tokens, answer tokens, and of each of these whether it is to be imitated: what the environment says is not."""

Reply = Callable[[list[int], list[int], list[bool], str], list[int] | None]
"""Asks an environment: prompt tokens, answer tokens, which of these the model says, payload (see `turns`)."""


def pairs(
    source: str,
    answer_field: str,
    tokenizer: Any,
    config: PromptsConfig,
    seed: int = 0,
    *,
    stop_tokens: Sequence[str] = (),
    reply: Reply | None = None,
) -> Iterator[Demonstration]:
    """Endless demonstrations of `source`, for supervised fine-tuning, in the order of `seed`, which also draws the rows of a
    generated task. Field, template and task settings are those of `config`.

    `answer_field` holds a text, or a list with one for each turn of the model: between them `reply` says what the
    environment does. A turn that does not end with one of `stop_tokens` gets the end-of-sequence token.
    Raises `SourceError` or `TokenizerError`, also later on for a demonstration that the environment does not go along with.
    """
    rows = open_rows(source, (config.prompt_field, answer_field), config.task, seed)
    encoder = PromptEncoder(tokenizer, config.chat_template, config.system)
    # The environment is told of the row's own answer where it has one besides.
    own = answer_field == "answer" or rows.row(0).get(config.answer_field) is None
    prompts = PromptSource(rows, encoder, config.prompt_field, answer_field if own else config.answer_field)
    field = "answer" if own else answer_field
    player = _Player(tokenizer, stop_tokens, reply)
    return _walk_pairs(Frontier(prompts, seed), field, player)


def _walk_pairs(frontier: Frontier, field: str, player: _Player) -> Iterator[Demonstration]:
    # Waits for nothing but the environment, which has a deadline; ends when the caller stops asking.
    while True:
        (prompt,) = frontier.take(1)
        said = msgspec.json.decode(prompt.payload)[field]
        yield player.play(prompt, [str(turn) for turn in said] if isinstance(said, list) else [str(said)])


class _Player:
    """Makes demonstrations of what the model says in its turns."""

    def __init__(self, tokenizer: Any, stop_tokens: Sequence[str], reply: Reply | None) -> None:
        self._encoder, self._reply = PromptEncoder(tokenizer), reply
        self._eos = int(tokenizer.eos_token_id)
        self._stops = {self._eos, *single_tokens(tokenizer, stop_tokens)}

    def play(self, prompt: Prompt, turns: list[str]) -> Demonstration:
        """Raises `SourceError` where the environment ends it early or goes on after its last turn."""
        if self._reply is None and len(turns) > 1:
            raise SourceError(
                f"{prompt.prompt_id}: a demonstration of {len(turns)} turns needs an [environment] that answers between them"
            )
        answer: list[int] = []
        imitated: list[bool] = []
        for number, text in enumerate(turns, 1):
            tokens = self._encoder.encode(text)
            if tokens[-1] not in self._stops:
                tokens.append(self._eos)
            answer += tokens
            imitated += [True] * len(tokens)
            given = self._reply(prompt.tokens, answer, imitated, prompt.payload) if self._reply else None
            if (given is None) != (number == len(turns)):
                does = "ends it" if given is None else "goes on"
                raise SourceError(
                    f"{prompt.prompt_id}: a demonstration of {len(turns)} turns does not fit the environment, which {does} "
                    f"after turn {number}, {text!r}"
                )
            answer += given or []
            imitated += [False] * len(given or [])
        return prompt.tokens, answer, imitated
