"""What can go wrong in the buffer, by name."""

from __future__ import annotations


class BufferFault(RuntimeError):
    """Root of the buffer's errors."""


class ConservationError(BufferFault):
    """admitted != trained + dropped + failed + live: a rollout was lost or counted twice. A bug; the run must stop."""


class LeaseLost(BufferFault):
    """The lease that a request names is not, or no longer, the rollout's: stop working on it, send nothing more."""


class BadRequest(BufferFault):
    """The request cannot be carried out as it stands; the message says why."""


class BufferUnreachable(BufferFault):
    """No answer from the buffer within the deadline."""
