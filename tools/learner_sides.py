"""The sides that tools/bench_learner.py compares, each for a process of its own: one GRPO step over the same rollouts.

`packed` is the learner as it is. `padded` is the loop that one writes with transformers: rollouts padded on the right to the
longest of a micro-batch, whole logits, log_softmax; `padded, by length` the same with rollouts of like length together.
Both optimizers, clips, losses and dtypes are the same, so that losses and gradient norms must agree.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.objective_config import GRPO, Truncated
from asyncrl.learner.step import Learner

VERSION = 4
CAP = 2.0
RATE = 1e-5
BETAS = (0.9, 0.95)
MAX_NORM = 1.0

SIDES = ("padded", "padded, by length", "packed")


def resident_mb(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (at most since the program began) of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def run_side(pipe: Any, side: str, folder: str, table: pa.Table, budget: int, threads: int) -> None:
    """Loads, then a step for each message until None comes. Sends what each step gives."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    runner = (
        Packed(folder, budget, threads)
        if side == "packed"
        else Padded(folder, budget, by_length="by" in side)
    )
    loaded = resident_mb("VmRSS")
    pipe.send({"loaded_mb": loaded})
    while pipe.recv() is not None:
        start, busy = time.perf_counter(), time.process_time()
        figures = runner.step(table)
        took = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - busy}
        pipe.send({**figures, **took, "peak_mb": resident_mb("VmHWM")})


class Packed:
    def __init__(self, folder: str, budget: int, threads: int) -> None:
        config = LearnerConfig(
            device="cpu",
            cores=threads,
            learning_rate=RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=MAX_NORM,
            tokens_per_microbatch=budget,
            objective=GRPO(correction=Truncated(cap=CAP)),
        )
        self._learner = Learner(config, folder, 1.0)

    def step(self, table: pa.Table) -> dict[str, float]:
        metrics = self._learner.train(table, VERSION)
        computed = metrics.tokens_total + metrics.tokens_padded
        return {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "computed_tokens": computed}


class Padded:
    def __init__(self, folder: str, budget: int, *, by_length: bool) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.config.use_cache = False
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0)
        self._budget, self._by_length = budget, by_length

    def step(self, table: pa.Table) -> dict[str, float]:
        rollouts = table.to_pylist()
        advantages = self._advantages(rollouts)
        total = sum(len(rollout["tokens"]) for rollout in rollouts)
        loss, computed = 0.0, 0
        for chosen in self._micro_batches([len(r["prompt_tokens"]) + len(r["tokens"]) for r in rollouts]):
            part, size = self._loss([rollouts[i] for i in chosen], [advantages[i] for i in chosen])
            (part / total).backward()
            loss, computed = loss + part.item() / total, computed + size
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), MAX_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": loss, "grad_norm": float(norm), "computed_tokens": computed}

    def _advantages(self, rollouts: list[dict[str, Any]]) -> list[float]:
        groups: dict[int, list[float]] = {}
        for rollout in rollouts:
            groups.setdefault(rollout["group_id"], []).append(rollout["reward"])
        return [
            float((rollout["reward"] - np.mean(own)) / (np.std(own, ddof=1) + 1e-6))
            for rollout in rollouts
            for own in [groups[rollout["group_id"]]]
        ]

    def _micro_batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """As many rollouts as fit into the budget when they are padded to the longest of them."""
        order = np.argsort(lengths).tolist() if self._by_length else range(len(lengths))
        chosen: list[int] = []
        for index in order:
            longest = max(lengths[i] for i in [*chosen, index])
            if chosen and longest * (len(chosen) + 1) > self._budget:
                yield chosen
                chosen = []
            chosen.append(index)
        yield chosen

    def _loss(self, rollouts: list[dict[str, Any]], advantages: list[float]) -> tuple[torch.Tensor, int]:
        """The sum over the answer tokens, and how many positions were computed."""
        longest = max(len(r["prompt_tokens"]) + len(r["tokens"]) for r in rollouts)
        ids = torch.zeros(len(rollouts), longest, dtype=torch.int64)
        mask, answer = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
        behaviour = torch.zeros(ids.shape)
        for row, rollout in enumerate(rollouts):
            start = len(rollout["prompt_tokens"])
            end = start + len(rollout["tokens"])
            ids[row, :end] = torch.tensor([*rollout["prompt_tokens"], *rollout["tokens"]])
            mask[row, :end] = 1
            answer[row, start:end] = True
            behaviour[row, start:end] = torch.tensor(rollout["logprobs"])
        logits = self._model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        current = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        answer, behaviour = answer[:, 1:], behaviour[:, 1:]
        ratio = (current - current.detach()).exp()
        weight = (current.detach() - behaviour).exp().clamp(max=CAP)
        losses = -weight * ratio * torch.tensor(advantages)[:, None]
        return losses[answer].sum(), ids.numel()
