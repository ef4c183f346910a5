"""What the children of this process are born with: environment variables and cores. Called by `vllm_start` only.

Both are properties of the starting process or thread that children inherit, so they are set, children are started, and
they are put back. Not for two threads at once: the caller holds a lock.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def environment_for_children(variables: Mapping[str, str]) -> Iterator[None]:
    """Set `variables` for the time of the block, and afterwards undo every change, whoever made it: starting vLLM
    sets some more."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextlib.contextmanager
def bound_to(cores: set[int] | None) -> Iterator[None]:
    """Bind this thread, and so what it starts, to `cores` for the time of the block; None: leave it as it is.

    Raises `ValueError` if this process may not run on one of them.
    """
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    if not cores <= before:
        raise ValueError(
            f"cores {sorted(cores)}: this process may run on {sorted(before)} only. Ask for fewer engines or cores."
        )
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
