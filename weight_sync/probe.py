"""Probe verification: the same tokens through learner and engine must give the same logprobs. Pure.

Checksums show that the bytes arrived; the probe shows that the engine computes with them (layouts packed again, tied
weights, the right names). Called by the receiver, which judges its own engine before a token of the version leaves it, and by
the publisher, which says how far apart they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

PROOFS: Final = 2
"""The first version that an engine passes shows that loading works, the second one that replacing does."""


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """A question whose answer the learner knows."""

    tokens: tuple[int, ...]
    """At least 2."""
    logprobs: tuple[float, ...]
    """The learner's logprob of each token after the first, at temperature 1: [len(tokens) - 1]."""
    tolerance: float
    """Largest |difference| that passes."""
    every: bool = False
    """Asked of every engine. False: of those that have not passed `PROOFS` since they joined."""

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 or len(self.logprobs) != len(self.tokens) - 1:
            raise ValueError(
                f"probe: expected at least 2 tokens and one logprob for each but the first, got {len(self.tokens)} "
                f"tokens and {len(self.logprobs)} logprobs"
            )


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The largest one between two lists of logprobs."""

    position: int
    expected: float
    got: float
    size: float
    """|expected - got|; infinite where the engine gave no number, or no answer at this position."""


def largest_difference(probe: Probe, answer: Sequence[float]) -> Difference:
    """Compare an engine's answer with the learner's logprobs, position by position. NaN never passes."""
    worst = Difference(position=0, expected=probe.logprobs[0], got=probe.logprobs[0], size=0.0)
    for position, expected in enumerate(probe.logprobs):
        got = float(answer[position]) if position < len(answer) else float("nan")
        size = abs(expected - got)
        if not size <= worst.size:
            worst = Difference(
                position=position, expected=expected, got=got, size=size if size == size else float("inf")
            )
        if worst.size == float("inf"):
            break
    return worst
