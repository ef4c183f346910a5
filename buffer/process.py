"""A shard as a process of its own, without Ray: `python -m asyncrl.buffer.process FILE`.

FILE is a `ProcessConfig` in JSON. The endpoint is written to `config.endpoint_file` once requests are taken. The process ends with
its parent, on `Stop`, or on SIGTERM. `describe` writes FILE and `start` starts the process. Used by the benchmark, by tests that
kill it, and wherever Ray is not at hand.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from asyncrl.buffer import base
from asyncrl.buffer.config import BufferConfig, StalenessConfig
from asyncrl.buffer.keys import read_server_keys
from asyncrl.buffer.records import LedgerSettings, ledger_settings
from asyncrl.buffer.service import BufferService

_PR_SET_PDEATHSIG = 1


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    settings: LedgerSettings
    buffer: BufferConfig
    folder: str
    """Of the shard's log."""
    keys: str
    """Folder of the run's keys."""
    endpoint_file: str
    parent: int
    """Process that this one must not outlive."""
    host: str = "127.0.0.1"
    port: int = 0


class ShardFiles(NamedTuple):
    """What one shard has in the run's folder, beside its log and the run's keys."""

    config: Path
    """FILE."""
    endpoint: Path
    said: Path
    """Both outputs of all its processes, one after the other."""


def describe(
    folder: Path,
    config: BufferConfig,
    staleness: StalenessConfig,
    prompts_per_step: int,
    rollouts_per_prompt: int,
    *,
    greedy_baseline: bool = False,
    log_folder: Path | None = None,
    ports: Sequence[int] = (),
) -> list[ShardFiles]:
    """Writes FILE for each shard of a buffer whose processes are children of this one. The run's keys are in `folder/keys`
    (`keys.make_keys`), its log comes to `folder/rollouts` where `log_folder` does not say otherwise. Without `ports` each
    takes a free one. Raises ValueError where a shard would have no part in a batch."""
    log_folder, shards = log_folder or folder / "rollouts", []
    for shard in range(config.shards):
        files = ShardFiles(
            folder / f"process-{shard}.json", folder / f"endpoint-{shard}", folder / f"log-{shard}.txt"
        )
        described = ProcessConfig(
            settings=ledger_settings(
                config,
                staleness,
                prompts_per_step,
                rollouts_per_prompt,
                shard,
                greedy_baseline=greedy_baseline,
            ),
            buffer=config,
            folder=str(log_folder / str(shard)),
            keys=str(folder / "keys"),
            endpoint_file=str(files.endpoint),
            parent=os.getpid(),
            port=ports[shard] if ports else 0,
        )
        files.config.write_bytes(msgspec.json.encode(described))
        shards.append(files)
    return shards


def start(
    files: ShardFiles, code: Sequence[str] = (), arguments: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Starts a shard, and after its end again, on the same log. It takes requests once its endpoint is written; that of an
    earlier process is removed. `code` in place of this module gets FILE and the further `arguments`."""
    files.endpoint.unlink(missing_ok=True)
    program = code or ("-m", "asyncrl.buffer.process")
    with files.said.open("ab") as said:
        # -P: the present folder is not where modules come from.
        return subprocess.Popen(
            [sys.executable, "-P", *program, str(files.config), *arguments], stdout=said, stderr=said
        )


def tune_process() -> None:
    """For a process that serves a shard and does nothing else. The cycle collector would stop its loop for up to a second to
    walk all live rollouts, which are no cycles once they are closed."""
    pa.array(np.zeros(1))  # the first of its kind imports pandas where that is installed: a third of a second
    gc.collect()
    gc.freeze()
    gc.disable()


def main(path: str) -> None:
    config = msgspec.json.decode(Path(path).read_bytes(), type=ProcessConfig)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != config.parent:
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    tune_process()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    service = BufferService(
        settings=config.settings,
        config=config.buffer,
        folder=Path(config.folder),
        keys=read_server_keys(Path(config.keys)),
        host=config.host,
        port=config.port,
    )
    base.write(Path(config.endpoint_file), service.endpoint.encode())
    service.run()


if __name__ == "__main__":
    main(sys.argv[1])
