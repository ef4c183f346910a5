"""A shard as a process of its own, without Ray: `python -m asyncrl.buffer.process FILE`.

FILE is a `ProcessConfig` in JSON. The endpoint is written to `config.endpoint_file` once requests are taken. The process ends with
its parent, on `Stop`, or on SIGTERM. Used by the benchmark, by tests that kill it, and wherever Ray is not at hand.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from asyncrl.buffer import base
from asyncrl.buffer.config import BufferConfig
from asyncrl.buffer.keys import read_server_keys
from asyncrl.buffer.records import LedgerSettings
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
