"""Text to token ids and back, with the model's own tokenizer. Called by `prompts`, the dispatcher and the warm start.

Invariants:
- A prompt is turned into token ids once, here; from then on only ids travel.
- Without a chat template no special token is added: the ids are the text's and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec


class TokenizerError(ValueError):
    """A tokenizer that is missing or cannot do what the recipe asks."""


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model folder or hub name (a `PreTrainedTokenizerBase`). Raises `TokenizerError`.

    transformers is imported here: it takes seconds, and reward workers and tests of pure code do without.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"no tokenizer in model {model!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"the tokenizer of {model!r} has no end-of-sequence token: no answer could ever end"
        )
    return tokenizer


def single_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The id of each text. Raises `TokenizerError` where one is not exactly one token."""
    ids = []
    for text in texts:
        found = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
        if len(found) != 1 or found[0] == tokenizer.unk_token_id:
            raise TokenizerError(
                f"stop token {text!r} is {len(found)} tokens to this tokenizer ({found[:8]}), expected one that it knows: "
                "name a token of its own, such as a special one, or none"
            )
        ids.append(found[0])
    return ids


def stop_token_ids(tokenizer: Any, model: str, further: Sequence[str] = ()) -> tuple[int, ...]:
    """Ids that end a turn: the tokenizer's, those of `generation_config.json` where the model folder has one
    (chat models often end a turn with another token than a document), and those of the texts `further`. Ascending.

    Raises `TokenizerError`."""
    ids = {int(tokenizer.eos_token_id), *single_tokens(tokenizer, further)}
    path = Path(model) / "generation_config.json"
    if path.is_file():
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any]).get("eos_token_id")
        if isinstance(found, int):
            ids.add(found)
        elif isinstance(found, list):
            ids.update(found)
    return tuple(sorted(ids))


def decode_answer(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of an answer, which rewards score; special tokens such as end-of-sequence leave no trace."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


class PromptEncoder:
    """Turns a question into the token ids that the model continues."""

    def __init__(self, tokenizer: Any, chat_template: bool = False, system: str = "") -> None:
        """Raises `TokenizerError`."""
        if chat_template and not tokenizer.chat_template:
            raise TokenizerError(
                "chat_template = true, but the tokenizer has none; set chat_template = false"
            )
        if system and not chat_template:
            raise TokenizerError("a system message needs chat_template = true; set it or leave `system` out")
        self._tokenizer, self._chat, self._system = tokenizer, chat_template, system

    def encode(self, question: str | list[dict[str, str]]) -> list[int]:
        """`question` is a text, or with a chat template also a list of messages with `role` and `content`.

        Raises `TokenizerError` where no token comes out.
        """
        tokens = self._encode_chat(question) if self._chat else self._encode_plain(question)
        if not tokens:
            raise TokenizerError(
                f"prompt {question!r} has no tokens; an engine needs at least one to go on from"
            )
        return tokens

    def has_unknown(self, tokens: Sequence[int]) -> bool:
        """Whether the unknown token stands for something in these ids: the model is asked another question than the
        one that was written. Never with byte-level tokenizers; a sign of the wrong alphabet with character ones."""
        unknown = self._tokenizer.unk_token_id
        return unknown is not None and unknown != self._tokenizer.eos_token_id and unknown in tokens

    def _encode_plain(self, question: str | list[dict[str, str]]) -> list[int]:
        if not isinstance(question, str):
            raise TokenizerError("the prompt is a list of messages: set chat_template = true")
        return [int(token) for token in self._tokenizer.encode(question, add_special_tokens=False)]

    def _encode_chat(self, question: str | list[dict[str, str]]) -> list[int]:
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        if self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]
