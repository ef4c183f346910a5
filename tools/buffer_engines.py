"""So many fake engines against one buffer process: the `engines` command of `bench_buffer.py`.

Two driver processes hold the engines, each with a connection of its own (1,000 engines are 1,000 CURVE sockets). An engine
does what a dispatcher does, with sleeping in place of sampling: every `flush_tokens` tokens it appends one segment for each of its slots, scores
what is finished, and leases as many rollouts as it has free slots. A learner reads and commits batches as they become
whole, a feeder admits what there is room for. The clock of the figures starts when every slot was filled and an eighth of
them was trained. At the end the buffer's process is killed, and another one reads its log back.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import rich
import zmq
from buffer_shards import GROUP, Shards
from rich.table import Table

from asyncrl.buffer import BlockingBufferClient, BufferAddress, BufferClient, BufferConfig, Segment, wire
from asyncrl.buffer.connection import BlockingConnection

SPAWN: Final = multiprocessing.get_context("spawn")
DRIVERS: Final = 2
BATCH_GROUPS: Final = 128
_PROMPT: Final = np.arange(128, dtype=np.int32).tobytes()
_WAIT_S: Final = 300.0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    engines: int
    slots: int
    seconds: float
    flush_tokens: int
    tokens_per_s: float
    """Of one slot."""
    mean_tokens: int

    @property
    def bound(self) -> int:
        """Versions: room for a rollout in each slot, and as many again waiting."""
        return 2 * self.engines * self.slots // (BATCH_GROUPS * GROUP) + 2


class Seen(msgspec.Struct, kw_only=True):
    """What one driver measured."""

    lease_s: list[float] = msgspec.field(default_factory=list)
    append_s: list[float] = msgspec.field(default_factory=list)
    late_s: list[float] = msgspec.field(default_factory=list)
    """How late an engine began its step: the driver's own load."""
    segments: int = 0
    tokens: int = 0
    rollouts: int = 0
    refused: int = 0
    cpu_s: float = 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--flush-tokens", type=int, default=64)
    parser.add_argument("--tokens-per-s", type=float, default=30.0, help="of one slot")
    parser.add_argument("--mean-tokens", type=int, default=512)
    parser.add_argument(
        "--rotate-bytes",
        type=int,
        default=BufferConfig().rotate_bytes,
        help="where a new file of the log begins",
    )


class FakeEngine:
    """One connection, `slots` rollouts under way."""

    def __init__(self, number: int, address: BufferAddress, load: Load, version: Synchronized[int]) -> None:
        self._id = f"engine-{number}"
        self._load, self._version = load, version
        self._client = BufferClient(address)
        self._random = np.random.default_rng(number)
        self._tokens = np.arange(load.flush_tokens, dtype=np.int32)
        self._logprobs = np.full(load.flush_tokens, -0.5, np.float32)
        self._held: dict[int, tuple[wire.Leased, int, int]] = {}
        """rollout_id -> (lease, tokens so far, tokens at its end)"""

    async def run(self, seen: Seen, go: asyncio.Event, end: asyncio.Event) -> None:
        """One step after the other, each as long as sampling would take; ends with `end`."""
        async with self._client:
            step_s = self._load.flush_tokens / self._load.tokens_per_s
            loop = asyncio.get_running_loop()
            due = loop.time() + step_s * float(self._random.random())
            while not end.is_set():
                await asyncio.sleep(max(0.0, due - loop.time()))
                mine = seen if go.is_set() else Seen()
                mine.late_s.append(loop.time() - due)
                due = max(due, loop.time() - step_s) + step_s
                await self._step(mine)

    async def _step(self, seen: Seen) -> None:
        if self._held:
            await self._append(seen)
        free = self._load.slots - len(self._held)
        if not free:
            return
        began = time.monotonic()
        leases = await self._client.lease(self._id, free, 0.0)
        if leases:
            seen.lease_s.append(time.monotonic() - began)
        for lease in leases:
            length = self._random.lognormal(np.log(self._load.mean_tokens) - 0.32, 0.8)
            self._held[lease.rollout_id] = (
                lease,
                len(lease.tokens) // 4,
                int(min(max(length, 16), 3 * self._load.mean_tokens)),
            )

    async def _append(self, seen: Seen) -> None:
        version, done, segments = self._version.value, list[wire.Scored](), list[Segment]()
        for rollout_id, (lease, start, end) in list(self._held.items()):
            count = min(self._load.flush_tokens, max(1, end - start))
            finished = start + count >= end
            segments.append(
                Segment(
                    rollout_id=rollout_id,
                    lease_id=lease.lease_id,
                    start=start,
                    version=version,
                    tokens=self._tokens[:count],
                    logprobs=self._logprobs[:count],
                    finish_reason="stop" if finished else "",
                )
            )
            self._held[rollout_id] = (lease, start + count, end)
            seen.tokens += count
            if finished:
                done.append(wire.Scored(rollout_id, lease.lease_id, float(rollout_id % 2)))
                del self._held[rollout_id]
        began = time.monotonic()
        refused = await self._client.append(self._id, segments)
        seen.append_s.append(time.monotonic() - began)
        refused += await self._client.score(done) if done else []
        seen.segments += len(segments)
        seen.rollouts += len(done)
        seen.refused += len(refused)


def drive(
    numbers: range, address: BufferAddress, load: Load, version: Synchronized[int], pipe: Connection
) -> None:
    """A driver process: its engines until the parent says `end`; `go` begins the figures."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    zmq.Context.instance().set(zmq.MAX_SOCKETS, 4 * len(numbers) + 64)
    pipe.send_bytes(asyncio.run(_drive(numbers, address, load, version, pipe)))


async def _drive(
    numbers: range, address: BufferAddress, load: Load, version: Synchronized[int], pipe: Connection
) -> bytes:
    seen, go, end = Seen(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def told() -> None:
        if pipe.recv_bytes() == b"go":
            seen.cpu_s = -time.process_time()
            go.set()
        else:
            seen.cpu_s += time.process_time()
            end.set()

    loop.add_reader(pipe.fileno(), told)
    async with asyncio.TaskGroup() as engines:
        for number in numbers:
            engines.create_task(FakeEngine(number, address, load, version).run(seen, go, end))
    return msgspec.msgpack.encode(seen)


class Feeder(threading.Thread):
    """Admits whatever there is room for."""

    def __init__(self, address: BufferAddress) -> None:
        super().__init__(name="feeder", daemon=True)
        self._connection = BlockingConnection(address.endpoints[0], address.keys)
        self.ended = threading.Event()

    def run(self) -> None:
        """Waits for room, admits as many prompts; ends when told to."""
        position = 0
        while not self.ended.is_set():
            room = min(512, self._connection.ask(wire.Capacity(timeout_s=1.0), timeout_s=1.0).reply.value)
            if room:
                request = wire.Admit(
                    positions=list(range(position, position + room)),
                    prompt_ids=[f"p{i}" for i in range(position, position + room)],
                    payloads=['{"answer": "7"}'] * room,
                    lengths=[len(_PROMPT) // 4] * room,
                    timeout_s=30.0,
                )
                self._connection.ask(request, _PROMPT * room, 30.0)
                position += room
        self._connection.close()


class Learner(threading.Thread):
    """Reads and commits as fast as batches become whole."""

    def __init__(self, client: BlockingBufferClient, version: Synchronized[int]) -> None:
        super().__init__(name="learner", daemon=True)
        self._client, self._version = client, version
        self.ended = threading.Event()
        self.rollouts = self.past_bound = 0
        self.read_s: list[float] = []

    def run(self) -> None:
        """Waits for a batch, commits it; ends when told to."""
        while not self.ended.is_set():
            found = self._client.read_batch(0.5)
            if found is None:
                continue
            began = time.monotonic()
            selection, rows = found
            self.rollouts += rows.num_rows
            self._client.commit(selection.batch_ids, selection.version + 1)
            self._version.value = selection.version + 1
            self.read_s.append(time.monotonic() - began)


@contextmanager
def world(load: Load, shards: Shards) -> Iterator[tuple[list[Connection], BlockingBufferClient, Learner]]:
    """Feeder, learner and engines; they end with it."""
    with ExitStack() as resources:
        version = SPAWN.Value("q", 0)
        client, watcher = BlockingBufferClient(shards.address), BlockingBufferClient(shards.address)
        resources.callback(watcher.close)
        resources.callback(client.close)
        client.publish(0)
        learner, feeder = Learner(client, version), Feeder(shards.address)
        for thread in (learner, feeder):
            thread.start()
            resources.callback(thread.join, 20)
            resources.callback(thread.ended.set)
        pipes = []
        for driver in range(DRIVERS):
            ours, theirs = SPAWN.Pipe()
            numbers = range(driver, load.engines, DRIVERS)
            process = SPAWN.Process(
                target=drive, args=(numbers, shards.address, load, version, theirs), daemon=True
            )
            process.start()
            resources.callback(process.join, 10)
            resources.callback(process.terminate)
            pipes.append(ours)
        yield pipes, watcher, learner


def run(args: argparse.Namespace) -> dict[str, Any]:
    load = Load(
        engines=args.engines,
        slots=args.slots,
        seconds=args.seconds,
        flush_tokens=args.flush_tokens,
        tokens_per_s=args.tokens_per_s,
        mean_tokens=args.mean_tokens,
    )
    with ExitStack() as resources:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="bench-engines-")))
        config = BufferConfig(rotate_bytes=args.rotate_bytes)
        shards = Shards(folder, config, BATCH_GROUPS, load.bound)
        resources.callback(shards.close)
        figures = {**msgspec.structs.asdict(load), **work(load, shards), **recover(shards)}
    show(figures)
    return figures


def work(load: Load, shards: Shards) -> dict[str, Any]:
    """The figures of `load.seconds` of steady state."""
    with world(load, shards) as (pipes, watcher, learner):
        deadline = time.monotonic() + _WAIT_S
        # Waits for the engines to fill their slots and for the first batches; ends with that, or in time.
        while learner.rollouts < load.engines * load.slots // 8:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no steady state within {_WAIT_S:.0f} s: {watcher.status()}")
            time.sleep(0.5)
        trained, service_s = learner.rollouts, cpu_of(shards)
        for pipe in pipes:
            pipe.send_bytes(b"go")
        time.sleep(load.seconds)
        report, rss, service_s = watcher.status(), shards.rss_bytes, cpu_of(shards) - service_s
        trained = learner.rollouts - trained
        for pipe in pipes:
            pipe.send_bytes(b"end")
        seen = [msgspec.msgpack.decode(receive(pipe), type=Seen) for pipe in pipes]
    return {
        "lease_ms": percentiles([s for each in seen for s in each.lease_s]),
        "append_ms": percentiles([s for each in seen for s in each.append_s]),
        "late_ms": percentiles([s for each in seen for s in each.late_s]),
        "segments_per_s": sum(each.segments for each in seen) / load.seconds,
        "generated_tokens_per_s": sum(each.tokens for each in seen) / load.seconds,
        "rollouts_per_s": sum(each.rollouts for each in seen) / load.seconds,
        "trained_per_s": trained / load.seconds,
        "refused": sum(each.refused for each in seen),
        "live_rollouts": report.counts.live,
        "dropped": report.counts.dropped,
        "equation_holds": report.counts.holds,
        "held_token_bytes": report.held_bytes,
        "rotations": report.rotations,
        "longest_rotation_s": report.longest_rotation_s,
        "rss_bytes": rss,
        "service_cpu_share": service_s / load.seconds,
        "driver_cpu_shares": [each.cpu_s / load.seconds for each in seen],
    }


def recover(shards: Shards) -> dict[str, Any]:
    """Kills the buffer where it stands and starts it again: how long that takes, beside a start without a log."""
    restart_s = shards.kill_and_restart()
    client = BlockingBufferClient(shards.address)
    try:
        report = client.status()
    finally:
        client.close()
    if report.recovery is None or not report.counts.holds:
        raise RuntimeError(f"nothing, or not all, was recovered: {report}")
    return {
        "start_without_a_log_s": shards.start_s,
        "restart_s": restart_s,
        "recovered": msgspec.structs.asdict(report.recovery),
    }


def cpu_of(shards: Shards) -> float:
    import psutil

    times = [psutil.Process(p.pid).cpu_times() for p in shards.processes]
    return sum(t.user + t.system for t in times)


def receive(pipe: Connection) -> bytes:
    if not pipe.poll(60.0):
        raise TimeoutError("a driver gave no figures within 60 s")
    return pipe.recv_bytes()


def percentiles(seconds: list[float]) -> dict[str, float]:
    found = np.percentile(seconds, [50, 99, 99.9, 100]) * 1000 if seconds else np.zeros(4)
    return dict(zip(("p50", "p99", "p99.9", "max"), (round(float(f), 2) for f in found), strict=True))


def show(figures: dict[str, Any]) -> None:
    drawn = Table("what", "figure")
    for name, value in figures.items():
        drawn.add_row(name, f"{value:,.2f}" if isinstance(value, float) else str(value))
    rich.print(drawn)
