"""Other ways to move rollouts than asyncrl's buffer, on one workload: what `bench_buffer.py` compares it with.

    python tools/buffer_rivals.py --rollouts 4096 --pushes 8,256 --json FILE

Two producer processes push rollouts, one consumer reads batches and touches every token. The clock runs from the
moment at which all are ready until the consumer has added up the last batch. What each rival does, and what not, stands
at its class. Spawned children import this file by its name: who imports it has `tools/` on `sys.path`.

The workload is in `rival_workload`, what a rival is in `rival_base`, the run in `rival_race`. Here are the rivals that need
no package of their own, the choice and the table; the others are in `rivals_ray` and `rivals_replay`.

Invariants:
- The consumer's sums are those of the producers' rollouts, exactly (each logprob is a multiple of 2**-10), or there is
  no figure.
- A batch is the pushes as they came, nobody has to join them. At most four batches, or two pushes each, are under way.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import operator
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec
import numpy as np
import pyarrow as pa
import rich
import zmq
from rich.table import Table
from rival_base import SPAWN, START_S, WAIT_S, Receive, Rival, Send, Turns, read_slot, write_slot
from rival_race import run, run_memcpy, warm_up
from rival_workload import (
    MEAN_TOKENS,
    POOL,
    PRODUCERS,
    Figures,
    Push,
    RivalError,
    Rollout,
    Workload,
    expected_sums,
    make_rollouts,
    pack,
)
from rivals_ray import RayObjects, TransferQueue
from rivals_replay import Reverb, TorchrlMemmap

__all__ = [
    "MEAN_TOKENS",
    "POOL",
    "RIVALS",
    "WAIT_S",
    "Push",
    "Receive",
    "Reverb",
    "Ring",
    "Rival",
    "RivalError",
    "Rollout",
    "Send",
    "Workload",
    "choose",
    "expected_sums",
    "make_rollouts",
    "measure",
    "pack",
    "run_rival",
    "table",
    "warm_up",
]


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


RIVALS: Final[dict[str, type[Rival]]] = {
    rival.name: rival
    for rival in (Ring, ZmqMsgpack, ZmqArrow, MpQueue, RayObjects, Reverb, TorchrlMemmap, TransferQueue)
}


def run_rival(name: str, workload: Workload) -> Figures:
    return run_memcpy(workload) if name == "memcpy" else run(RIVALS[name](workload))


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
