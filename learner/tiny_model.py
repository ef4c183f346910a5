"""A new, small Qwen2 with a character tokenizer: what the supervised warm start trains when no model is given.

The tokenizer maps each character of the alphabet to one token, so decode(encode(text)) == text. Called by `sft`.
"""

from __future__ import annotations

import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from asyncrl.learner.config import HEAD_SIZES

PAD, EOS = "<pad>", "<eos>"
WEIGHT_STD = 0.05
"""At widths of about 100, the usual 0.02 costs half as many steps again before the first sums are right."""


def character_tokenizer(alphabet: str) -> Qwen2Tokenizer:
    """Ids in the order of `alphabet`, then <pad>, then <eos>. Encoding adds no special token.

    A byte-level BPE without merges: transformers loads every folder of model type qwen2 as that class, whatever
    tokenizer the folder names, and a tokenizer of another kind would come back changed. One byte is one token, so the
    alphabet is ASCII. Characters outside it are lost in encoding (byte-level BPE has no unknown token).
    Raises ValueError if a character is not ASCII or comes twice.
    """
    wrong = sorted({c for c in alphabet if alphabet.count(c) > 1 or not c.isascii()})
    if wrong or not alphabet:
        raise ValueError(
            f"sft.alphabet must be ASCII characters, each once; not so: {wrong or 'it is empty'}"
        )
    names = [_byte_name(c) for c in alphabet]
    vocabulary = {name: index for index, name in enumerate([*names, PAD, EOS])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=None,  # type: ignore[arg-type]
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _byte_name(character: str) -> str:
    """How a byte-level vocabulary spells the character: itself, or for control characters and space a stand-in."""
    (((name, _)),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(
        character
    )
    return name


def new_model(
    tokenizer: Qwen2Tokenizer, *, hidden_size: int, layers: int, heads: int, max_tokens: int, seed: int
) -> PreTrainedModel:
    """A Qwen2 with random float32 weights and tied embeddings, the same for the same seed.

    Raises ValueError if hidden_size / heads is not a head size that the engines have.
    """
    if hidden_size % heads or hidden_size // heads not in HEAD_SIZES:
        raise ValueError(
            f"sft: hidden_size / heads must be one of {HEAD_SIZES}, got {hidden_size} / {heads} = {hidden_size / heads:g}"
        )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_tokens,
        initializer_range=WEIGHT_STD,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
