"""Shards of the buffer as processes of their own, for the benchmarks: started, found, ended."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil

from asyncrl.buffer import (
    BlockingBufferClient,
    BufferAddress,
    BufferConfig,
    StalenessConfig,
    process,
)
from asyncrl.buffer.keys import make_keys

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
        _, self._keys = make_keys(folder / "keys")
        staleness = StalenessConfig(max_staleness_versions=bound)
        self._files = process.describe(folder, config, staleness, prompts_per_step, GROUP)
        began = time.monotonic()
        code = ("-c", STAGED if stages else PROFILED) if profile else ()
        arguments = (profile, json.dumps(list(stages))) if profile else ()
        self.processes = [process.start(files, code, arguments) for files in self._files]
        self.address = self._find()
        self.start_s = time.monotonic() - began
        """From the start of the processes, on empty folders, until they take requests."""

    def _find(self) -> BufferAddress:
        endpoints = tuple(self._endpoint(shard) for shard in range(len(self._files)))
        return BufferAddress(endpoints=endpoints, keys=self._keys)

    def kill_and_restart(self) -> float:
        """SIGKILL for all, then new processes on what they left, at new addresses; returns the seconds until those take
        requests."""
        for killed in self.processes:
            killed.kill()
            killed.wait(_END_S)
        began = time.monotonic()
        self.processes = [process.start(files) for files in self._files]
        self.address = self._find()
        return time.monotonic() - began

    def _endpoint(self, shard: int) -> str:
        files, deadline = self._files[shard], time.monotonic() + _START_S
        # Waits for the service to write its endpoint; ends with it, with its process, or in time.
        while not files.endpoint.exists():
            if time.monotonic() > deadline or self.processes[shard].poll() is not None:
                said = files.said.read_text()
                raise RuntimeError(f"shard {shard} did not come up within {_START_S:.0f} s:\n{said[-2000:]}")
            time.sleep(0.005)
        return files.endpoint.read_text()

    @property
    def rss_bytes(self) -> int:
        return sum(psutil.Process(p.pid).memory_info().rss for p in self.processes)

    def close(self) -> None:
        client = BlockingBufferClient(self.address)
        try:
            if all(each.poll() is None for each in self.processes):
                client.stop()
        finally:
            client.close()
            for left in self.processes:
                try:
                    left.wait(_END_S)
                except subprocess.TimeoutExpired:
                    left.kill()
                    left.wait(_END_S)
