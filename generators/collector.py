"""Keeps the cycle collector from holding the event loop up. Called by the owner of an engine's process, once all is loaded.

A full collection walks every object of the process: with vLLM and torch loaded that is a tenth of a second and more in which
no token is taken from the engine, again and again. What was loaded stays until the end, so it need not be walked. What a
thousand rollouts are made of still takes 50 ms, and has no cycles: for it a full collection is made rarely. The two small
ones, of what was made just now, go on as ever.
"""

from __future__ import annotations

import gc
from typing import Final

_FULL: Final = 10_000
"""Middle collections to one full one; Python's own is 10."""


def leave_out_what_is_loaded() -> None:
    """From now on the collector looks at what is made from now on, and seldom at all of it."""
    gc.collect()
    gc.freeze()
    small, middle, _ = gc.get_threshold()
    gc.set_threshold(small, middle, _FULL)
