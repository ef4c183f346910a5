"""One rank of the learner: a batch in, new weights and figures out.

    table --share--> every rank --divide--> micro-batches --forward/backward--> gradients --clip--> AdamW
                                     \\-- current logprobs, whole on every rank --> checks and figures

Invariants:
- All public methods but `plan` and `close` are collectives: every rank calls them in the same order.
- No optimizer step is taken on a loss or gradient that is not finite; all ranks then raise the same `NonFiniteLoss`.
- The gradient does not depend on the division into ranks and micro-batches: the loss is a sum over tokens with weights that
  come from the whole minibatch, and a forward pass has whole rollouts.
One thread of one process per rank calls it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from asyncrl.learner.aggregation import weighted_sum
from asyncrl.learner.batch import Batch, make_microbatches, read_table, split_groups
from asyncrl.learner.columns import Columns
from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.distributed import init_distributed, leave_distributed, share_table, this_device
from asyncrl.learner.metrics import StepMetrics, learning_figures, mismatch_figures, size_figures
from asyncrl.learner.model import checkpoint_parameters, load_policy
from asyncrl.learner.objective import token_losses
from asyncrl.learner.objective_needs import missing_parts, needs_of
from asyncrl.learner.optimizer import adamw
from asyncrl.learner.preparation import fresh_columns
from asyncrl.learner.rows import MicroBatch, assemble, rows_of
from asyncrl.learner.trained import Schedule, Trained
from asyncrl.learner.weights import save_folder, whole
from asyncrl.weight_sync.plan import Bucket, Plan, make_plan

logger = logging.getLogger(__name__)

_NAMED_ROLLOUTS = 8
"""How many rollouts an error names."""


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite. The weights are those of before the optimizer step."""


class Learner:
    """`rank` of `ranks`, which meet at `address` (host:port; unused with one rank)."""

    def __init__(
        self,
        config: LearnerConfig,
        model_path: str | Path,
        temperature: float,
        rank: int = 0,
        ranks: int = 1,
        address: str = "",
    ) -> None:
        """`temperature` is the sampling temperature: logprobs are of the distribution that was sampled from.

        Raises ValueError for an objective that needs a part which there is not.
        """
        for key, _, advice in missing_parts(config.objective):
            raise ValueError(f"{key} {advice}")
        if config.device == "cpu":
            torch.set_num_threads(config.cores)
        mesh = init_distributed(
            rank, ranks, address, config.device, config.step_timeout_s, start_timeout_s=config.start_timeout_s
        )
        self._config, self._model_path, self._temperature = config, model_path, temperature
        self._rank, self._ranks = rank, ranks
        self._needs = needs_of(config.objective)
        self._device = this_device(config.device)
        self._policy = load_policy(model_path, mesh, config.dtype)
        parameters = checkpoint_parameters(self._policy)
        betas = (config.adam_beta1, config.adam_beta2)
        self.trained = {
            "policy": Trained(
                module=self._policy,
                parameters=parameters,
                optimizer=adamw(parameters.values(), betas, config.weight_decay),
                schedule=Schedule(config.learning_rate, config.warmup_steps, config.decay_steps),
            )
        }
        """By name: all that an optimizer moves."""
        self._seconds = {"forward_s": 0.0, "backward_s": 0.0, "optimizer_s": 0.0, "gather_s": 0.0}

    def train(self, table: pa.Table | None, version: int) -> StepMetrics:
        """Trains on one batch of schema `buffer.schema.BATCH`, handed over while `version` was the learner's own.

        Rank 0 gives the table; the others give None and get it from rank 0. Raises `NonFiniteLoss`, or ValueError for a table
        that is not a batch.
        """
        start = self._clock()
        table, version = share_table(table, version, self._rank, self._device)
        batch = read_table(table)
        minibatches = split_groups(batch.group, self._config.minibatches_per_step)
        passes = [self._divide(batch, rows) for rows in minibatches]
        columns = fresh_columns(batch, minibatches, version, self._config.objective, self._device)
        if "proximal" in self._needs.logprobs:
            self._proximal_of_later(batch, minibatches[1:], passes[1:], columns)
        losses, norms = [], []
        for index, (rows, part) in enumerate(zip(minibatches, passes, strict=True)):
            loss, norm = self._minibatch(batch, rows, part, columns, first=index == 0)
            losses.append(loss)
            norms.append(norm)
        seconds = self._clock() - start
        figures = {
            **learning_figures(batch, columns, self._config.objective),
            **mismatch_figures(batch, columns.proximal.cpu().numpy(), version),
            **size_figures(batch),
            **self._seconds,
        }
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return StepMetrics(
            loss=float(np.mean(losses)),
            grad_norm=float(np.mean(norms)),
            learning_rate=self.trained["policy"].learning_rate,
            optimizer_steps=float(self.trained["policy"].steps_taken),
            tokens_padded=self._padding(passes),
            step_s=seconds,
            tokens_per_s=figures["tokens_total"] / seconds,
            **figures,
        )

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding: every token id is below it."""
        return int(self._policy.lm.config.vocab_size)

    def plan(self, bucket_bytes: int, wire_dtype: str | None = None) -> Plan:
        """The buckets of this model's parameters, in checkpoint names, tied ones once; the same on every rank.

        `wire_dtype`: a torch dtype's name, or None for that of the masters.
        """
        specs = [
            (name, wire_dtype or str(parameter.dtype).removeprefix("torch."), tuple(parameter.shape))
            for name, parameter in self.trained["policy"].parameters.items()
        ]
        return make_plan(specs, bucket_bytes)

    def gather(self, bucket: Bucket) -> dict[str, torch.Tensor]:
        """The bucket's tensors, whole, in the plan's dtypes, on the learner's device. A collective.

        Valid until the next `train`: on one rank they may be the masters themselves.
        """
        start = self._clock()
        parameters = self.trained["policy"].parameters
        tensors = {
            spec.name: whole(parameters[spec.name], getattr(torch, spec.dtype)) for spec in bucket.tensors
        }
        self._seconds["gather_s"] += self._clock() - start
        return tensors

    def logprobs(self, tokens: list[int]) -> list[float]:
        """Logprob of each token after the first at temperature 1: [len(tokens) - 1]. A collective, same tokens on all ranks."""
        rows = rows_of([(tokens[:1], tokens[1:])])
        part = assemble(rows, np.zeros(1, dtype=np.int64)).to(self._device)
        return [float(value) for value in self._policy.logprobs_no_grad(part, 1.0).cpu()]

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder, atomically, on rank 0. A collective. Raises FileExistsError if it is there."""
        save_folder(self._policy, self._model_path, Path(folder), rank=self._rank)

    def close(self) -> None:
        """Leaves the process group; the learner cannot be used any more."""
        leave_distributed()

    def _divide(self, batch: Batch, rows: np.ndarray) -> list[MicroBatch]:
        return make_microbatches(batch, rows, self._config.tokens_per_microbatch, self._rank, self._ranks)

    def _proximal_of_later(
        self, batch: Batch, later: list[np.ndarray], passes: list[list[MicroBatch]], columns: Columns
    ) -> None:
        """Minibatches after the first see moved weights, so their proximal logprobs are computed before any step."""
        if not later:
            return
        start = self._clock()
        mine = torch.zeros_like(columns.current)
        for part in (part for minibatch in passes for part in minibatch):
            part = part.to(self._device)
            mine[part.place] = self._policy.logprobs_no_grad(part, self._temperature)
        dist.all_reduce(mine)
        places = torch.from_numpy(batch.sequences.tokens_of(np.concatenate(later))).to(self._device)
        columns.proximal[places] = mine[places]
        self._seconds["forward_s"] += self._clock() - start

    def _minibatch(
        self, batch: Batch, rows: np.ndarray, passes: list[MicroBatch], columns: Columns, *, first: bool
    ) -> tuple[float, float]:
        """Gradients of one minibatch, and the optimizer step if they are finite. Returns loss and gradient norm."""
        mine = torch.zeros((1 + self._needs.entropy, batch.tokens), device=self._device)
        places = torch.from_numpy(batch.sequences.tokens_of(rows)).to(self._device)
        for part in passes:
            self._micro_batch(part, columns, mine, first=first)
        dist.all_reduce(mine)
        columns.current[places] = mine[0, places]
        if self._needs.entropy:
            columns.entropy[places] = mine[1, places]
        if first:
            columns.proximal[places] = mine[0, places]
        loss = self._check_losses(batch, columns, places)
        start = self._clock()
        norm = self._take_step(batch, rows, skip=not bool(columns.trainable[places].any()))
        self._seconds["optimizer_s"] += self._clock() - start
        return loss, norm

    def _micro_batch(self, part: MicroBatch, columns: Columns, mine: torch.Tensor, *, first: bool) -> None:
        start = self._clock()
        part = part.to(self._device)
        place = part.place
        out = self._policy(part, self._temperature, with_entropy=self._needs.entropy)
        out = out.view(1 + self._needs.entropy, len(place))
        mine[:, place] = out.detach()
        own = columns.at(place)
        own = dataclasses.replace(
            own,
            current=out[0],
            entropy=out[1] if self._needs.entropy else own.entropy,
            proximal=out[0].detach() if first else own.proximal,
        )
        # FSDP averages gradients over the ranks; the loss is a sum over them.
        loss = weighted_sum(token_losses(self._config.objective, own), own.weights) * self._ranks
        forwarded = self._clock()
        loss.backward()  # type: ignore[no-untyped-call]
        self._seconds["forward_s"] += forwarded - start
        self._seconds["backward_s"] += self._clock() - forwarded

    def _check_losses(self, batch: Batch, columns: Columns, places: torch.Tensor) -> float:
        """The minibatch's loss. Raises `NonFiniteLoss`, on every rank alike, if a trainable token's is not finite."""
        own = columns.at(places)
        losses = token_losses(self._config.objective, own)
        wrong = places[~losses.isfinite() & own.trainable]
        if len(wrong):
            self.trained["policy"].forget_gradients()
            rows = np.unique(batch.sequences.row_of_token()[wrong.cpu().numpy()])
            raise NonFiniteLoss(f"loss is not finite on {len(wrong)} tokens of {_named(batch, rows)}")
        return float(weighted_sum(losses.double(), own.weights))

    def _take_step(self, batch: Batch, rows: np.ndarray, *, skip: bool) -> float:
        policy = self.trained["policy"]
        size = policy.clip(self._config.max_grad_norm)
        if not np.isfinite(size):
            policy.forget_gradients()
            raise NonFiniteLoss(f"gradient norm is {size} on {_named(batch, rows)}")
        if skip:
            policy.forget_gradients()
        else:
            policy.step()
        return size

    def _padding(self, passes: list[list[MicroBatch]]) -> float:
        mine = sum(part.padding for minibatch in passes for part in minibatch)
        total = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total)

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _named(batch: Batch, rows: np.ndarray) -> str:
    """`rollouts 7 (versions 3-4), 9 (version 4) and 12 more`: what to look up in the run's rollouts."""
    names = []
    starts = batch.sequences.answer_starts
    for row in rows[:_NAMED_ROLLOUTS]:
        of_row = slice(starts[row], starts[row + 1])
        versions = batch.versions[of_row][batch.sampled[of_row]]
        span = "no sampled tokens" if not len(versions) else f"versions {versions.min()}-{versions.max()}"
        names.append(f"{batch.rollout_id[row]} ({span})")
    more = len(rows) - len(names)
    return f"rollouts {', '.join(names)}" + (f" and {more} more" if more else "")
