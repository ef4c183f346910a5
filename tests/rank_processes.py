"""Scripts run as the learner's ranks: processes of their own that meet at free ports, and end before the test does."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(
    script: str,
    folder: Path,
    out: Path,
    ranks: int,
    *more: str,
    deadline_s: float = 250.0,
    groups: int | None = None,
    died: int | None = None,
) -> None:
    """`script` with the arguments FOLDER OUT RANK RANKS ADDRESSES MORE...; waits for all of them.

    ADDRESSES: a port of its own for each process group that the script joins one after the other, joined by commas: `groups`
    of them, by default one for each of `more`. Raises AssertionError with the end of stderr where a rank fails; rank `died` must end
    by SIGKILL instead.
    """
    out.mkdir()
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(groups or len(more) or 1)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        addresses = ",".join(f"127.0.0.1:{free.getsockname()[1]}" for free in sockets)
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(Path(__file__).parent),  # what tests share
        "OMP_NUM_THREADS": "1",
    }
    logs = [out / f"stderr-{rank}" for rank in range(ranks)]
    with contextlib.ExitStack() as stack:
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    script,
                    str(folder),
                    str(out),
                    str(rank),
                    str(ranks),
                    addresses,
                    *more,
                ],
                env=environment,
                stderr=stack.enter_context(logs[rank].open("w")),
            )
            for rank in range(ranks)
        ]
        try:
            for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
                process.wait(timeout=deadline_s)
                wanted = -signal.SIGKILL if rank == died else 0
                assert process.returncode == wanted, log.read_text()[-4000:]
        finally:
            for process in processes:
                process.kill()
                process.wait(timeout=10)
