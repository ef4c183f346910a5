"""The conservation equation: admitted = trained + dropped(reason) + failed(reason) + live. Pure. Called by `ledger`."""

from __future__ import annotations

from asyncrl.buffer.book import Book
from asyncrl.buffer.errors import ConservationError
from asyncrl.buffer.records import Counts
from asyncrl.buffer.schema import State


def counts(book: Book) -> Counts:
    return Counts(
        admitted=book.admitted,
        trained=book.trained,
        baselines=book.baselines,
        dropped=dict(book.dropped),
        failed=dict(book.failed),
        live=len(book.rollouts),
    )


def check(book: Book, *, every_rollout: bool) -> Counts:
    """Recounts the equation from the live rollouts, groups and states, not from the counters alone.

    Raises ConservationError. `every_rollout`: each is looked up too, which takes its time.
    """
    found = counts(book)
    members = sum(len(g.rollouts) for g in book.groups.values())
    orphans: list[int] = []
    if every_rollout:
        orphans = [r for g in book.groups.values() for r in g.rollouts if r not in book.rollouts]
    if not found.holds or members != found.live or orphans or sum(book.by_state) != found.live:
        raise ConservationError(
            f"at version {book.version}: {found}, rollouts of live groups {members}, by state "
            f"{sum(book.by_state)}, missing {orphans[:5]}"
        )
    return found


def by_state(book: Book) -> dict[str, int]:
    """Live rollouts."""
    return {s.name.lower(): book.by_state[s] for s in State if s <= State.BATCHED}
