"""Rivals that are replay buffers: Reverb's tables and TorchRL's storage. Their packages are imported only where they run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from rival_base import WAIT_S, Receive, Rival, Send, Turns
from rival_workload import PRODUCERS, Push, Rollout, Workload, pack


class Reverb(Rival):
    """A first-in-first-out table of DeepMind's replay server, over gRPC. An item is one rollout, as a learner samples
    those; nobody waits for the confirmation of a push. The server runs in the parent."""

    name = "reverb"
    package = "reverb"

    def open(self, resources: ExitStack) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import reverb

        table = reverb.Table.queue("rollouts", max_size=4 * self.workload.batch)
        # Its default is a folder that nobody removes.
        folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="rivals-"))
        server = reverb.Server([table], checkpointer=reverb.checkpointers.DefaultCheckpointer(folder))
        resources.callback(server.stop)
        self._address = f"localhost:{server.port}"

    def sending(self, producer: int) -> Iterator[Send]:
        import reverb

        with reverb.Client(self._address).writer(1, max_in_flight_items=self.workload.batch) as writer:

            def send(rollouts: Sequence[Rollout]) -> None:
                for rollout in rollouts:
                    writer.append([rollout.ids, rollout.logprobs, np.int32(rollout.version)])
                    writer.create_item("rollouts", num_timesteps=1, priority=1.0)

            yield send

    def receiving(self) -> Iterator[Receive]:
        import reverb
        import tensorflow as tf

        dataset = reverb.TrajectoryDataset(
            self._address,
            "rollouts",
            dtypes=[tf.int32, tf.float32, tf.int32],
            shapes=[tf.TensorShape([1, None]), tf.TensorShape([1, None]), tf.TensorShape([1])],
            max_in_flight_samples_per_worker=self.workload.batch,
            rate_limiter_timeout_ms=int(WAIT_S * 1000),
        )
        samples = dataset.as_numpy_iterator()

        def receive(_: int) -> Push:
            ids, logprobs, versions = next(samples).data
            return Push(ids[0], logprobs[0], np.array([ids.shape[1]], np.int32), versions)

        yield receive


class TorchrlMemmap(Rival):
    """TorchRL's `LazyMemmapStorage`, shared by the processes; turns are ours, as it has none. Rows have one shape: a row
    is a token, with its version and the number of its rollout (padding to the longest would be eight times as much)."""

    name = "torchrl memmap"
    package = "torchrl"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._turns = Turns(workload.slots)
        self._rows = self.most_tokens()

    def open(self, resources: ExitStack) -> None:
        from torchrl.data import LazyMemmapStorage

        folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="rivals-"))
        rows = PRODUCERS * self._turns.slots * self._rows
        self._storage = LazyMemmapStorage(rows, scratch_dir=folder)
        # All rows: what is set first decides on the columns, and nothing is read behind as many rows as were set.
        zeros = Rollout(np.zeros(rows, np.int32), np.zeros(rows, np.float32), 0)
        self._storage.set(slice(0, rows), self._as_tensors([zeros]))

    @staticmethod
    def _as_tensors(rollouts: Sequence[Rollout]) -> Any:
        import torch
        from tensordict import TensorDict

        push = pack(rollouts)
        columns = {
            "ids": push.ids,
            "logprobs": push.logprobs,
            "version": np.repeat(push.versions, push.lengths),
            "rollout": np.repeat(np.arange(len(rollouts), dtype=np.int32), push.lengths),
        }
        tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
        return TensorDict(tensors, batch_size=[len(push.ids)])

    def sending(self, producer: int) -> Iterator[Send]:
        def send(rollouts: Sequence[Rollout]) -> None:
            rows = self._as_tensors(rollouts)
            slot = self._turns.claim(producer)
            self._storage.set(slice(slot * self._rows, slot * self._rows + len(rows)), rows)
            self._turns.publish(slot, len(rows))

        yield send

    def receiving(self) -> Iterator[Receive]:
        def receive(_: int) -> Push:
            slot, amount = self._turns.take()
            rows = self._storage.get(slice(slot * self._rows, slot * self._rows + amount)).clone()
            self._turns.release(slot)
            lengths = np.bincount(rows["rollout"].numpy()).astype(np.int32)
            versions = rows["version"].numpy()[np.cumsum(lengths) - 1]
            return Push(rows["ids"].numpy(), rows["logprobs"].numpy(), lengths, versions)

        yield receive
