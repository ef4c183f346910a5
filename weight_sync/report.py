"""What one committed sync was like. Made by the publisher; read by the learner's metrics and the supervisor."""

from __future__ import annotations

import msgspec

from asyncrl.weight_sync.transaction import MemberReport


class SyncReport(msgspec.Struct, frozen=True, kw_only=True):
    """One version on its way, from `begin` to the last engine's confirmation. Times in seconds."""

    version: int
    seconds: float
    """From `begin` until settled."""
    write_s: float
    """Of them, within `write`: copies and checksums. The rest before the offer is the learner's gathering."""
    transaction_s: float
    """Of them, from the offer until settled."""
    total_bytes: int
    engines: dict[str, MemberReport]
    """stage_s, apply_s and stall_s of each, and what became of it."""
    out_of_service: dict[str, str]
    """Engines that did not apply the version, with their errors: they must be restarted."""
    probe_max_diff: dict[str, float]
    """Largest |difference| of a probe logprob per engine; empty if the sync was not verified."""
    ignored: dict[str, int]
    """Messages that changed nothing: reason -> count."""

    @property
    def max_stall_s(self) -> float:
        """The longest time that one engine could run no decode step."""
        return max((member.stall_s for member in self.engines.values()), default=0.0)
