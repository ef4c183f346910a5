"""A Hugging Face sequence classifier that says how good an answer is: one number for a text. Imports torch; run by
`reward_model_process` alone.

Invariants:
- The number is the model's one logit, as its own forward pass gives it: batches change nothing of it but rounding.
- A text is read whole. One that is longer than the model was made for is refused, never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from asyncrl.generators.config import RewardModelConfig
from asyncrl.generators.functions import FunctionError


class Unreadable(ValueError):
    """A text that this model cannot score; the message says why."""


class Classifier:
    """`tokens` makes a text of question and answer, `score` reads several of them in one forward pass."""

    def __init__(self, folder: str, config: RewardModelConfig) -> None:
        """Raises `FunctionError` for a folder that is no such model."""
        if config.device == "cuda" and not torch.cuda.is_available():
            raise FunctionError(
                'serving.device is "cuda", and this process sees no GPU: the engine beside it has none. Set device = "cpu"'
            )
        if not Path(folder).is_dir():
            raise FunctionError(f"reward model {folder!r} is no folder here")
        disable_progress_bar()
        torch.set_num_threads(config.cores)
        self._chat = config.chat_template
        self._tokenizer = _tokenizer(folder, chat=config.chat_template)
        self._model = _model(folder, getattr(torch, config.dtype)).to(config.device).eval()
        self._device = torch.device(config.device)
        self._text_config = self._model.config.get_text_config()
        self._pad: int | None = self._text_config.pad_token_id
        self._longest = getattr(self._model.config, "max_position_embeddings", None)

    def tokens(self, payload: str, answer_text: str) -> list[int]:
        """What the model reads. Raises Unreadable."""
        question = msgspec.json.decode(payload, type=dict[str, Any]).get("question", "")
        tokens = self._talk(question, answer_text) if self._chat else self._text(question, answer_text)
        if not tokens or (self._longest is not None and len(tokens) > self._longest):
            raise Unreadable(
                f"question and answer are {len(tokens)} tokens, the model reads 1 to {self._longest}: lower "
                "sampling.max_new_tokens, or take a model with a longer context"
            )
        return tokens

    def _talk(self, question: str | list[dict[str, str]], answer_text: str) -> list[int]:
        asked = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        talk = [*asked, {"role": "assistant", "content": answer_text}]
        # The template writes the special tokens itself.
        text = self._tokenizer.apply_chat_template(talk, tokenize=False)
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def _text(self, question: str | list[dict[str, str]], answer_text: str) -> list[int]:
        if not isinstance(question, str):
            raise Unreadable("the question is a list of messages: set serving.chat_template = true")
        return [int(token) for token in self._tokenizer.encode(question + answer_text)]

    def score(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """The logit of each text, in one forward pass over [texts, longest].

        A decoder finds the end of a text by the model's padding token. Where the model names none it is told one that no text
        of this batch has, so that the end is the last token, as without padding; where all are in use each text goes alone.
        """
        if self._pad is not None:
            return self._forward(texts, self._pad)
        used = {token for text in texts for token in text}
        free = next(token for token in range(len(used) + 1) if token not in used)
        if free >= self._text_config.vocab_size:
            return [value for text in texts for value in self._forward([text], None)]
        return self._forward(texts, free)

    def _forward(self, texts: Sequence[Sequence[int]], pad: int | None) -> list[float]:
        self._text_config.pad_token_id = pad
        lengths = torch.tensor([len(text) for text in texts])
        longest = int(lengths.max())
        ids = torch.full((len(texts), longest), pad or 0)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        mask = (torch.arange(longest) < lengths[:, None]).long()
        with torch.inference_mode():
            logits = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device)).logits
        found: list[float] = logits[:, 0].float().cpu().tolist()
        return found


def _tokenizer(folder: str, *, chat: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FunctionError(f"reward model {folder!r} has no tokenizer: {error}") from error
    if chat and not tokenizer.chat_template:
        raise FunctionError(
            f"reward model {folder!r} has no chat template, and serving.chat_template is true: set it to false"
        )
    return tokenizer


def _model(folder: str, dtype: torch.dtype) -> Any:
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise FunctionError(f"reward model {folder!r} cannot be loaded: {error}") from error
    if loaded["missing_keys"]:
        raise FunctionError(
            f"reward model {folder!r} lacks weights ({', '.join(sorted(loaded['missing_keys'])[:4])}), which would be made up: "
            "is it a language model? Name the folder of a trained sequence classifier"
        )
    if model.config.num_labels != 1:
        raise FunctionError(
            f"reward model {folder!r} has {model.config.num_labels} labels, and a reward is one number: name a model with "
            "num_labels = 1"
        )
    model.config.use_cache = False
    return model
