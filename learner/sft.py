"""Supervised fine-tuning on prompt/answer pairs: how the tiny models of the quickstarts come to be.

The same model code as the learner's, on one rank in the calling process: cross-entropy on those answer tokens that are to be
imitated (what an environment says is context), AdamW with warm-up and, if asked for, cosine decay. The output folder is there whole or not at all.
Called by the `sft` command; one call at a time per process, none while a `Learner` lives in it.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from asyncrl.learner.config import SFTConfig
from asyncrl.learner.distributed import Device, init_distributed, leave_distributed
from asyncrl.learner.division import divide
from asyncrl.learner.model import Policy, checkpoint_parameters, load_policy
from asyncrl.learner.optimizer import adamw, cosine, set_learning_rate, warmed_up
from asyncrl.learner.rows import Rows, assemble, rows_of
from asyncrl.learner.tiny_model import character_tokenizer, new_model
from asyncrl.learner.weights import save_folder

logger = logging.getLogger(__name__)

Pair = tuple[Sequence[int], Sequence[int], Sequence[bool]]
"""(prompt tokens, answer tokens, which of these are imitated); the answer ends with the token that is to end it, such as the
tokenizer's eos."""

BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
TOKENS_PER_PASS = 8192
MAX_TOKENS_OF_NEW_MODEL = 1024
TIMEOUT_S = 600.0


class SFTProgress(msgspec.Struct, frozen=True, kw_only=True):
    """After one optimizer step."""

    step: int
    """From 1."""
    steps: int
    loss: float
    """Nats per imitated token."""
    learning_rate: float
    tokens_per_s: float
    """Prompt and answer tokens, without padding."""


def sft_tokenizer(config: SFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that `config` makes: that of `init`, or a character tokenizer of `alphabet`."""
    return AutoTokenizer.from_pretrained(config.init) if config.init else character_tokenizer(config.alphabet)


def train_sft(
    config: SFTConfig,
    pairs: Iterable[Pair],
    out: Path,
    *,
    cores: int = 1,
    device: Device = "cpu",
    progress: Callable[[SFTProgress], None] | None = None,
) -> None:
    """Trains `config.steps` steps of `config.pairs_per_step` pairs each and writes the model folder `out`.

    `pairs` are tokenised with `sft_tokenizer(config)`, in training order; steps x pairs_per_step of them are used. Raises
    ValueError if there are fewer or a pair is empty, FileExistsError (at once) if `out` is there.
    """
    if out.exists():
        raise FileExistsError(
            f"{out} is there already; a saved model is never overwritten: remove it or choose another"
        )
    if device == "cpu":
        torch.set_num_threads(cores)
    mesh = init_distributed(0, 1, "", device, TIMEOUT_S)
    try:
        with tempfile.TemporaryDirectory(prefix="asyncrl-sft-") as scratch:
            start_folder = config.init or _write_new_model(config, Path(scratch))
            policy = load_policy(start_folder, mesh, "float32")
            _train(policy, config, iter(pairs), mesh, progress)
            save_folder(policy, start_folder, out, rank=0)
    finally:
        leave_distributed()


def _write_new_model(config: SFTConfig, folder: Path) -> str:
    tokenizer = character_tokenizer(config.alphabet)
    model = new_model(
        tokenizer,
        hidden_size=config.hidden_size,
        layers=config.layers,
        heads=config.heads,
        max_tokens=MAX_TOKENS_OF_NEW_MODEL,
        seed=config.seed,
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def _train(
    policy: Policy,
    config: SFTConfig,
    pairs: Iterator[Pair],
    mesh: DeviceMesh,
    progress: Callable[[SFTProgress], None] | None,
) -> None:
    """The loop waits for nothing but the computation, and ends after `config.steps` steps."""
    parameters = list(checkpoint_parameters(policy).values())
    optimizer = adamw(parameters, BETAS, weight_decay=0.0)
    device = torch.device(mesh.device_type)
    for step in range(1, config.steps + 1):
        start = time.perf_counter()
        rows, imitated = _take(pairs, config, step)
        loss = _gradients(policy, rows, imitated, device)
        rate = _rate(config, step)
        set_learning_rate(optimizer, rate)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"sft step {step}: the loss is {loss}; lower sft.learning_rate ({config.learning_rate})"
            )
        if progress:
            speed = float(rows.lengths.sum()) / (time.perf_counter() - start)
            progress(
                SFTProgress(step=step, steps=config.steps, loss=loss, learning_rate=rate, tokens_per_s=speed)
            )


def _rate(config: SFTConfig, step: int) -> float:
    if config.cosine_decay:
        return cosine(config.learning_rate, step, config.warmup_steps, config.steps)
    return warmed_up(config.learning_rate, step, config.warmup_steps)


def _take(pairs: Iterator[Pair], config: SFTConfig, step: int) -> tuple[Rows, torch.Tensor]:
    """One step's rows, and which of their answer tokens are imitated: [tokens] bool."""
    taken = list(itertools.islice(pairs, config.pairs_per_step))
    if len(taken) < config.pairs_per_step:
        have = (step - 1) * config.pairs_per_step + len(taken)
        need = config.steps * config.pairs_per_step
        raise ValueError(
            f"sft.source {config.source!r} gave {have} pairs, sft.steps x sft.pairs_per_step = {need} are needed: "
            "lower one of the two or repeat the source"
        )
    rows = rows_of([(prompt, answer) for prompt, answer, _ in taken])
    if not (np.diff(rows.prompt_starts).all() and all(any(imitated) for _, _, imitated in taken)):
        raise ValueError(
            f"sft.source {config.source!r}, step {step}: a pair has an empty prompt, or nothing to imitate"
        )
    imitated = np.concatenate([np.asarray(flags, dtype=bool) for _, _, flags in taken])
    if len(imitated) != len(rows.answers):
        raise ValueError(
            f"sft.source {config.source!r}, step {step}: {len(imitated)} flags for {len(rows.answers)} answer tokens"
        )
    return rows, torch.from_numpy(imitated)


def _gradients(policy: Policy, rows: Rows, imitated: torch.Tensor, device: torch.device) -> float:
    """Accumulates the gradients of the mean cross-entropy over the imitated tokens; returns it."""
    total, count = 0.0, int(imitated.sum())
    for chosen in divide(rows.lengths, TOKENS_PER_PASS, 1)[0]:
        part = assemble(rows, chosen)
        logprobs = policy(part.to(device), 1.0)
        loss = -logprobs[imitated[part.place].to(device)].sum() / count
        loss.backward()
        total += float(loss.detach())
    return total
