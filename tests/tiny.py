"""A model small enough for tests: random Qwen2 weights and a character tokenizer, written as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

ALPHABET = "0123456789+=;abcdefghijklmnopqrstuvwxyz "
EOS = "<eos>"


def write_model(
    folder: Path, *, tied: bool, seed: int = 0, hidden_size: int = 64, layers: int = 2, spread: float = 0.08
) -> Path:
    """Writes config, float32 weights and tokenizer to `folder` and returns it.

    `spread` is the standard deviation of the weights: large enough that logits differ by whole units, so that a wrong
    weight anywhere shows in the logprobs.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(ALPHABET) + 1,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        initializer_range=spread,
        eos_token_id=len(ALPHABET),
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):  # initialised to zero, where a lost bias would not show
                weight.normal_(0, spread)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def write_classifier(
    folder: Path,
    *,
    family: str = "qwen2",
    pad: str | None = "own",
    template: str = "",
    labels: int = 1,
    seed: int = 0,
) -> Path:
    """Writes a reward model with random float32 weights and its tokenizer to `folder` and returns it.

    `family`: qwen2 or llama. `pad`: its padding token is one of its `own`, that of the end (`eos`), or None.
    """
    torch.manual_seed(seed)
    kind, settings = {
        "qwen2": (Qwen2ForSequenceClassification, Qwen2Config),
        "llama": (LlamaForSequenceClassification, LlamaConfig),
    }[family]
    eos = len(ALPHABET)
    config = settings(
        vocab_size=eos + 1 + (pad == "own"),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id={"own": eos + 1, "eos": eos, None: None}[pad],
        num_labels=labels,
    )
    kind(config).save_pretrained(folder)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(folder)
    return folder


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: index for index, character in enumerate([*ALPHABET, EOS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
