"""A run's tokens as text: its tokenizer, loaded when the first text is asked for. Called by `inspect` and its parts.

Invariants:
- Without a tokenizer every text is None, and `problem` says why; nothing else of a run's rollouts depends on it.
- The tokenizer is looked for on this machine alone: to look at data must not wait for a network.
- What a model wrote is shown, never obeyed: `printable` takes what a terminal would act on out of it.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.generators.tokens import decode_answer
from asyncrl.runtime.run_folder import RunFolder

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _ModelPart(msgspec.Struct, frozen=True):
    path: str


class _RunPart(msgspec.Struct, frozen=True):
    folder: str = "runs"


class _RecipePart(msgspec.Struct, frozen=True):
    """What is wanted of a run's recipe.json; the rest may be of another version's making."""

    model: _ModelPart
    run: _RunPart = _RunPart()


class Decoder:
    """Token ids to text. May be called from several threads."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self.problem = ""
        """Why there is no text; empty as long as nothing went wrong."""

    def prompt(self, tokens: Sequence[int] | None) -> str | None:
        """What the model was given, special tokens included."""
        if tokens is None or not self._ready():
            return None
        with self._lock:
            return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def answer(self, tokens: Sequence[int] | None) -> str | None:
        """What the reward was given: special tokens leave no trace."""
        if tokens is None or not self._ready():
            return None
        with self._lock:
            return decode_answer(self._tokenizer, tokens)

    def pieces(self, tokens: Sequence[int], ends: Sequence[int]) -> list[str] | None:
        """The text in parts that end where so many tokens are over; special tokens included, nothing lost in between.

        A character whose bytes lie in two parts belongs to the later one.
        """
        whole = self.prompt(tokens)
        if whole is None:
            return None
        texts = (self.prompt(tokens[:end]) for end in ends)
        cuts = [0]
        for text in texts:
            cuts.append(max(cuts[-1], _common(whole, text or "")))
        cuts[-1] = len(whole)
        return [whole[a:b] for a, b in itertools.pairwise(cuts)]

    def _ready(self) -> bool:
        with self._lock:
            if self._tokenizer is None and not self.problem:
                self._load()
            return self._tokenizer is not None

    def _load(self) -> None:
        from transformers import AutoTokenizer

        try:
            recipe = msgspec.json.decode(self._folder.recipe.read_bytes(), type=_RecipePart)
        except (OSError, msgspec.DecodeError) as error:
            self.problem = f"no text is shown: {self._folder.recipe}, which names the tokenizer: {error}"
            return
        model = _where(recipe, self._folder.path)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            lines = str(error).strip().splitlines()
            reason = lines[0] if lines else type(error).__name__
            if not Path(model).is_dir():
                reason = "there is no such folder, and no such model in this machine's hub cache"
            self.problem = (
                f"no text is shown: no tokenizer at {model} (model.path in {self._folder.recipe}): {reason}"
            )


def _where(recipe: _RecipePart, run: Path) -> str:
    """The model's path. One that is relative is so to where the run was launched, which may not be here."""
    path = Path(recipe.model.path)
    up = len(Path(recipe.run.folder).parts)
    above = run.resolve().parents
    if path.is_absolute() or path.exists() or Path(recipe.run.folder).is_absolute() or up >= len(above):
        return recipe.model.path
    there = above[up] / path
    return str(there) if there.is_dir() else recipe.model.path


def _common(whole: str, text: str) -> int:
    """Length of the common beginning. A half character at the end of `text` is none of `whole`'s."""
    for i, (a, b) in enumerate(zip(whole, text, strict=False)):
        if a != b:
            return i
    return min(len(whole), len(text))


def printable(text: str) -> str:
    """With control characters as escapes; line ends and tabs stay."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def one_line(text: str, most: int = 0) -> str:
    """Printable on one line, cut to `most` characters (0: not cut)."""
    line = printable(text).replace("\n", "\\n").replace("\t", "\\t")
    return line if not most or len(line) <= most else line[: most - 1] + "…"
