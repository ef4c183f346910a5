"""Other ways to move rollouts than asyncrl's buffer, on one workload: what `bench_buffer.py` compares it with.

    python tools/buffer_rivals.py --rollouts 4096 --pushes 8,256 --json FILE

Two producer processes push rollouts, one consumer reads batches and touches every token. The clock runs from the
moment at which all are ready until the consumer has added up the last batch. What each rival does, and what not, stands
at its class. Spawned children import this file by its name: who imports it has `tools/` on `sys.path`.

Invariants
----------
- Rollouts are made before the clock starts, and some have gone the whole way: memory is touched, connections stand.
- The consumer's sums are those of the producers' rollouts, exactly (each logprob is a multiple of 2**-10), or there is
  no figure.
- A batch is the pushes as they came, nobody has to join them. At most four batches, or two pushes each, are under way.
- Every wait has a deadline. A process that fails ends the run at once, and the others with it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import multiprocessing
import operator
import os
import queue
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.synchronize import Event, Semaphore
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import msgspec
import numpy as np
import psutil
import pyarrow as pa
import rich
import zmq
from rich.table import Table

SPAWN: Final = multiprocessing.get_context("spawn")
PRODUCERS: Final = 2
POOL: Final = 1024
"""Distinct rollouts of one producer, taken in turn: 8 MiB, more than the caches of its own that a core has."""
MEAN_TOKENS, SIGMA, SHORTEST, LONGEST = 1024, 0.8, 16, 8192
START_S: Final = 180.0
"""Until every process is ready; Ray, TensorFlow and torch take their time."""
WAIT_S: Final = 60.0
"""Of one push, or for one."""
RUN_S: Final = 900.0


class RivalError(RuntimeError):
    """A rival lost rollouts, changed them, stood still or died."""


@dataclass(frozen=True)
class Workload:
    rollouts: int = 8192
    push: int = 8
    """Rollouts that a producer sends at once."""
    batch: int = 256
    """Rollouts that the consumer reads at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.push, self.batch) < 1 or self.rollouts < PRODUCERS:
            raise ValueError(f"workload: expected push, batch >= 1 and rollouts >= {PRODUCERS}, got {self}")

    @property
    def slots(self) -> int:
        """Pushes of one producer that may be under way."""
        return max(2, 4 * self.batch // (PRODUCERS * self.push))


class Rollout(NamedTuple):
    ids: np.ndarray  # int32 [tokens]
    logprobs: np.ndarray  # float32 [tokens]
    version: int


class Push(NamedTuple):
    """The columns of some rollouts, one after the other."""

    ids: np.ndarray  # int32 [tokens of all]
    logprobs: np.ndarray  # float32 [tokens of all]
    lengths: np.ndarray  # int32 [rollouts]
    versions: np.ndarray  # int32 [rollouts]


class Sums(msgspec.Struct, frozen=True):
    rollouts: int = 0
    tokens: int = 0
    ids: int = 0
    logprobs: float = 0.0
    versions: int = 0
    """Of all tokens."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(*map(operator.add, msgspec.structs.astuple(self), msgspec.structs.astuple(other)))

    @property
    def megabytes(self) -> float:
        """Id and logprob of every token, version of every rollout."""
        return (8 * self.tokens + 4 * self.rollouts) / 1e6


def make_rollouts(workload: Workload, producer: int, producers: int = PRODUCERS) -> list[list[Rollout]]:
    """All that one producer sends, push by push: its distinct rollouts, again and again until its share is full."""
    rng = np.random.default_rng([workload.seed, producer, producers])
    share = workload.rollouts // producers + (producer < workload.rollouts % producers)
    drawn = rng.lognormal(np.log(MEAN_TOKENS), SIGMA, min(POOL, share)).clip(SHORTEST, LONGEST)
    pool = [
        Rollout(
            ids=rng.integers(0, 150_000, length, dtype=np.int32),
            logprobs=rng.integers(-(2**14), 1, length).astype(np.float32) / np.float32(1024),
            version=int(rng.integers(0, 32)),
        )
        for length in np.rint(drawn * (MEAN_TOKENS / drawn.mean())).astype(int)
    ]
    sent = [pool[index % len(pool)] for index in range(share)]
    return [sent[start : start + workload.push] for start in range(0, share, workload.push)]


def pack(rollouts: Sequence[Rollout]) -> Push:
    """One copy of every token."""
    return Push(
        np.concatenate([rollout.ids for rollout in rollouts]),
        np.concatenate([rollout.logprobs for rollout in rollouts]),
        np.array([len(rollout.ids) for rollout in rollouts], np.int32),
        np.array([rollout.version for rollout in rollouts], np.int32),
    )


def touch(push: Push) -> Sums:
    return Sums(
        rollouts=len(push.lengths),
        tokens=len(push.ids),
        ids=int(push.ids.sum(dtype=np.int64)),
        logprobs=float(push.logprobs.sum(dtype=np.float64)),
        versions=int(np.dot(push.lengths.astype(np.int64), push.versions)),
    )


def expected_sums(workload: Workload, producers: int = PRODUCERS) -> Sums:
    """What the producers' rollouts add up to, whoever moves them."""
    sent = (push for producer in range(producers) for push in make_rollouts(workload, producer, producers))
    return functools.reduce(operator.add, (touch(pack(push)) for push in sent), Sums())


@dataclass(frozen=True)
class Figures:
    rival: str
    push: int
    seconds: float
    rollouts_per_s: float
    mb_per_s: float
    cpu_s: float
    """Of all processes, servers included, while the clock ran."""
    cpu_s_by_role: dict[str, float]
    mb_per_cpu_s: float
    sums: Sums


def make_figures(
    name: str, workload: Workload, seconds: float, cpu_s: dict[str, float], sums: Sums
) -> Figures:
    """Raises `RivalError` unless every rollout arrived once and whole."""
    if sums != (sent := expected_sums(workload)):
        raise RivalError(f"{name}, pushes of {workload.push}: expected the sums sent, {sent}, got {sums}")
    return Figures(
        rival=name,
        push=workload.push,
        seconds=seconds,
        rollouts_per_s=sums.rollouts / seconds,
        mb_per_s=sums.megabytes / seconds,
        cpu_s=sum(cpu_s.values()),
        cpu_s_by_role=cpu_s,
        mb_per_cpu_s=sums.megabytes / sum(cpu_s.values()),
        sums=sums,
    )


# ---- what a rival is, and those that need no package of their own ----

Send = Callable[[Sequence[Rollout]], object]
"""Waits while too much is under way."""
Receive = Callable[[int], Push]
"""Some rollouts, where so many are still wanted; waits for at least one push."""


class Rival(ABC):
    """One way to move rollouts. The parent makes and opens it; by spawn it comes to the workers, who use one side."""

    name: ClassVar[str]
    package: ClassVar[str] = ""
    """Must be there to import, besides what asyncrl always has."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def open(self, resources: ExitStack) -> None:  # noqa: B027 - most have nothing to open
        """In the parent, before the workers: starts servers, and gives `resources` what ends them."""

    @abstractmethod
    def sending(self, producer: int) -> Iterator[Send]:
        """In a producer: yields once, when connected."""

    def finish(self) -> None:  # noqa: B027 - most have sent when `send` returns
        """In a producer, after its last push, and after those that warm it up: sees them on their way."""

    @abstractmethod
    def receiving(self) -> Iterator[Receive]:
        """In the consumer: yields once, when connected."""

    def most_tokens(self) -> int:
        """Of one push."""
        sent = (push for producer in range(PRODUCERS) for push in make_rollouts(self.workload, producer))
        return max(sum(len(rollout.ids) for rollout in push) for push in sent)


class Turns:
    """Flow control for stores that have none: each producer fills its slots in order, the consumer empties them in
    order. What is counted here is of this process; between processes only semaphores speak."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = [SPAWN.Semaphore(slots) for _ in range(PRODUCERS)]
        self._filled = [SPAWN.Semaphore(0) for _ in range(PRODUCERS)]
        self._any_filled = SPAWN.Semaphore(0)
        self._amounts = SPAWN.Array("q", PRODUCERS * slots, lock=False)
        self._used = [0] * PRODUCERS

    def _next_of(self, producer: int) -> int:
        self._used[producer] += 1
        return producer * self.slots + (self._used[producer] - 1) % self.slots

    def claim(self, producer: int) -> int:
        """A free slot. Waits until the consumer has released one."""
        acquire(self._free[producer], f"producer {producer} for a free slot")
        return self._next_of(producer)

    def publish(self, slot: int, amount: int) -> None:
        self._amounts[slot] = amount
        self._filled[slot // self.slots].release()
        self._any_filled.release()

    def take(self) -> tuple[int, int]:
        """A filled slot and its amount. Waits until a producer has published one."""
        acquire(self._any_filled, "the consumer for a push")
        slot = self._next_of(next(i for i, filled in enumerate(self._filled) if filled.acquire(block=False)))
        return slot, self._amounts[slot]

    def release(self, slot: int) -> None:
        self._free[slot // self.slots].release()


def acquire(semaphore: Semaphore, who: str) -> None:
    if not semaphore.acquire(timeout=WAIT_S):
        raise TimeoutError(f"{who}: waited {WAIT_S:.0f} s; the other side stands still or rollouts were lost")


def write_slot(slot: np.ndarray, rollouts: Sequence[Rollout]) -> int:
    """Into int32 words: rollouts, lengths, versions, ids, logprobs. Returns the words used."""
    rows, tokens = len(rollouts), sum(len(rollout.ids) for rollout in rollouts)
    first = 1 + 2 * rows
    slot[0] = rows
    slot[1 : 1 + rows] = [len(rollout.ids) for rollout in rollouts]
    slot[1 + rows : first] = [rollout.version for rollout in rollouts]
    np.concatenate([rollout.ids for rollout in rollouts], out=slot[first : first + tokens])
    logprobs = slot[first + tokens : first + 2 * tokens].view(np.float32)
    np.concatenate([rollout.logprobs for rollout in rollouts], out=logprobs)
    return first + 2 * tokens


def read_slot(words: np.ndarray) -> Push:
    """A copy of the words that were used."""
    copy = words.copy()
    lengths, versions, columns = np.split(copy[1:], [copy[0], 2 * copy[0]])
    ids, logprobs = np.split(columns, 2)
    return Push(ids, logprobs.view(np.float32), lengths, versions)


class Ring(Rival):
    """Slots in shared memory: one copy in, one copy out. One machine, no server, nothing outlives the run."""

    name = "shared-memory ring"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._turns = Turns(workload.slots)
        self._words = 1 + 2 * workload.push + 2 * self.most_tokens()

    def open(self, resources: ExitStack) -> None:
        self._memory = SharedMemory(create=True, size=4 * self._words * PRODUCERS * self._turns.slots)
        resources.callback(self._memory.unlink)
        resources.callback(self._memory.close)

    def _slot(self, slot: int) -> np.ndarray:
        """A view. Nobody keeps one: it would keep the memory from being closed."""
        return np.ndarray(self._words, np.int32, buffer=self._memory.buf, offset=4 * self._words * slot)

    def sending(self, producer: int) -> Iterator[Send]:
        def send(rollouts: Sequence[Rollout]) -> None:
            slot = self._turns.claim(producer)
            self._turns.publish(slot, write_slot(self._slot(slot), rollouts))

        yield send

    def receiving(self) -> Iterator[Receive]:
        def receive(_: int) -> Push:
            slot, words = self._turns.take()
            push = read_slot(self._slot(slot)[:words])
            self._turns.release(slot)
            return push

        yield receive


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    lengths: list[int]
    versions: list[int]


class ZmqMsgpack(Rival):
    """PUSH/PULL over TCP on this host: a msgpack header, then the columns as they are. Bounded by high-water marks (of
    messages, so TCP's own buffers come on top). No server; what is under way dies with its process."""

    name = "zmq+msgpack"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._port = SPAWN.Value("i", 0)
        self._bound = SPAWN.Event()

    def encode(self, rollouts: Sequence[Rollout]) -> list[Any]:
        """The frames of one message."""
        push = pack(rollouts)
        header = Header(lengths=push.lengths.tolist(), versions=push.versions.tolist())
        return [msgspec.msgpack.encode(header), push.ids, push.logprobs]

    def decode(self, frames: Sequence[memoryview]) -> Push:
        """Views; nothing of the columns is copied."""
        header = msgspec.msgpack.decode(frames[0], type=Header)
        ids, logprobs = np.frombuffer(frames[1], np.int32), np.frombuffer(frames[2], np.float32)
        return Push(ids, logprobs, np.array(header.lengths, np.int32), np.array(header.versions, np.int32))

    @contextmanager
    def _socket(self, kind: int) -> Iterator[zmq.Socket[bytes]]:
        with zmq.Context() as context, context.socket(kind) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            # Both ends keep a queue, so each gets half.
            socket.set_hwm(max(1, self.workload.slots // 2))
            socket.setsockopt(zmq.SNDTIMEO, int(WAIT_S * 1000))
            socket.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
            yield socket

    def sending(self, producer: int) -> Iterator[Send]:
        if not self._bound.wait(START_S):
            raise TimeoutError(f"producer {producer}: no address of the consumer within {START_S:.0f} s")
        with self._socket(zmq.PUSH) as socket:
            socket.connect(f"tcp://127.0.0.1:{self._port.value}")
            yield lambda rollouts: socket.send_multipart(self.encode(rollouts), copy=False)

    def receiving(self) -> Iterator[Receive]:
        with self._socket(zmq.PULL) as socket:
            self._port.value = socket.bind_to_random_port("tcp://127.0.0.1")
            self._bound.set()
            yield lambda _: self.decode([frame.buffer for frame in socket.recv_multipart(copy=False)])


class ZmqArrow(ZmqMsgpack):
    """The same sockets; each push is one Arrow record batch in IPC form, read without a copy."""

    name = "arrow over zmq"
    schema: ClassVar = pa.schema(
        [("ids", pa.list_(pa.int32())), ("logprobs", pa.list_(pa.float32())), ("version", pa.int32())]
    )

    def encode(self, rollouts: Sequence[Rollout]) -> list[Any]:
        push = pack(rollouts)
        offsets = pa.array(np.cumsum([0, *push.lengths], dtype=np.int32))
        lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in (push.ids, push.logprobs)]
        return [pa.record_batch([*lists, pa.array(push.versions)], schema=self.schema).serialize()]

    def decode(self, frames: Sequence[memoryview]) -> Push:
        ids, logprobs, versions = pa.ipc.read_record_batch(pa.py_buffer(frames[0]), self.schema).columns
        lengths = np.diff(ids.offsets.to_numpy())
        return Push(ids.values.to_numpy(), logprobs.values.to_numpy(), lengths, versions.to_numpy())


class MpQueue(Rival):
    """`multiprocessing.Queue`: columns pickled through a pipe, by a thread of the producer."""

    name = "mp.Queue"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._queue: multiprocessing.Queue[Push] = SPAWN.Queue(PRODUCERS * workload.slots)

    def sending(self, producer: int) -> Iterator[Send]:
        # At the end the consumer has all of it or is dead: either way nothing is worth waiting for.
        self._queue.cancel_join_thread()
        yield lambda rollouts: self._queue.put(pack(rollouts), timeout=WAIT_S)

    def receiving(self) -> Iterator[Receive]:
        yield lambda _: self._queue.get(timeout=WAIT_S)


# ---- rivals that need a package, imported only where they run ----


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


RIVALS: Final[dict[str, type[Rival]]] = {
    rival.name: rival
    for rival in (Ring, ZmqMsgpack, ZmqArrow, MpQueue, RayObjects, Reverb, TorchrlMemmap, TransferQueue)
}


# ---- a run: three processes, one clock ----


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one worker, over its pipe."""

    role: str
    cpu_s: float
    seconds: float = 0.0
    sums: Sums = Sums()


@contextmanager
def named_timeouts(role: str) -> Iterator[None]:
    """Queues and sockets say only that they are empty or busy."""
    try:
        yield
    except (queue.Empty, queue.Full, zmq.Again) as error:
        raise TimeoutError(
            f"{role}: waited {WAIT_S:.0f} s for the other side, or rollouts were lost"
        ) from error


def get_ready(pipe: Connection, go: Event) -> None:
    """Waits for the parent, who waits until all are ready."""
    pipe.send_bytes(b"ready")
    if not go.wait(START_S):
        raise TimeoutError(f"no start from the parent within {START_S:.0f} s")


def produce(rival: Rival, producer: int, pipe: Connection, go: Event, done: Event) -> None:
    pushes = make_rollouts(rival.workload, producer)
    with named_timeouts(f"producer {producer}"), contextmanager(rival.sending)(producer) as send:
        for rollouts in warm_up(rival.workload, producer):
            send(rollouts)
        rival.finish()
        get_ready(pipe, go)
        used = time.process_time()
        for rollouts in pushes:
            send(rollouts)
        rival.finish()
        # Threads of this process may still send, and objects may still lie in its memory.
        if not done.wait(RUN_S):
            raise TimeoutError(f"producer {producer}: the consumer was not done within {RUN_S:.0f} s")
        pipe.send_bytes(msgspec.msgpack.encode(Report(f"producer {producer}", time.process_time() - used)))


def consume(rival: Rival, pipe: Connection, go: Event, done: Event) -> None:
    workload = rival.workload
    with named_timeouts("consumer"), contextmanager(rival.receiving)() as receive:
        before = [warm_up(workload, producer) for producer in range(PRODUCERS)]
        read_all(receive, workload, sum(len(push) for pushes in before for push in pushes))
        get_ready(pipe, go)
        began, used = time.monotonic(), time.process_time()
        sums = read_all(receive, workload, workload.rollouts)
        seconds, used = time.monotonic() - began, time.process_time() - used
        done.set()
        pipe.send_bytes(msgspec.msgpack.encode(Report("consumer", used, seconds, sums)))


def warm_up(workload: Workload, producer: int) -> list[list[Rollout]]:
    """Pushes that go ahead of the clock: each slot is used once, where there are so many."""
    return make_rollouts(workload, producer)[: workload.slots]


def read_all(receive: Receive, workload: Workload, rollouts: int) -> Sums:
    """Batch by batch: a batch is whole before it is touched. Ends at so many rollouts; each `receive` has a deadline."""
    sums = Sums()
    while sums.rollouts < rollouts:
        batch: list[Push] = []
        wanted = min(workload.batch, rollouts - sums.rollouts)
        while (have := sum(len(push.lengths) for push in batch)) < wanted:
            batch.append(receive(wanted - have))
        sums = functools.reduce(operator.add, map(touch, batch), sums)
    return sums


Workers = dict[Connection, SpawnProcess]


def start_workers(rival: Rival, go: Event, done: Event, resources: ExitStack) -> Workers:
    """They end with `resources`: by themselves when the run is done, at once when it is not."""

    def end(process: SpawnProcess) -> None:
        process.join(10.0 if done.is_set() else 0.0)
        process.kill()
        process.join(10.0)

    tasks: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [("consumer", consume, (rival,))]
    tasks += [(f"producer {i}", produce, (rival, i)) for i in range(PRODUCERS)]
    workers = {}
    for role, task, arguments in tasks:
        ours, theirs = SPAWN.Pipe(duplex=False)
        resources.callback(ours.close)
        process = SPAWN.Process(target=task, args=(*arguments, theirs, go, done), name=role, daemon=True)
        process.start()
        theirs.close()
        resources.callback(end, process)
        workers[ours] = process
    return workers


def gather(workers: Workers, rival: str, what: str, within_s: float) -> list[bytes]:
    """The next message of each. Ends when all have come, when a worker has ended (its pipe closes), or in time."""
    deadline = time.monotonic() + within_s
    missing = dict(workers)
    messages = []
    while missing:
        ready = wait(list(missing), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(process.name for process in missing.values())
            raise RivalError(f"{rival}: expected {what} within {within_s:.0f} s, got none from {late}")
        for pipe in (pipe for pipe in workers if pipe in ready):
            process = missing.pop(pipe)
            try:
                messages.append(pipe.recv_bytes())
            except EOFError:
                process.join(5.0)
                raise RivalError(
                    f"{rival}: expected {what}, but the {process.name} ended with exit code {process.exitcode}; its "
                    "traceback stands above"
                ) from None
    return messages


def servers_cpu_s(workers: Workers) -> float:
    """CPU seconds so far of this process and of all below it, workers left out: they count more finely themselves."""
    pids = {process.pid for process in workers.values()}
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        if child.pid not in pids:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended since it was listed
                times = child.cpu_times()
                total += times.user + times.system
    return total


def run_memcpy(workload: Workload) -> Figures:
    """One process copies each push into one piece of memory and out of it, and adds it up: the floor in CPU time (the
    ring has two cores)."""
    sent = [push for producer in range(PRODUCERS) for push in make_rollouts(workload, producer)]
    tokens = max(sum(len(rollout.ids) for rollout in push) for push in sent)
    area = np.zeros(1 + 2 * workload.push + 2 * tokens, np.int32)
    for rollouts in sent[: PRODUCERS * workload.slots]:
        touch(read_slot(area[: write_slot(area, rollouts)]))
    sums, began, used = Sums(), time.monotonic(), time.process_time()
    for rollouts in sent:
        sums += touch(read_slot(area[: write_slot(area, rollouts)]))
    return make_figures(
        "memcpy", workload, time.monotonic() - began, {"consumer": time.process_time() - used}, sums
    )


def run_rival(name: str, workload: Workload) -> Figures:
    if name == "memcpy":
        return run_memcpy(workload)
    go, done = SPAWN.Event(), SPAWN.Event()
    with ExitStack() as resources:
        rival = RIVALS[name](workload)
        rival.open(resources)
        workers = start_workers(rival, go, done, resources)
        gather(workers, name, "a sign of readiness", START_S)
        servers_s = servers_cpu_s(workers)
        go.set()
        reports = [msgspec.msgpack.decode(m, type=Report) for m in gather(workers, name, "a report", RUN_S)]
        servers_s = servers_cpu_s(workers) - servers_s
    consumer = max(reports, key=lambda report: report.seconds)
    cpu_s = {"servers": servers_s, **{report.role: report.cpu_s for report in reports}}
    return make_figures(name, workload, consumer.seconds, cpu_s, consumer.sums)


# ---- which, how often, and the table ----


def choose(names: Sequence[str], with_ray: bool) -> tuple[list[str], list[str]]:
    """The rivals to run, and those that are not installed. No names: all, `ray objects` if asked for."""
    wanted = list(names) or ["memcpy", *(name for name in RIVALS if with_ray or name != RayObjects.name)]
    if unknown := set(wanted) - {"memcpy", *RIVALS}:
        raise ValueError(f"no rival {', '.join(sorted(unknown))}; there are: memcpy, {', '.join(RIVALS)}")
    packages = {name: rival.package for name, rival in RIVALS.items() if rival.package}
    missing = [n for n in wanted if n in packages and importlib.util.find_spec(packages[n]) is None]
    return [name for name in wanted if name not in missing], missing


def measure(names: Sequence[str], workload: Workload, rounds: int) -> list[Figures]:
    """Of each, the round of median speed; rivals take turns, so that a busy machine slows all alike."""
    runs = [[run_rival(name, workload) for name in names] for _ in range(rounds)]
    by_speed = operator.attrgetter("rollouts_per_s")
    return [sorted(of_one, key=by_speed)[rounds // 2] for of_one in zip(*runs, strict=True)]


def table(figures: Sequence[Figures], missing: Sequence[str] = ()) -> Table:
    drawn = Table("way", "push", "rollouts/s", "MB/s", "CPU s", "MB per CPU s")
    drawn.columns[0].no_wrap = True
    for column in drawn.columns[1:]:
        column.justify = "right"
    for f in figures:
        rates = (f"{f.rollouts_per_s:,.0f}", f"{f.mb_per_s:,.0f}", f"{f.cpu_s:.2f}", f"{f.mb_per_cpu_s:,.0f}")
        drawn.add_row(f.rival, str(f.push), *rates)
    for name in missing:
        drawn.add_row(name, "", "not installed")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=8192)
    parser.add_argument("--pushes", default="1,8,256", help="rollouts per push, with commas")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="the one of median speed is shown")
    parser.add_argument("--rivals", default="", help="names, with commas; default: all")
    parser.add_argument("--ray", action="store_true", help="`ray objects` too; its start takes seconds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    # Unwinds: servers, workers and folders end with the run that made them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    names, missing = choose([name for name in args.rivals.split(",") if name], args.ray)
    workloads = [Workload(args.rollouts, int(push), args.batch, args.seed) for push in args.pushes.split(",")]
    figures = [each for workload in workloads for each in measure(names, workload, args.rounds)]
    rich.print(table(figures, missing))
    if args.json:
        rows = [dataclasses.asdict(each) | {"sums": msgspec.structs.asdict(each.sums)} for each in figures]
        result = {"batch": args.batch, "rounds": args.rounds, "figures": rows, "not_installed": missing}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
