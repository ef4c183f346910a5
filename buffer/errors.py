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


class EngineBarred(BadRequest):
    """An engine asks for work under an id that was given up as dead: it must end, another has its rollouts."""


class ArenaUnknown(BufferFault):
    """A body is said to lie in an arena that the service does not know (any more): attach it again."""


class DiskFull(BufferFault):
    """The log cannot grow: nothing new is taken until there is room again, and nothing is lost meanwhile."""


class SnapshotUneven(BufferFault):
    """The shards' snapshots of one step do not show one frontier, however often they were made."""


class LogDamaged(BufferFault):
    """The log cannot be read back: more than a torn tail is wrong with it."""


class FolderInUse(BufferFault):
    """A shard's folder is open in another process (or twice in this one): two writers would spoil its log."""


class BufferUnreachable(BufferFault):
    """No answer from the buffer within the deadline."""
