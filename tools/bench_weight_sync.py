"""Weight sync over each transport against memcpy, in one run: one sender and N receivers, each a process of its own.

    python tools/bench_weight_sync.py                                          # all that runs here; minutes
    python tools/bench_weight_sync.py --models 500M --dtypes bfloat16 --transports shm --receivers 1 --json out.json
    python tools/bench_weight_sync.py --models 2M --transports shm --receivers 2 --lag 0 2 --slow-s 2
    python tools/bench_weight_sync.py --models 500M --transports tcp --chunk-kb 256 1024 4096
    python tools/bench_weight_sync.py --engine                                 # the pause of a real vLLM engine

memcpy is what nothing that goes through the host's memory can beat: a copy of every tensor into warm shared memory, and a copy
out of it, by one thread; it is measured before each sync, and the ratio is the median over these pairs. A sync is from `begin` until
every receiver has the bytes in tensors of its own, with checksums made and verified. Rounds in which pages are touched for the
first time are left out. The learner stalls from `begin` to the return of `commit`; with `--lag` of 1 or more that is sooner than
the sync's end. The engine stalls while it copies out; what a real engine does in that time is measured by `--engine`.
`tcp` sends no deltas here: each version has the same bytes, and its delta would be empty.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import time
from pathlib import Path

import torch
from sync_models import MODELS, Weights, blank, plan_of, random_weights
from sync_sides import TRANSPORTS, AnyPublisher, chunk_of, copy_out, publisher_of, receivers
from sync_stall import engine_stall
from sync_table import HEADER, Case, Times, line, row

from asyncrl.weight_sync import chunks
from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.pieces import cut, put_all
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.report import MemberReport, SyncReport
from asyncrl.weight_sync.shm import slot_path
from asyncrl.weight_sync.slots import Slot
from asyncrl.weight_sync.welcomer import Welcomer

ENGINES_S = 300.0


class Floor:
    """memcpy in and out of shared memory."""

    def __init__(self, run_id: str, plan: Plan, weights: Weights) -> None:
        self._slot = Slot(slot_path(run_id, 99), plan)
        self._plan, self._weights, self._back = plan, weights, blank(plan)
        path = str(self._slot.path)
        self._mapped = torch.from_file(path, shared=True, size=plan.total_bytes, dtype=torch.uint8)

    def seconds(self) -> float:
        started = time.monotonic()
        for bucket in self._plan.buckets:
            put_all(self._mapped, self._plan, bucket, cut(self._plan, bucket, self._weights))
        copy_out(self._mapped, self._plan, self._back)
        return time.monotonic() - started

    def close(self) -> None:
        self._slot.close()


class Sender:
    """The learner: sends versions one after the other, and waits for the engines between two."""

    def __init__(self, publisher: AnyPublisher, plan: Plan, weights: Weights, lag: int) -> None:
        self._publisher, self._plan, self._weights = publisher, plan, weights
        self._lag = lag
        self._welcomer = (
            Welcomer(publisher) if lag and not isinstance(publisher, CollectivePublisher) else None
        )

    def send(self, version: int, engines: list[str], memcpy_s: float) -> Times:
        """Seconds of one version's way."""
        started = time.monotonic()
        if self._welcomer is None:
            report = self._written(version)
            learner_s = time.monotonic() - started
            members = report.engines
        else:
            with self._welcomer.paused():
                report = self._written(version)
            learner_s = time.monotonic() - started
            members = self._settled(version, set(engines))
        sync_s = time.monotonic() - started
        wrong = {name: member.error for name, member in members.items() if member.outcome != "applied"}
        if set(members) != set(engines) or wrong:
            raise RuntimeError(
                f"version {version}: expected it applied by {engines}, got {members.keys()}, {wrong}"
            )
        return Times(
            memcpy=memcpy_s,
            sync=sync_s,
            learner=learner_s,
            write=report.write_s,
            stage=max(member.stage_s for member in members.values()),
            apply=max(member.apply_s for member in members.values()),
            stall=max(member.stall_s for member in members.values()),
        )

    def _written(self, version: int) -> SyncReport:
        self._publisher.begin(version)
        for bucket in self._plan.buckets:
            self._publisher.write(bucket, cut(self._plan, bucket, self._weights))
        return self._publisher.commit()

    def _settled(self, version: int, engines: set[str]) -> dict[str, MemberReport]:
        """Waits for each engine's update. Unblocked by the welcomer's thread. Ends after `ENGINES_S`."""
        assert self._welcomer is not None
        members: dict[str, MemberReport] = {}
        deadline = time.monotonic() + ENGINES_S
        while engines - members.keys():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"version {version}: {engines - members.keys()} did not take it in {ENGINES_S:g} s"
                )
            self._welcomer.check()
            for report in self._welcomer.take_reports():
                if report.version == version:
                    members |= report.engines
            time.sleep(0.001)
        return members

    def close(self) -> None:
        if self._welcomer is not None:
            self._welcomer.close()


def measure(case: Case, args: argparse.Namespace) -> list[Times]:
    """Rounds of a memcpy and a sync."""
    on_gpu = case.transport == "ipc"
    weights = random_weights(case.model, args.masters or case.dtype, "cuda" if on_gpu else "cpu")
    plan = plan_of(weights, case.dtype, int(args.bucket_mb * 2**20))
    run_id = f"bench-{os.getpid()}"
    warm = 2 + case.lag
    floor = Floor(run_id, plan, weights)
    chunk_of(case.chunk_kb)
    try:
        with publisher_of(case.transport, run_id, plan, case.lag, delta=False) as publisher:
            last = warm + args.rounds - 1
            sides = (case.receivers, last, args.threads, args.slow_s, case.chunk_kb)
            with receivers(publisher, *sides) as engines:
                sender = Sender(publisher, plan, weights, case.lag)
                try:
                    rounds = [sender.send(version, engines, floor.seconds()) for version in range(last + 1)]
                finally:
                    sender.close()
        return rounds[warm:]
    finally:
        floor.close()


def cases(args: argparse.Namespace) -> list[Case]:
    return [
        Case(*each)
        for each in itertools.product(
            args.models, args.dtypes, args.transports, args.receivers, args.lag, args.chunk_kb
        )
        if not (each[2] == "collective" and each[4]) and (each[2] == "tcp" or each[5] == args.chunk_kb[0])
    ]


def arguments() -> argparse.Namespace:
    here = [name for name in TRANSPORTS if name != "ipc" or torch.cuda.is_available()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--masters", choices=["float32"], help="the learner's dtype; default: that of the wire"
    )
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=here)
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--lag", type=int, nargs="+", default=[0], help="max_lag_versions; 0: the learner waits"
    )
    parser.add_argument(
        "--slow-s", type=float, default=0.0, help="the first engine takes so much longer to stage"
    )
    parser.add_argument(
        "--chunk-kb",
        type=int,
        nargs="+",
        default=[chunks.CHUNK_BYTES >> 10],
        help="what tcp asks for at once",
    )
    parser.add_argument("--bucket-mb", type=float, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--engine", action="store_true", help="only this: how long a real vLLM engine pauses")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[16], help="requests under way, with --engine"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if "ipc" in args.transports and not torch.cuda.is_available():
        raise SystemExit("--transports ipc: no CUDA device here")
    torch.set_num_threads(args.threads)
    if args.engine:
        rows = asyncio.run(engine_stall(args.models[0], args.concurrency))
    else:
        print(HEADER)
        rows = []
        for case in cases(args):
            rows.append(row(case, measure(case, args)))
            print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
