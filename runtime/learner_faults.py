"""Which failures of a run are its learner's, what is told of them, and whether the run goes on from a checkpoint. Pure.

A fault is a step that the learner itself found unfit (`learner.faults`), or the death of one of its processes. Anything else,
such as an error of the program, would come again and is none: the run ends.
Called by the launcher, the supervisor and `learner_ranks`.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncrl.buffer.records import Selection
from asyncrl.learner.faults import NAMED_ROLLOUTS, LearnerFault
from asyncrl.runtime.watch import PartFailed

PART = "learner-"
"""How the names of the learner's parts begin."""


def is_fault(error: Exception) -> bool:
    """Of the learner."""
    if not isinstance(error, PartFailed) or not error.part.startswith(PART):
        return False
    return error.process_died or isinstance(error.raised, LearnerFault)


def verdict(errors: Sequence[PartFailed]) -> PartFailed:
    """Of what several ranks ended with, the one that tells why: a rank that died or found a fault, before those that only lost
    touch with it."""
    return next((e for e in errors if e.process_died), next((e for e in errors if is_fault(e)), errors[0]))


def named(selection: Selection) -> str:
    """`batch 7 of version 4: rollouts 1, 2, 3 and 13 more, of versions 3 to 4`."""
    ids = ", ".join(map(str, selection.rollout_ids[:NAMED_ROLLOUTS]))
    more = len(selection.rollout_ids) - NAMED_ROLLOUTS
    rest = f" and {more} more" if more > 0 else ""
    batch = "/".join(map(str, selection.batch_ids))
    oldest, newest = selection.version - selection.staleness_max, selection.version - selection.staleness_min
    return f"batch {batch} of version {selection.version}: rollouts {ids}{rest}, of versions {oldest} to {newest}"


class Restores:
    """How often a run has gone back since it last got further."""

    def __init__(self, most: int) -> None:
        """More than `most` without a step of progress are too many (`learner.max_restores`)."""
        self.most = most
        self.without_progress = 0
        self._furthest = -1

    def one_too_many(self, steps_done: int) -> bool:
        """Notes a fault after `steps_done` steps of the run; true where the run is to end after all."""
        if steps_done > self._furthest:
            self._furthest, self.without_progress = steps_done, 0
        self.without_progress += 1
        return self.without_progress > self.most
