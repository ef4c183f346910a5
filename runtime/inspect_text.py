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
        try:
            recipe = msgspec.json.decode(self._folder.recipe.read_bytes(), type=_RecipePart)
        except (OSError, msgspec.DecodeError) as error:
            self.problem = f"no text is shown: {self._folder.recipe}, which names the tokenizer: {error}"
            return
        named = f"no text is shown: no tokenizer in {recipe.model.path} (model.path in {self._folder.recipe})"
        folder = _model_folder(recipe, self._folder.path)
        if folder is None:
            self.problem = (
                f"{named}: there is neither such a folder nor such a model in this machine's hub cache"
            )
            return
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError) as error:
            self.problem = f"{named}: {one_line(str(error), 200)}"


def _model_folder(recipe: _RecipePart, run: Path) -> Path | None:
    """Where the model lies on this machine: as the path says, from here or from where the run was launched; else in the
    hub's cache."""
    path, runs = Path(recipe.model.path), Path(recipe.run.folder)
    above = run.resolve().parents
    places = [path]
    if not runs.is_absolute() and len(runs.parts) < len(above):
        places.append(above[len(runs.parts)] / path)
    return next((place for place in places if place.is_dir()), None) or _cached(recipe.model.path)


def _cached(name: str) -> Path | None:
    """Looks at files alone. transformers, asked for a name, asks the hub who is asking, even with `local_files_only`."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = (try_to_load_from_cache(name, file) for file in ("tokenizer_config.json", "tokenizer.json"))
        return next((Path(file).parent for file in found if isinstance(file, str)), None)
    except HFValidationError:  # a path, not a name
        return None


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
