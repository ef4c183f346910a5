"""Ties the life of an engine's processes to that of the process that owns the engine. Called by `vllm_worker`."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading


def end_with(owner: int) -> None:
    """Kill this engine's processes when the process `owner` ends: its own kill leaves it no time to end them, and vLLM's
    engine core would wait for requests for ever.

    Waits, in a thread of its own, for the end of `owner`; unblocked by the kernel; ends with this process.
    """
    descriptor = os.pidfd_open(owner)

    def wait() -> None:
        select.select([descriptor], [], [])
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None and parent.pid != owner:
            os.kill(parent.pid, signal.SIGKILL)  # one of several workers: the parent is the engine core
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="asyncrl-owner", daemon=True).start()
