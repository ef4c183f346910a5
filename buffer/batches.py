"""Which groups make the next batch, and what becomes of one that was handed over. Pure.

A batch is B complete groups, the most urgent first, that may leave by the rules of `staleness`; each is handed over once, and
once more where its answer was lost. Called by `ledger`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

from asyncrl.buffer import staleness
from asyncrl.buffer.book import Book
from asyncrl.buffer.errors import BadRequest
from asyncrl.buffer.records import Group, Selection, describe

OVER_STALE: Final = "over_stale"
"""Why a group was dropped whose tokens are past the bound."""


class Batches:
    """Decides over the groups of `book`."""

    def __init__(self, book: Book) -> None:
        self._book, self._settings = book, book.settings
        self._nothing_to_read = False
        """A read found no batch, and nothing has happened since that could make one."""

    def look_again(self) -> None:
        """Something happened that may make a batch: a group is complete or gone, a version was published."""
        self._nothing_to_read = False

    def select(self, after: int | None = None) -> Selection | None:
        """Decides on the next batch, or None while there is no valid one. The most urgent groups come first.

        `after`: the last batch that the reader got. One that was handed over since did not reach it: it comes again.
        """
        if not self._book.serving:
            return None
        if after is not None:
            lost = [b for b in self._book.batches if b > after]
            if lost:
                return self._describe(min(lost))
        if self._nothing_to_read:
            return None
        chosen = self._choose()
        if chosen is None:
            self._nothing_to_read = True
            return None
        batch_id = self._book.next_batch
        self._book.batch(chosen, batch_id)
        return self._describe(batch_id)

    def _describe(self, batch_id: int) -> Selection:
        return describe(
            batch_id, self._book.version, self._book.batches[batch_id], self._settings.max_staleness_versions
        )

    def _choose(self) -> list[Group] | None:
        ready, chosen = self._book.ready, list[Group]()
        while ready and len(chosen) < self._settings.prompts_per_step:
            oldest_version, group_id = heapq.heappop(ready)
            group = self._book.groups.get(group_id)
            if group is None or group.batch_id or group.oldest_version != oldest_version:
                continue
            if self._is_over_stale(group):
                self._book.drop_group(group, OVER_STALE)
                continue
            chosen.append(group)
        if len(chosen) == self._settings.prompts_per_step and self._may_leave(chosen):
            return chosen
        for group in chosen:
            assert group.oldest_version is not None
            heapq.heappush(ready, (group.oldest_version, group.group_id))
        return None

    def _is_over_stale(self, group: Group) -> bool:
        bound = self._settings.max_staleness_versions
        assert group.oldest_version is not None
        if self._settings.over_stale == "drop":
            return staleness.deadline(group.oldest_version, bound) < self._book.version
        return not staleness.is_trainable(
            self._book.version, min(group.newest_version, self._book.version), bound
        )

    def _may_leave(self, chosen: Sequence[Group]) -> bool:
        if self._settings.over_stale != "wait":
            return True
        bound = self._settings.max_staleness_versions
        due = {staleness.deadline(age, bound): count for age, count in self._book.ages.items()}
        for group in chosen:
            assert group.oldest_version is not None
            due[staleness.deadline(group.oldest_version, bound)] -= 1
        last = chosen[-1].oldest_version
        assert last is not None
        # Where the most urgent groups of all are chosen no later batch could be a better one.
        if all(not left or d >= staleness.deadline(last, bound) for d, left in due.items()):
            return True
        return staleness.may_hand_over(self._book.version, due, self._settings.prompts_per_step)

    def commit(self, batch_id: int, version: int) -> bool:
        """The batch was trained and `version` published. True when it was before: the same commit once more."""
        book = self._book
        if version == book.version and 0 < batch_id < book.next_batch and batch_id not in book.batches:
            return True
        if version != book.version + 1:
            raise BadRequest(
                f"commit of batch {batch_id} publishes version {version}, expected {book.version + 1}"
            )
        groups = book.batches.get(batch_id)
        if groups is None:
            raise BadRequest(f"batch {batch_id} is not handed over (open: {sorted(book.batches)})")
        book.version = version
        book.train([r for g in groups for r in g.rollouts.values()])
        self.look_again()
        return False
