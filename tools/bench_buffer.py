"""The buffer against other ways to move rollouts, in one run; where its time goes; and a thousand engines at once.

    python tools/bench_buffer.py speed   --rollouts 8192 --pushes 1,8,256 --rounds 3 --json FILE
    python tools/bench_buffer.py account --rollouts 8192 --push 8
    python tools/bench_buffer.py engines --engines 1000 --slots 64 --seconds 30 --json FILE

`speed`: the workload and the rivals of `buffer_rivals`, and beside them the buffer with everything on: its service as a process
of its own, CURVE, ledger, log on disk (`durability = "os"`), admission, lease, append, score, read and commit of every
rollout, through the library's own clients. `account`: the same, and what the CPU time of a rollout was spent on. `engines`: so many clients of one buffer process, each with so many rollouts under way, on fake
engines that only sleep: latency of leases, segments per second, memory.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import operator
import pstats
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import rich
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import buffer_engines
import buffer_rivals as rivals
from buffer_shards import GROUP, Shards

from asyncrl.buffer import BlockingBufferClient, BufferAddress, BufferClient, BufferConfig, Segment, wire
from asyncrl.buffer.connection import BlockingConnection

BOUND: Final = 128
"""Versions: the workload's rollouts carry versions 0 to 31, and every batch makes one more."""
FIRST_VERSION: Final = 31
HELD_ROLLOUTS: Final = 4096
PROMPT: Final = list(range(64))


class Feeder(threading.Thread):
    """Keeps `HELD_ROLLOUTS` admitted, in the parent's process."""

    def __init__(self, address: BufferAddress, prompts_per_step: int) -> None:
        super().__init__(name="feeder", daemon=True)
        self._address, self._all = address, (BOUND + 1) * prompts_per_step
        self.ended = threading.Event()

    def run(self) -> None:
        """Looks every few milliseconds; ends when told to."""
        shards = [BlockingConnection(endpoint, self._address.keys) for endpoint in self._address.endpoints]
        position, most = 0, HELD_ROLLOUTS // GROUP // len(shards)
        while not self.ended.wait(0.003):
            for connection in shards:
                free = connection.ask(wire.Capacity(timeout_s=0.0)).reply.value
                count = most - (self._all // len(shards) - free)
                if count <= 0 or not free:
                    continue
                request = wire.Admit(
                    positions=list(range(position, position + count)),
                    prompt_ids=[f"p{i}" for i in range(position, position + count)],
                    payloads=['{"answer": "7"}'] * count,
                    lengths=[len(PROMPT)] * count,
                    timeout_s=10.0,
                )
                connection.ask(request, np.array(PROMPT * count, np.int32).tobytes(), 10.0)
                position += count
        for connection in shards:
            connection.close()


class AsyncrlBuffer(rivals.Rival):
    """Everything on. Each push is leased, appended and scored by an engine of its own; as many engines as the others have slots."""

    name = "asyncrl buffer"
    config = BufferConfig()
    profile = ""
    stages: tuple[str, ...] = ()

    def open(self, resources: ExitStack) -> None:
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="bench-buffer-")))
        prompts_per_step = self.workload.batch // GROUP
        shards = Shards(folder, self.config, prompts_per_step, BOUND, self.profile, self.stages)
        resources.callback(shards.close)
        self.address = shards.address
        client = BlockingBufferClient(self.address)
        client.publish(FIRST_VERSION)
        client.close()
        feeder = Feeder(self.address, prompts_per_step)
        feeder.start()
        resources.callback(feeder.join, 10)
        resources.callback(feeder.ended.set)

    def sending(self, producer: int) -> Iterator[rivals.Send]:
        loop = asyncio.new_event_loop()
        pushing = _Pushing(self.address, producer, self.workload.slots)
        loop.run_until_complete(pushing.open())
        self.finish = lambda: loop.run_until_complete(pushing.drain())
        yield lambda rollouts: loop.run_until_complete(pushing.push(rollouts))
        loop.run_until_complete(pushing.close())
        loop.close()

    def receiving(self) -> Iterator[rivals.Receive]:
        client = BlockingBufferClient(self.address)
        version = FIRST_VERSION

        def receive(_: int) -> rivals.Push:
            nonlocal version
            found = client.read_batch(rivals.WAIT_S)
            if found is None:
                raise TimeoutError(f"no batch within {rivals.WAIT_S:.0f} s: {client.status()}")
            selection, rows = found
            tokens = rows["tokens"]
            offsets = tokens.offsets.to_numpy()
            version += 1
            client.commit(selection.batch_ids, version)
            return rivals.Push(
                tokens.values.to_numpy(),
                rows["logprobs"].values.to_numpy(),
                np.diff(offsets),
                rows["versions"].values.to_numpy()[offsets[:-1]],
            )

        yield receive
        client.close()


class _Pushing:
    """A producer's engines on its event loop."""

    def __init__(self, address: BufferAddress, producer: int, slots: int) -> None:
        self._client = BufferClient(address)
        self._free = [f"engine-{producer}-{slot}" for slot in range(slots)]
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        await self._client.__aenter__()

    async def push(self, rollouts: Sequence[rivals.Rollout]) -> None:
        """Waits for a free engine, which the end of a push makes."""
        while not self._free:
            await self._one_done()
        self._tasks.add(asyncio.create_task(self._carry(self._free.pop(), rollouts)))
        await asyncio.sleep(0)

    async def _one_done(self) -> None:
        done, self._tasks = await asyncio.wait(
            self._tasks, return_when=asyncio.FIRST_COMPLETED, timeout=rivals.WAIT_S
        )
        if not done:
            raise TimeoutError("a push has been under way for too long")
        for task in done:
            task.result()

    async def drain(self) -> None:
        while self._tasks:
            await self._one_done()

    async def close(self) -> None:
        await self._client.__aexit__()

    async def _carry(self, engine_id: str, rollouts: Sequence[rivals.Rollout]) -> None:
        leases: list[wire.Leased] = []
        while len(leases) < len(rollouts):
            leases += await self._client.lease(engine_id, len(rollouts) - len(leases), 10.0)
        segments = [
            Segment(
                rollout_id=lease.rollout_id,
                lease_id=lease.lease_id,
                start=0,
                version=rollout.version,
                tokens=rollout.ids,
                logprobs=rollout.logprobs,
                finish_reason="stop",
            )
            for lease, rollout in zip(leases, rollouts, strict=True)
        ]
        refused = await self._client.append(engine_id, segments)
        scored = [
            wire.Scored(lease.rollout_id, lease.lease_id, float(lease.rollout_id % 2)) for lease in leases
        ]
        refused += await self._client.score(scored)
        if refused:
            raise rivals.RivalError(f"leases of {refused[:5]} were lost")
        self._free.append(engine_id)


def speed(args: argparse.Namespace) -> dict[str, object]:
    rivals.RIVALS[AsyncrlBuffer.name] = AsyncrlBuffer
    names, missing = rivals.choose([name for name in args.rivals.split(",") if name], args.ray)
    AsyncrlBuffer.config = BufferConfig(shards=args.shards, durability=args.durability)
    pushes = [int(push) for push in args.pushes.split(",")]
    workloads = [rivals.Workload(args.rollouts, push, args.batch, args.seed) for push in pushes]
    figures = [each for workload in workloads for each in rivals.measure(names, workload, args.rounds)]
    rich.print(rivals.table(figures, missing))
    rows = [dataclasses.asdict(each) | {"sums": msgspec.structs.asdict(each.sums)} for each in figures]
    return {"batch": args.batch, "rounds": args.rounds, "figures": rows, "not_installed": missing}


STAGES: Final = (
    "service.BufferService._take_requests",
    "service.BufferService._serve_waiting",
    "service.BufferService._settle",
    "shard.Shard.seal",
    "shard.Shard.commit",
    "shard.Shard._admit",
    "ledger.Ledger.lease",
    "shard.Shard._leased",
    "shard.Shard._append",
    "shard.Shard._score",
    "ledger.Ledger.select",
    "shard.Shard._batch",
    "shard.Shard.places",
    "ledger.Ledger.commit",
    "log.Log.segments",
    "log.Log.states",
    "log.Log.commit",
    "columns.Columns.drop",
    "service.BufferService._body",
    "service.BufferService._reply",
)
"""The four stages of the service's loop, and what they call."""


def account(args: argparse.Namespace) -> dict[str, object]:
    """CPU microseconds per rollout: of each process, of the service's stages, and with `--functions` of its functions."""
    rivals.RIVALS[AsyncrlBuffer.name] = AsyncrlBuffer
    workload = rivals.Workload(args.rollouts, args.push, args.batch, args.seed)
    plain = rivals.run_rival(AsyncrlBuffer.name, workload)
    warm = sum(len(push) for p in range(2) for push in rivals.warm_up(workload, p))
    by_role = {role: 1e6 * s / args.rollouts for role, s in plain.cpu_s_by_role.items()}
    with tempfile.TemporaryDirectory() as folder:
        AsyncrlBuffer.profile = str(Path(folder) / "profile")
        AsyncrlBuffer.stages = () if args.functions else STAGES
        rivals.run_rival(AsyncrlBuffer.name, workload)
        if args.functions:
            stats = pstats.Stats(AsyncrlBuffer.profile).stats  # type: ignore[attr-defined]
            spent = {
                f"{Path(f).name}:{line} {name}": own for (f, line, name), (_, _, own, _, _) in stats.items()
            }
        else:
            spent = json.loads(Path(AsyncrlBuffer.profile).read_text())
    spent = {name: 1e6 * s / (args.rollouts + warm) for name, s in spent.items()}
    drawn = Table("of", "CPU us per rollout")
    for name, each in by_role.items():
        drawn.add_row(name, f"{each:.1f}")
    drawn.add_section()
    for name, each in sorted(spent.items(), key=operator.itemgetter(1), reverse=True)[: args.top]:
        drawn.add_row(name[:80], f"{each:.2f}")
    rich.print(drawn)
    print(
        f"{plain.rollouts_per_s:,.0f} rollouts/s at pushes of {args.push}; the stages were timed in a second run"
    )
    return {"push": args.push, "rollouts_per_s": plain.rollouts_per_s, "roles": by_role, "service": spent}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fast = commands.add_parser("speed")
    fast.add_argument("--pushes", default="1,8,256", help="rollouts per push, with commas")
    fast.add_argument("--rounds", type=int, default=1, help="the one of median speed is shown")
    fast.add_argument("--rivals", default="", help="names, with commas; default: all")
    fast.add_argument("--ray", action="store_true", help="`ray objects` too; its start takes seconds")
    fast.add_argument("--shards", type=int, default=1)
    fast.add_argument("--durability", default="os")
    costs = commands.add_parser("account")
    costs.add_argument("--push", type=int, default=8)
    costs.add_argument("--top", type=int, default=40)
    costs.add_argument(
        "--functions", action="store_true", help="by function, under cProfile, which slows it down"
    )
    for each in (fast, costs):
        each.add_argument("--rollouts", type=int, default=8192)
        each.add_argument("--batch", type=int, default=256)
        each.add_argument("--seed", type=int, default=0)
    many = commands.add_parser("engines")
    buffer_engines.add_arguments(many)
    for each in (fast, costs, many):
        each.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    result = {"speed": speed, "account": account, "engines": buffer_engines.run}[args.command](args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
