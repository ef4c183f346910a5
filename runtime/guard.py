"""The small process that the user started: it holds the run as its child, and clears up after it however it ends.

Ray's helpers outlive a launcher that was killed with SIGKILL. So the launcher is a child of this process, which imports
nothing heavy and does nothing but wait: it passes signals on, adopts orphans, and when the launcher has ended, in
whatever way, ends everything below and removes its shared memory. If this process is killed itself, the kernel tells the launcher to stop in order.
Called by the CLI.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from asyncrl.runtime.processes import adopt_orphans, end_processes
from asyncrl.weight_sync.shm import remove_leftovers

_PR_SET_PDEATHSIG = 1
GUARD_VARIABLE = "ASYNCRL_GUARD"


def guarded_run() -> str | None:
    """The run's id where this process is the launcher below a guard (of whose death it then asks to be told), else None."""
    found = os.environ.pop(GUARD_VARIABLE, None)
    if found is None:
        return None
    guard, run_id = found.split(":")
    follow_parent(int(guard))
    return run_id


def follow_parent(parent: int) -> None:
    """From now on SIGHUP comes when the process that started this one ends; ends at once where it has.

    It may come several times: Linux tells of each of the parent's threads that ends, as the next one is the parent then. So
    it is a signal of which the second means no more than the first.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the process that started this run has ended")


def guard(arguments: Sequence[str]) -> int:
    """Runs `asyncrl ARGUMENTS` as a child and returns its exit code (128 + number for a signal)."""
    adopt_orphans()
    run_id = secrets.token_hex(6)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "asyncrl.runtime.cli", *arguments],
        env={**os.environ, GUARD_VARIABLE: f"{os.getpid()}:{run_id}"},
        process_group=0,  # the terminal's Ctrl-C comes to the guard alone, and is passed on once
    )

    def pass_on(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup a run outlives its terminal
            signal.signal(number, pass_on)
    code = child.wait()
    end_processes(0.0)
    remove_leftovers(run_id)
    return code if code >= 0 else 128 - code
