"""Keeps the cycle collector from holding the event loop up. Called by the owner of an engine's process, once all is loaded.

A full collection walks every object of the process: with vLLM and torch loaded that is a tenth of a second and more in which
no token is taken from the engine, again and again. What was loaded stays until the end, so it need not be walked.
"""

from __future__ import annotations

import gc


def leave_out_what_is_loaded() -> None:
    """From now on the collector looks at what is made from now on, and at nothing else."""
    gc.collect()
    gc.freeze()
