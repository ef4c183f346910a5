"""Finding and ending every process that this one has started, grandchildren that Ray does not know of included.

The launching process adopts orphans (Linux: `PR_SET_CHILD_SUBREAPER`): an engine's child whose parent was killed
becomes the launcher's own child instead of the system's, so the tree below the launcher is always the whole run.
Called by launch.
"""

from __future__ import annotations

import ctypes
import os

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on orphans below this process come to it. Raises OSError where the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants() -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(os.getpid()).children(recursive=True)
    return found


def end_processes(grace_s: float) -> list[str]:
    """Ends everything below this process: asks, and kills after `grace_s`. Returns the names of what it killed."""
    left = descendants()
    if grace_s > 0:
        for process in left:
            _signal(process, kill=False)
        psutil.wait_procs(left, timeout=grace_s)
    killed = []
    # Killing a parent may bring an orphan up; ends when nothing is left, at the latest after a few generations.
    for _ in range(5):
        alive = [process for process in descendants() if _runs(process)]
        if not alive:
            break
        killed += [_name(process) for process in alive]
        for process in alive:
            _signal(process, kill=True)
        psutil.wait_procs(alive, timeout=2.0)
    return killed


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.NoSuchProcess:
        return


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.name()} ({process.pid})"
    except psutil.NoSuchProcess:
        return f"process {process.pid}"
