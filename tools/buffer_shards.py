"""Shards of the buffer as processes of their own, for the benchmarks: started, found, ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import psutil

from asyncrl.buffer import (
    BlockingBufferClient,
    BufferAddress,
    BufferConfig,
    StalenessConfig,
    ledger_settings,
)
from asyncrl.buffer.keys import make_keys
from asyncrl.buffer.process import ProcessConfig

GROUP: Final = 8
"""Rollouts per prompt."""
STAGED: Final = """
import importlib, json, sys, time
from asyncrl.buffer import process
spent = {}
def timed(owner, name, label):
    inner = getattr(owner, name)
    def outer(*arguments, **named):
        began = time.thread_time()
        try:
            return inner(*arguments, **named)
        finally:
            spent[label] = spent.get(label, 0.0) + time.thread_time() - began
    setattr(owner, name, outer)
for stage in json.loads(sys.argv[3]):
    module, owner, name = stage.split(".")
    timed(getattr(importlib.import_module("asyncrl.buffer." + module), owner), name, stage)
process.main(sys.argv[1])
with open(sys.argv[2], "w") as file:
    json.dump(spent, file)
"""
"""A service that adds up the CPU time of some of its methods (`module.Class.method`, callers and called alike)."""
PROFILED: Final = """
import cProfile, sys, time
from asyncrl.buffer import process
profile = cProfile.Profile(time.thread_time)
profile.runcall(process.main, sys.argv[1])
profile.dump_stats(sys.argv[2])
"""
_START_S, _END_S = 60.0, 20.0


class Shards:
    """Services in `folder`; `close` ends them. With `profile` they write to that file what cProfile saw, or what
    the `stages` took."""

    def __init__(
        self,
        folder: Path,
        config: BufferConfig,
        prompts_per_step: int,
        bound: int,
        profile: str = "",
        stages: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        _, client_keys = make_keys(folder / "keys")
        staleness = StalenessConfig(max_staleness_versions=bound)
        self.processes = []
        for shard in range(config.shards):
            process = ProcessConfig(
                settings=ledger_settings(config, staleness, prompts_per_step, GROUP, shard),
                buffer=config,
                folder=str(folder / "rollouts" / str(shard)),
                keys=str(folder / "keys"),
                endpoint_file=str(folder / f"endpoint-{shard}"),
                parent=os.getpid(),
            )
            path = folder / f"process-{shard}.json"
            path.write_bytes(msgspec.json.encode(process))
            code = ["-m", "asyncrl.buffer.process", str(path)]
            if profile:
                code = ["-c", STAGED if stages else PROFILED, str(path), profile, json.dumps(list(stages))]
            with (folder / f"log-{shard}").open("wb") as log:
                self.processes.append(subprocess.Popen([sys.executable, "-P", *code], stderr=log))
        endpoints = tuple(self._endpoint(shard) for shard in range(config.shards))
        self.address = BufferAddress(endpoints=endpoints, keys=client_keys)

    def _endpoint(self, shard: int) -> str:
        file, deadline = self.folder / f"endpoint-{shard}", time.monotonic() + _START_S
        # Waits for the service to write its endpoint; ends with it, with its process, or in time.
        while not file.exists():
            if time.monotonic() > deadline or self.processes[shard].poll() is not None:
                log = (self.folder / f"log-{shard}").read_text()
                raise RuntimeError(f"shard {shard} did not come up within {_START_S:.0f} s:\n{log[-2000:]}")
            time.sleep(0.02)
        return file.read_text()

    @property
    def rss_bytes(self) -> int:
        return sum(psutil.Process(p.pid).memory_info().rss for p in self.processes)

    def close(self) -> None:
        client = BlockingBufferClient(self.address)
        try:
            if all(process.poll() is None for process in self.processes):
                client.stop()
        finally:
            client.close()
            for process in self.processes:
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(_END_S)
