"""Rivals on Ray: its object store, and TransferQueue. Their packages are imported only where they run."""

from __future__ import annotations

import functools
import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
import psutil
from rival_base import WAIT_S, Receive, Rival, Send, Turns
from rival_workload import PRODUCERS, Push, Rollout, Workload, pack


def start_ray(resources: ExitStack) -> str:
    """A Ray of this run's own, and its address. It ends with `resources`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    folder = tempfile.TemporaryDirectory(prefix="rivals-", ignore_cleanup_errors=True)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        num_cpus=8,  # logical: all actors of a rival are placed, however few cores there are
        object_store_memory=2**28,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace="rivals",
        _temp_dir=resources.enter_context(folder),
    )
    resources.callback(ray.shutdown)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would leave our folder and workers
    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def joined_ray(address: str) -> Iterator[None]:
    import ray

    ray.init(address, namespace="rivals", log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


class RayObjects(Rival):
    """`ray.put` of each push, its reference through `ray.util.queue.Queue`; the consumer maps the object store."""

    name = "ray objects"
    package = "ray"

    def open(self, resources: ExitStack) -> None:
        self._address = start_ray(resources)
        # The parent's handle keeps the actor for the workers, who get it by name.
        resources.callback(self._queue().shutdown, force=True)

    def _queue(self) -> Any:
        from ray.util.queue import Queue

        return Queue(PRODUCERS * self.workload.slots, {"name": "pushes", "get_if_exists": True})

    def sending(self, producer: int) -> Iterator[Send]:
        import ray

        with joined_ray(self._address):
            pushed = self._queue()
            # In a list: Ray would replace a bare reference by its object.
            yield lambda rollouts: pushed.put([ray.put(tuple(pack(rollouts)))], timeout=WAIT_S)

    def receiving(self) -> Iterator[Receive]:
        import ray

        with joined_ray(self._address):
            pushed = self._queue()
            yield lambda _: Push(*ray.get(pushed.get(timeout=WAIT_S)[0], timeout=WAIT_S))


class TransferQueue(Rival):
    """TransferQueue with its SimpleStorage in its default shape: a controller knows which rows are ready, rows hold
    nested tensors and are cleared once read. Turns are ours, so that the consumer never asks too early."""

    name = "TransferQueue"
    package = "transfer_queue"
    _fields: ClassVar = ["ids", "logprobs", "version"]

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._turns = Turns(workload.slots)

    def open(self, resources: ExitStack) -> None:
        # It warns at every call of more threads than cores.
        os.environ.setdefault("TQ_NUM_THREADS", str(min(8, psutil.cpu_count(logical=False) or 1)))
        self._address = start_ray(resources)
        import transfer_queue

        transfer_queue.init({"controller": {"polling_mode": True}})
        resources.callback(transfer_queue.close)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        import transfer_queue

        with joined_ray(self._address):
            transfer_queue.init()
            yield transfer_queue.get_client()

    def sending(self, producer: int) -> Iterator[Send]:
        import torch
        from tensordict import TensorDict

        def send(rollouts: Sequence[Rollout]) -> None:
            push = pack(rollouts)
            offsets = torch.from_numpy(np.cumsum([0, *push.lengths]))
            nested = functools.partial(torch.nested.nested_tensor_from_jagged, offsets=offsets)
            columns = {
                "ids": nested(torch.from_numpy(push.ids)),
                "logprobs": nested(torch.from_numpy(push.logprobs)),
                "version": torch.from_numpy(push.versions[:, None]),
            }
            slot = self._turns.claim(producer)
            client.put(TensorDict(columns, batch_size=[len(rollouts)]), partition_id="rollouts")
            self._turns.publish(slot, len(rollouts))

        with self._client() as client:
            yield send

    def receiving(self) -> Iterator[Receive]:
        def receive(wanted: int) -> Push:
            """Takes pushes until there are enough, and reads them at once."""
            turns = [self._turns.take()]
            while (rows := sum(rows for _, rows in turns)) < wanted:
                turns.append(self._turns.take())
            meta = client.get_meta(self._fields, rows, partition_id="rollouts", task_name="train")
            data = client.get_data(meta)
            client.clear_samples(meta)
            for slot, _ in turns:
                self._turns.release(slot)
            ids, logprobs, versions = (data[name].values().numpy() for name in self._fields)
            return Push(ids, logprobs, data["ids"].offsets().diff().numpy(), versions)

        with self._client() as client:
            yield receive
