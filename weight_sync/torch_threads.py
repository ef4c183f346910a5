"""Threads that call torch, and the end of the process. Until Python 3.14 a daemon thread that comes back from C++ once the
interpreter ends is unwound on the spot. torch's bindings do not stand that: `terminate called without an active exception`, and
the process is aborted. Nor may such a thread be waited for without end: a transfer whose peer is gone holds it for long.

Invariants
----------
- When the interpreter ends, each of these threads has ended, or stands still for good, outside of torch and with all that it
  holds; but for one that was `END_S` long in a single call, and is taken not to come back at all.
- What a thread got as its work is freed before it counts as ended.
Called by the parts of the `collective` transport that wait for others.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from typing import Final

END_S: Final = 20.0
"""How long the end of the process waits for calls into torch: a connection, the freeing of a group."""

_ending = threading.Event()
_away: dict[threading.Thread, threading.Event] = {}
"""Threads that may be in torch's code -> set once that is over."""


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """Starts a daemon thread that does `work`."""
    held = [work]
    thread = threading.Thread(target=_run, args=(held,), name=name, daemon=True)
    _away[thread] = threading.Event()
    thread.start()
    return thread


def stand_still() -> None:
    """Called again and again by a thread of these while it waits: returns at once, but when the process ends, never."""
    if not _ending.is_set() or (away := _away.get(threading.current_thread())) is None:
        return
    away.set()
    # Waits for: nothing. Ends: with the process.
    while True:
        time.sleep(3600.0)


def _run(held: list[Callable[[], None]]) -> None:
    try:
        held.pop()()
    finally:
        _away.pop(threading.current_thread()).set()


@atexit.register
def _end() -> None:
    """Waits for: these threads to be out of torch's code. Unblocked by: them, which end or stand still. Ends: then, or after
    `END_S`."""
    _ending.set()
    deadline = time.monotonic() + END_S
    for away in list(_away.values()):
        away.wait(max(0.0, deadline - time.monotonic()))
