"""Which rank holds which elements of a parameter, and how the pieces of a bucket come together on one of them. Pure.

FSDP2 cuts a parameter along its first dimension: each shard has consecutive rows, so consecutive elements, the last shards
fewer or none. A piece of a bucket is made of consecutive elements too, so what each shard has of it is one range, and the
ranges follow one another in the order of the shards.

Invariants: every element is in exactly one part; every rank computes the same rounds. Called by `sending` and `collecting`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

Range = tuple[int, int]
"""(first element, elements), row-major."""

STEP: Final = 8
"""Bytes: what one part takes of a packed round is a multiple of it, so that a part of any dtype begins where it may."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one shard has of one piece."""

    piece: int
    """Which of the bucket's."""
    at: int
    """Its first element, counted from the piece's."""
    owner: int
    """The shard."""
    start: int
    """Its first element, counted from the owner's."""
    count: int
    """Elements."""
    item: int
    """Bytes of one on the wire."""

    @property
    def size(self) -> int:
        return self.count * self.item

    @property
    def room(self) -> int:
        """Bytes that it takes of a packed round."""
        return -(-self.size // STEP) * STEP


@dataclass(frozen=True, slots=True)
class Round:
    """What one collective brings to one rank."""

    parts: tuple[Part, ...]
    in_place: bool
    """The parts are those of consecutive elements of one piece, and arrive where they belong. Else they are packed: by owner, then
    as they are listed."""

    def room(self, owner: int) -> int:
        """Bytes that come from `owner`."""
        return sum(part.size if self.in_place else part.room for part in self.parts if part.owner == owner)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One piece, as the rounds have to know it."""

    piece: int
    """Which of the bucket's."""
    start: int
    """First element of the tensor, row-major."""
    count: int
    item: int
    """Bytes of an element on the wire."""
    held: tuple[Range, ...]
    """What each shard has of the tensor."""


def held(shape: Sequence[int], shards: int) -> tuple[Range, ...]:
    """What each shard has of a parameter of `shape`."""
    rows = shape[0] if shape else 1
    row = math.prod(shape[1:])
    most = -(-rows // shards)
    firsts = [min(shard * most, rows) for shard in range(shards + 1)]
    return tuple((firsts[shard] * row, (firsts[shard + 1] - firsts[shard]) * row) for shard in range(shards))


def divided(whole: Range, parts: int) -> tuple[Range, ...]:
    """`whole` in `parts` ranges that differ by one element at most."""
    start, count = whole
    firsts = [start + count * part // parts for part in range(parts + 1)]
    return tuple((firsts[part], firsts[part + 1] - firsts[part]) for part in range(parts))


def rounds(wanted: Sequence[Wanted], large_bytes: int, most_bytes: int) -> Iterator[Round]:
    """The collectives that bring `wanted` to one rank.

    A piece of at least `large_bytes` comes by itself, in place, in as many rounds as keep each to `most_bytes`; smaller ones
    are packed together up to `most_bytes` (at least `large_bytes`).
    """
    packed: list[Part] = []
    room = 0
    for each in wanted:
        if each.count * each.item >= large_bytes:
            most = max(most_bytes // each.item, 1)
            for at in range(0, each.count, most):
                yield Round(tuple(_parts(each, at, min(most, each.count - at))), in_place=True)
            continue
        parts = list(_parts(each, 0, each.count))
        more = sum(part.room for part in parts)
        if packed and room + more > most_bytes:
            yield Round(tuple(packed), in_place=False)
            packed, room = [], 0
        packed += parts
        room += more
    if packed:
        yield Round(tuple(packed), in_place=False)


def _parts(wanted: Wanted, at: int, count: int) -> Iterator[Part]:
    """Of the elements [at, at + count) of one piece, in the order of the shards, which is that of the elements."""
    low, high = wanted.start + at, wanted.start + at + count
    for owner, (first, number) in enumerate(wanted.held):
        start, end = max(low, first), min(high, first + number)
        if start < end:
            yield Part(wanted.piece, start - wanted.start, owner, start - first, end - start, wanted.item)
