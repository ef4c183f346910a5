"""Environments: who answers the model between its turns. Run by the workers of `turns`, never on an event loop.

An environment is a function of what was said so far, and of nothing else:

    environment(transcript: Transcript) -> tokens to append | None, which ends the rollout

- It is asked whenever a turn of the model ends with a stop token. What it returns is appended as it is and the model goes
  on after it. Tokens in, tokens out: what the model sampled is never turned into text and back into the context.
- It keeps nothing between two calls. So a rollout that lost its engine goes on elsewhere, where another process of the
  same environment is asked; and it may be asked the same question twice.
- It may hang, raise, take more memory than it is given or end its process: that costs its own rollout and nothing else.

A recipe names a factory, `factory(tokenizer, settings) -> environment`, by a built-in name or an import path
`package.module:factory`. `docs/environments.md` shows how to write one.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from operator import index
from typing import Any, Final

import msgspec

from asyncrl.generators.functions import FunctionError, load_function
from asyncrl.generators.tokens import TokenizerError, load_tokenizer, single_tokens

SINGLE_TURN: Final = "single_turn"
BUILT_IN: Final = {
    SINGLE_TURN: "asyncrl.generators.environment:single_turn",
    "calculator": "asyncrl.generators.calculator:calculator",
}


class Transcript(msgspec.Struct, frozen=True):
    """What was said so far, up to and with the stop token that ends the model's turn."""

    prompt_tokens: list[int]
    answer_tokens: list[int]
    sampled: list[bool]
    """Of each answer token: True where the model sampled it, False where the environment gave it."""
    payload: dict[str, Any]
    """The prompt's row, with `prompt_id`, `question` and `answer`."""

    @property
    def last_turn(self) -> list[int]:
        """What the model said since the environment last spoke."""
        given = [place for place, sampled in enumerate(self.sampled) if not sampled]
        return self.answer_tokens[given[-1] + 1 :] if given else self.answer_tokens

    @property
    def replies(self) -> int:
        """How often the environment has spoken."""
        before = [True, *self.sampled]
        return sum(last and not now for last, now in zip(before, self.sampled, strict=False))


Environment = Callable[[Transcript], Sequence[int] | None]


class Setup(msgspec.Struct, frozen=True):
    """What a worker makes an environment of."""

    function: str
    settings: dict[str, Any]
    stop_tokens: list[str]
    model: str | None
    """None: there is no tokenizer yet, and nothing but the factory's name is looked at."""


class Asked(msgspec.Struct, frozen=True):
    """A `Transcript` on its way to a worker; the payload is still text."""

    prompt_tokens: list[int]
    answer_tokens: list[int]
    sampled: list[bool]
    payload: str


def single_turn(tokenizer: Any, settings: dict[str, Any]) -> Environment:
    """The model's first turn is its answer. No worker is started for it. Raises `FunctionError`."""
    if settings:
        raise FunctionError(f"environment 'single_turn' has no settings, got {', '.join(settings)}")
    return lambda transcript: None


def answerer(setup: bytes) -> Callable[[bytes], bytes]:
    """What a worker of `turns` runs. `setup` is a `Setup` as JSON. Raises `FunctionError`.

    Transcripts come and replies go as MessagePack; a reply is a list of token ids, or nil at the end.
    """
    wanted = msgspec.json.decode(setup, type=Setup)
    factory = load_function("environment", wanted.function, BUILT_IN)
    if wanted.model is None:
        return lambda body: body
    try:
        with _without_torch():
            tokenizer = load_tokenizer(wanted.model)
        single_tokens(tokenizer, wanted.stop_tokens)
    except TokenizerError as error:
        raise FunctionError(str(error)) from error
    environment: Environment = factory(tokenizer, wanted.settings)
    if not callable(environment):
        raise FunctionError(
            f"environment {wanted.function!r}: its factory returned {environment!r}, expected a function"
        )
    vocabulary = len(tokenizer)

    def answer(body: bytes) -> bytes:
        asked = msgspec.msgpack.decode(body, type=Asked)
        payload = msgspec.json.decode(asked.payload, type=dict[str, Any])
        reply = environment(Transcript(asked.prompt_tokens, asked.answer_tokens, asked.sampled, payload))
        return msgspec.msgpack.encode(None if reply is None else checked(reply, vocabulary))

    return answer


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """transformers, imported within, takes itself for installed without torch: a tokenizer needs none, and a worker is there
    in a third of the time with a quarter of the memory. Not where the user's module has imported one of them: it wants it."""
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing
    sys.modules["torch"] = None  # type: ignore[assignment]  # the import system's way to say: there is none
    try:
        yield
    finally:
        del sys.modules["torch"]


def checked(reply: Sequence[int], vocabulary: int) -> list[int]:
    """The reply as token ids. Raises `FunctionError` where it is none: not numbers, none at all, or unknown ones."""
    try:
        tokens = [index(token) for token in reply]
    except TypeError:
        raise FunctionError(
            f"it returned {str(reply)[:80]!r}; expected token ids, or None to end the rollout"
        ) from None
    if not tokens:
        raise FunctionError("it returned no tokens; expected at least one, or None to end the rollout")
    unknown = [token for token in tokens if not 0 <= token < vocabulary]
    if unknown:
        raise FunctionError(f"it returned token {unknown[0]}; the tokenizer knows 0 to {vocabulary - 1}")
    return tokens
