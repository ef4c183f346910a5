"""Finding and ending every process of a run on this machine, whoever started it.

Each process of a run, grandchildren that Ray does not know of included, carries `ASYNCRL_RUN=<run id>` in its
environment. So none can hide, and none of another run is touched. Called by launch, last.
"""

from __future__ import annotations

import os
from typing import Final

import psutil

RUN_VARIABLE: Final = "ASYNCRL_RUN"


def processes_of(run_id: str) -> list[psutil.Process]:
    """Every process with the mark of this run, but this one and its ancestors."""
    mine = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in mine and process.environ().get(RUN_VARIABLE) == run_id:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # ended since it was listed, or another user's
    return found


def end_processes(run_id: str, grace_s: float) -> list[str]:
    """Terminates what is left of the run, then kills it after `grace_s`; returns the names of what had to be killed."""
    left = processes_of(run_id)
    for process in left:
        _signal(process, kill=grace_s <= 0)
    _, alive = psutil.wait_procs(left, timeout=max(grace_s, 0.0))
    for process in alive:
        _signal(process, kill=True)
    psutil.wait_procs(alive, timeout=5.0)
    return [_name(process) for process in alive]


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
