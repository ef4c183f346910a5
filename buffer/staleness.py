"""The one definition of staleness, and every rule that follows from it. Pure.

staleness(token) = version at hand-over - version of the token          (versions; 0 = on policy)
A token is trainable when 0 <= staleness <= K, with K = `max_staleness_versions`, and a model sampled it. The tokens of an
environment (version `schema.ENVIRONMENT`) have no age: no deadline follows from them, and no figure here counts them.

One batch of B groups (`prompts_per_step`) makes one version. From that follow:
- Pacing. With H groups held (admitted, not terminal, the ones in training included) a group admitted now is handed
  over floor(H / B) versions later. It stays inside the bound while H <= (K + 1) B - 1, so (K + 1) B - H more fit.
- Deadlines. A group whose oldest token has version m must be handed over at version m + K at the latest.
- Waiting. A batch may leave at version v only if what stays behind can still meet every deadline:
  for all d >= v: #{groups left with deadline <= d} <= B (d - v).
  Pacing makes this true for new groups, the reader keeps it true, and so no token ever passes the bound.
Called by the ledger only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from asyncrl.buffer.schema import ENVIRONMENT


def staleness(handover_version: int, token_version: int) -> int:
    """Versions that were published between sampling a token and handing it over."""
    return handover_version - token_version


def is_sampled(token_version: int) -> bool:
    """Whether the token is a model's, and not the environment's."""
    return token_version != ENVIRONMENT


def is_trainable(handover_version: int, token_version: int, max_staleness_versions: int) -> bool:
    age = staleness(handover_version, token_version)
    return is_sampled(token_version) and 0 <= age <= max_staleness_versions


def oldest_trainable(handover_version: int, max_staleness_versions: int) -> int:
    """A token of that version or a later one is trainable; never so low that an environment's token would be."""
    return max(ENVIRONMENT + 1, handover_version - max_staleness_versions)


def admission_capacity(held_groups: int, prompts_per_step: int, max_staleness_versions: int) -> int:
    """How many groups may be admitted now; never negative."""
    return max(0, (max_staleness_versions + 1) * prompts_per_step - held_groups)


def deadline(oldest_token_version: int, max_staleness_versions: int) -> int:
    """The last version at which a group with that oldest token may be handed over whole."""
    return oldest_token_version + max_staleness_versions


def may_hand_over(version: int, due: Mapping[int, int], prompts_per_step: int) -> bool:
    """Whether the groups that stay behind (deadline -> how many) can all still be handed over in time."""
    total = 0
    for d in sorted(due):
        total += due[d]
        if total > prompts_per_step * max(0, d - version):
            return False
    return True


def coarse(lengths: Mapping[int, int]) -> dict[int, int]:
    """The same counts by lengths of five significant bits (a fifteenth of a length at most is cut off): few enough to
    be sent about."""
    counts: dict[int, int] = defaultdict(int)
    for length, count in lengths.items():
        cut = max(0, length.bit_length() - 5)
        counts[length >> cut << cut] += count
    return dict(counts)


def drops_by_length_decile(lengths: Mapping[int, int], dropped: Mapping[int, int]) -> list[int]:
    """Dropped rollouts per decile of the answer lengths of all closed ones: 10 counts, the shortest first.

    `lengths` and `dropped` map answer tokens to rollouts; `dropped` is part of `lengths`. Rollouts of one length that
    lie across a boundary all count in the decile where the middle one of them lies.
    """
    deciles = [0] * 10
    total, below = sum(lengths.values()), 0
    for length in sorted(lengths):
        middle = below + lengths[length] / 2
        deciles[min(9, int(10 * middle / total))] += dropped.get(length, 0)
        below += lengths[length]
    return deciles


class Ageing(NamedTuple):
    """Of the sampled tokens of a batch. Sums are in versions x tokens."""

    tokens_by_staleness: dict[int, int]
    in_flight: int
    """From sampling to the end of the rollout."""
    in_queue: int
    """From there to hand-over."""


def ageing(handover_version: int, answers: Iterable[tuple[int, Sequence[tuple[int, int]]]]) -> Ageing:
    """`answers`: for each rollout the version at which it was complete, and its spans (version, tokens)."""
    by_staleness: dict[int, int] = defaultdict(int)
    in_flight = in_queue = 0
    for completed_version, spans in answers:
        in_queue_each = handover_version - completed_version
        for token_version, tokens in spans:
            if not is_sampled(token_version):
                continue
            by_staleness[handover_version - token_version] += tokens
            in_flight += (completed_version - token_version) * tokens
            in_queue += in_queue_each * tokens
    return Ageing(dict(by_staleness), in_flight, in_queue)
