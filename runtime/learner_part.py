"""One learner rank's process: reads batches, trains, publishes, commits. Rank 0 alone talks to buffer and engines.

Made by `placement` as a Ray actor. The supervisor calls `publish` and `train` on every rank at once (they are
collectives) and the rest on rank 0.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from asyncrl.buffer import BlockingBufferClient, BufferAddress
from asyncrl.buffer.columns import slices
from asyncrl.buffer.keys import read_server_keys
from asyncrl.buffer.records import Selection
from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.learner.metrics import StepMetrics
from asyncrl.learner.step import Learner
from asyncrl.recipes import Recipe
from asyncrl.recipes.sizes import wire_dtype
from asyncrl.runtime.checkpoints import Checkpoints
from asyncrl.runtime.door import Door
from asyncrl.runtime.part_log import write_log_to
from asyncrl.runtime.publishing import AnyPublisher, Share, open_publisher, open_share
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.sending import Sender
from asyncrl.runtime.sync_choice import Way
from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.report import SyncReport
from asyncrl.weight_sync.welcomer import Welcomer

_PROBE_TOKENS = 16
_BROADCASTS = 5
"""How often a version is broadcast that was called off because an engine dropped out of it: each time without that one."""


class Handover(msgspec.Struct, frozen=True, kw_only=True):
    """What the batch itself shows, recounted from its columns: the bound is not taken on trust."""

    staleness_min: int
    staleness_mean: float
    staleness_max: int
    """Over every sampled token handed over; 0 where there is none."""
    trained_tokens: int
    tokens_past_bound: int
    """Trainable tokens past the bound: must be 0."""
    spanning_rollouts: int
    versions_in_rollout_max: int


class StepOutcome(msgspec.Struct, frozen=True, kw_only=True):
    selection: Selection
    handover: Handover
    metrics: StepMetrics
    sync: SyncReport
    welcomes: list[SyncReport]
    """Of engines that came, or took a version by themselves, since the step before."""
    train_s: float
    publish_s: float

    @property
    def reports(self) -> list[SyncReport]:
        """All that is known of weights on their way since the step before."""
        return [self.sync, *self.welcomes]


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint whose state is in memory, on its way to the disk."""

    step: int
    version: int
    frontier: int


class LearnerPart:
    """`start`, `meet` (rank 0), `restore` where the run goes on, `publish` of the present version, then `read` (rank 0) and
    `train` for each step, `checkpoint` between two steps, `save`, `close`."""

    def __init__(
        self, recipe: Recipe, folder: str, rank: int, address: str, run_id: str, host: str, way: Way = "host"
    ) -> None:
        self._folder = RunFolder(Path(folder))
        write_log_to(self._folder.log(f"learner-{rank}"))
        self._recipe, self._rank, self._host, self._run_id, self._way = recipe, rank, host, run_id, way
        self._learner = Learner(
            recipe.learner,
            recipe.model.path,
            recipe.sampling.temperature,
            rank,
            recipe.learner.ranks,
            address,
        )
        sync = recipe.weight_sync
        self._plan = self._learner.plan(sync.bucket_bytes, wire_dtype(recipe), sync.senders)
        self._door: Door | None = None
        self._publisher: AnyPublisher | None = None
        self._share: Share | None = None
        """This rank's part in rank 0's publisher."""
        self._sender: Sender | None = None
        self._welcomer: Welcomer | None = None
        self._welcomes: list[SyncReport] = []
        """Since the last step, as far as they were asked for."""
        self._buffer: BlockingBufferClient | None = None
        self._batch: tuple[Selection, pa.RecordBatch] | None = None
        self._version = -1
        self._step = 0
        self._outcome: StepOutcome | None = None
        self._taken: Taken | None = None
        self._taken_at = -1
        """Step of the last checkpoint."""

    def start(self) -> str:
        """The endpoint that engines join, on rank 0; empty on the others. A collective."""
        recipe, learner = self._recipe, self._learner
        if self._rank:
            self._share = open_share(
                recipe, self._way, self._plan, learner.ranks, learner.device, host=self._host
            )
            return ""
        self._door = Door(read_server_keys(self._folder.keys))
        self._publisher = open_publisher(
            recipe,
            self._way,
            self._plan,
            learner.ranks,
            learner.device,
            run_id=self._run_id,
            host=self._host,
            secure=self._door.secure,
        )
        return self._publisher.endpoint

    def meet(self, buffer: BufferAddress) -> None:
        """Connects to the buffer. Engines that join are welcomed from now on, as soon as there is a version to give them."""
        if self._publisher is None:
            raise RuntimeError("meet is for rank 0, after start")
        self._buffer = BlockingBufferClient(buffer)
        self._welcomer = Welcomer(self._publisher)

    def restore(self, step: int, version: int, learner: bool) -> None:
        """Weights, optimizer and buffer become what they were at `step`; `publish(version)` comes next. A collective.

        Without `learner` the weights are those that the model came with.
        """
        if learner:
            self._learner.restore(Checkpoints(self._folder).learner_state(step))
        if self._buffer is not None:
            self._buffer.restore(step)
        self._step, self._version = step, version

    def publish(self, version: int) -> SyncReport | None:
        """Sends the present weights as `version`. A collective; the report is rank 0's."""
        report = self._send(version, again=False)
        self._version = version
        return report

    def publish_again(self) -> None:
        """Broadcasts the present version to the engines that are `behind`. A collective."""
        report = self._send(self._version, again=True)
        if report is not None:
            self._welcomes.append(report)

    def _send(self, version: int, *, again: bool) -> SyncReport | None:
        probe = self._probe()
        with self._welcomer.paused() if self._welcomer else contextlib.nullcontext():
            return self._sends().send(version, probe, again=again)

    def behind(self) -> list[str]:
        """Engines that came since the present version was broadcast; none where they are brought to it by themselves."""
        if not isinstance(self._publisher, CollectivePublisher) or self._welcomer is None:
            return []
        with self._welcomer.paused():
            return self._publisher.behind

    def _sends(self) -> Sender:
        if self._sender is None:
            timeout_s = self._recipe.weight_sync.timeout_s
            attempts = _BROADCASTS if self._way == "collective" else 1
            self._sender = Sender(
                self._learner, self._plan, self._publisher or self._share, timeout_s, attempts
            )
        return self._sender

    def admit_prompts(self) -> None:
        """Tells the buffer that the present version is live: prompts may come."""
        self._client().publish(self._version)

    def read(self, timeout_s: float) -> Selection | None:
        """Takes the next batch from the buffer; None when there was none yet."""
        if self._welcomer is not None:
            self._welcomer.check()
        if self._batch is None:
            self._batch = self._client().read_batch(timeout_s)
        return self._batch[0] if self._batch is not None else None

    def out_of_service(self) -> dict[str, str]:
        """Engines that versions went on without since the last step, and why. They may be all that the next batch waits for."""
        if self._welcomer is not None:
            self._welcomes += self._welcomer.take_reports()
        return {name: why for report in self._welcomes for name, why in report.out_of_service.items()}

    def train(self) -> StepOutcome | None:
        """One step on the batch that rank 0 read: train, publish, commit. A collective; the outcome is rank 0's."""
        start = time.monotonic()
        batch, self._batch = self._batch, None
        table = pa.Table.from_batches([batch[1]]) if batch else None
        metrics = self._learner.train(table, self._version)
        self._step += 1
        trained = time.monotonic()
        sync = self.publish(self._version + 1)
        if batch is None or sync is None:
            return None
        published = time.monotonic()
        selection, rows = batch
        self._client().commit(selection.batch_ids, self._version)
        self._outcome = StepOutcome(
            selection=selection,
            handover=examine(rows, selection.version, self._recipe.staleness.max_staleness_versions),
            metrics=metrics,
            sync=sync,
            welcomes=self._take_welcomes(),
            train_s=trained - start,
            publish_s=published - trained,
        )
        return self._outcome

    def checkpoint(self, keep: tuple[int, ...], learner: bool) -> Taken | None:
        """Takes the buffer's snapshot of the present step, and the learner's state with it, which is written in the background.
        A collective; the answer is rank 0's. Of the buffer's snapshots those of the steps in `keep` stay.

        Waits for the checkpoint before to be written. Without `learner` the buffer's part is all. Asked again for the same step,
        by one who did not hear the answer, it gives that again.
        """
        step = self._step
        if self._taken_at == step:
            return self._taken
        if self._buffer is not None:
            Checkpoints(self._folder).make_room(step)
            found = self._buffer.snapshot(step, keep)
            self._taken = Taken(step=step, version=found.version, frontier=found.frontier)
        if learner:
            self._learner.checkpoint(Checkpoints(self._folder).learner_state(step))
        self._taken_at = step
        return self._taken

    def checkpoint_finished(self, timeout_s: float) -> None:
        """Waits for the learner's state to be written; what went wrong with that is raised here. Called on every rank."""
        self._learner.checkpoint_finished(timeout_s)

    def steps_done(self) -> int:
        return self._step

    def last_outcome(self) -> StepOutcome | None:
        """Of the last step that was trained here, for whoever stopped waiting for it."""
        return self._outcome

    def save(self) -> None:
        """Writes the present model to the run folder, in the place of an earlier one. A collective."""
        new = self._folder.model.with_name(f"{self._folder.model.name}.of-step-{self._step}")
        if self._rank == 0 and new.exists():
            shutil.rmtree(new)  # a death left it
        self._learner.save(new)
        if self._rank == 0:
            if self._folder.model.exists():
                shutil.rmtree(self._folder.model)
            new.rename(self._folder.model)

    def close(self) -> None:
        if self._welcomer is not None:
            self._welcomer.close()
        if self._publisher is not None:
            self._publisher.close()
        if self._share is not None:
            self._share.close()
        if self._door is not None:
            self._door.close()
        if self._buffer is not None:
            self._buffer.close()
        self._learner.close()

    def _take_welcomes(self) -> list[SyncReport]:
        taken = self._welcomes + (self._welcomer.take_reports() if self._welcomer else [])
        self._welcomes = []
        return taken

    def _client(self) -> BlockingBufferClient:
        if self._buffer is None:
            raise RuntimeError("this rank has not met the buffer: call meet on rank 0 first")
        return self._buffer

    def _probe(self) -> Probe | None:
        """Random tokens, the same for every version, with the learner's logprobs of them. A collective.

        Computed for each version, also where proven engines are not asked: one that comes later takes that version first.
        """
        verify = self._recipe.weight_sync.verify
        if verify == "never":
            return None
        vocabulary = self._learner.vocabulary_size
        tokens = random.Random(0).choices(range(vocabulary), k=_PROBE_TOKENS)
        logprobs = self._learner.logprobs(tokens)
        tolerance = self._recipe.weight_sync.verify_tolerance
        every = verify == "always"
        return Probe(tokens=tuple(tokens), logprobs=tuple(logprobs), tolerance=tolerance, every=every)


def examine(rows: pa.RecordBatch, version: int, bound: int) -> Handover:
    """Recounts a batch of `schema.BATCH` that was handed over at `version`. Tokens of the environment have no age, and one
    that is trainable counts as past the bound."""
    versions = slices(rows["versions"])
    flat = np.concatenate(versions)
    trainable = np.concatenate(slices(rows["trainable"]))
    sampled = flat != ENVIRONMENT
    every = version - flat
    past = ~sampled | (every > bound) | (every < 0)
    ages = every[sampled] if sampled.any() else np.zeros(1, np.int32)
    kinds = [len(np.unique(v[v != ENVIRONMENT])) for v in versions]
    return Handover(
        staleness_min=int(ages.min()),
        staleness_mean=float(ages.mean()),
        staleness_max=int(ages.max()),
        trained_tokens=int(trainable.sum()),
        tokens_past_bound=int((trainable & past).sum()),
        spanning_rollouts=sum(k > 1 for k in kinds),
        versions_in_rollout_max=max(kinds),
    )
