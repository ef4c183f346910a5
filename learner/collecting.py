"""Brings the pieces of a bucket from all shards to the first one: exact bytes, in the wire dtype, to nobody else.

`all_to_all` with what every rank has for the first and nothing for the others: unlike `all_gather` and `gather` it knows ranks
that give unlike amounts, and pads nothing. (gloo, 2 ranks, 16 MB from each: 8 ms, against 92 and 35.) Casts are done before, so that
half the bytes travel where the wire is bfloat16.

Invariants
----------
- Memory: on the first shard two buffers of one bucket in turn and one of `PACKED_BYTES`, on the others one of that; on a GPU they
  are given back after the plan's last bucket, on the host they stay, as the first touch of memory costs several times a copy.
- What `collect` returns is overwritten by the second `collect` after it.
- Every rank of the group makes the same collectives, whatever it holds.
Made by `sending`. Collectives of the shards of one replica.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.distributed as dist

from asyncrl.learner.shares import Part, Round, Wanted, held, rounds
from asyncrl.weight_sync.plan import ALIGNMENT, DTYPE_BYTES, Bucket, Plan

LARGE_BYTES: Final = 4 * 2**20
"""From here on a piece comes in a collective of its own, without a copy: which costs less than copying 4 MiB."""
PACKED_BYTES: Final = 32 * 2**20
"""Most that one rank packs or casts at a time."""

Rows = Callable[[str], torch.Tensor]
"""A parameter's name to this rank's elements of it, flat, in its own dtype."""


class Collector:
    """One rank's part in it, for the buckets of one plan."""

    def __init__(self, plan: Plan, group: dist.ProcessGroup, rows: Rows, device: torch.device) -> None:
        """`device`: where the masters are."""
        self.plan, self._group, self._rows, self._device = plan, group, rows, device
        self._shard, self._shards = group.rank(), group.size()
        self._packed: torch.Tensor | None = None
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._turn = 0
        self._most = max((bucket.size + ALIGNMENT * len(bucket.pieces) for bucket in plan.buckets), default=0)

    def collect(self, bucket: Bucket, positions: Sequence[int]) -> dict[int, torch.Tensor]:
        """The pieces at `positions` of `bucket.pieces`, each flat in its wire dtype, on the first shard; nothing on the others.

        Their parameters are plain shards. A collective.
        """
        wanted = [self._wanted(bucket, position) for position in positions]
        places = self._places(wanted, bucket) if wanted and self._shard == 0 else {}
        for each in rounds(wanted, LARGE_BYTES, PACKED_BYTES):
            if each.in_place:
                self._bring(each, bucket, places)
            else:
                self._bring_packed(each, bucket, places)
        if bucket.index + 1 == len(self.plan.buckets):
            self._give_back()
        return places

    def _wanted(self, bucket: Bucket, position: int) -> Wanted:
        piece = bucket.pieces[position]
        spec = self.plan.tensors[piece.tensor]
        return Wanted(
            position, piece.start, piece.count, DTYPE_BYTES[spec.dtype], held(spec.shape, self._shards)
        )

    def _places(self, wanted: Sequence[Wanted], bucket: Bucket) -> dict[int, torch.Tensor]:
        """Where the pieces are put together, in the buffer whose turn it is."""
        buffer = self._buffers[self._turn]
        if buffer is None:
            buffer = self._buffers[self._turn] = torch.empty(
                self._most, dtype=torch.uint8, device=self._device
            )
        self._turn = 1 - self._turn
        places, first = {}, 0
        for each in wanted:
            size = each.count * each.item
            places[each.piece] = buffer[first : first + size].view(self._dtype(bucket, each.piece))
            first += -(-size // ALIGNMENT) * ALIGNMENT
        return places

    def _bring(self, each: Round, bucket: Bucket, places: dict[int, torch.Tensor]) -> None:
        """The parts of one piece, to their place."""
        mine = [part for part in each.parts if part.owner == self._shard]
        if self._shard:
            self._exchange(each, None, self._cast(bucket, mine[0]) if mine else None)
            return
        for part in mine:
            places[part.piece][part.at : part.at + part.count].copy_(self._values(bucket, part))
        theirs = [part for part in each.parts if part.owner]
        if not theirs:
            self._exchange(each, None, None)
            return
        end = theirs[-1].at + theirs[-1].count
        self._exchange(each, places[theirs[0].piece][theirs[0].at : end].view(torch.uint8), None)

    def _bring_packed(self, each: Round, bucket: Bucket, places: dict[int, torch.Tensor]) -> None:
        if self._shard:
            self._exchange(each, None, self._pack(each, bucket))
            return
        room = sum(each.room(owner) for owner in range(1, self._shards))
        staged = self._room(room)
        self._exchange(each, staged, None)
        first = 0
        for part in sorted(each.parts, key=lambda part: part.owner):  # stable: by owner, then as listed
            place = places[part.piece][part.at : part.at + part.count]
            if part.owner == 0:
                place.copy_(self._values(bucket, part))
                continue
            place.copy_(staged[first : first + part.size].view(place.dtype))
            first += part.room

    def _pack(self, each: Round, bucket: Bucket) -> torch.Tensor:
        packed, first = self._room(each.room(self._shard)), 0
        for part in (part for part in each.parts if part.owner == self._shard):
            place = packed[first : first + part.size].view(self._dtype(bucket, part.piece))
            place.copy_(self._values(bucket, part))
            first += part.room
        return packed

    def _exchange(self, each: Round, into: torch.Tensor | None, mine: torch.Tensor | None) -> None:
        """One `all_to_all`: this rank's bytes to the first shard, the others' bytes `into` there. Ends within the process group's
        timeout."""
        empty = torch.empty(0, dtype=torch.uint8, device=self._device)
        sent = [0] * self._shards
        got = [0] * self._shards
        if self._shard:
            sent[0] = each.room(self._shard)
        else:
            got[1:] = [each.room(owner) for owner in range(1, self._shards)]
        dist.all_to_all_single(
            empty if into is None else into, empty if mine is None else mine, got, sent, group=self._group
        )

    def _cast(self, bucket: Bucket, part: Part) -> torch.Tensor:
        """This rank's bytes of `part`, as they travel: a view where nothing is to be cast."""
        values, dtype = self._values(bucket, part), self._dtype(bucket, part.piece)
        if values.dtype == dtype:
            return values.view(torch.uint8)
        room = self._room(part.size)
        room.view(dtype).copy_(values)
        return room

    def _values(self, bucket: Bucket, part: Part) -> torch.Tensor:
        name = self.plan.tensors[bucket.pieces[part.piece].tensor].name
        return self._rows(name)[part.start : part.start + part.count]

    def _dtype(self, bucket: Bucket, position: int) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.plan.tensors[bucket.pieces[position].tensor].dtype)
        return found

    def _room(self, size: int) -> torch.Tensor:
        if self._packed is None:
            self._packed = torch.empty(PACKED_BYTES, dtype=torch.uint8, device=self._device)
        return self._packed[:size]

    def _give_back(self) -> None:
        if self._device.type != "cpu":
            self._packed, self._buffers = None, [None, None]
