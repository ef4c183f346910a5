"""What the learner sends and how it comes together: the plan, and one bucket after the other.

    senders = "one":  every shard --its part of the bucket, cast--> rank 0 --> the engines
    senders = "all":  every rank --its own rows--> the engines

Invariants: the plan is the same on every rank; the bytes are those of `full_tensor().to(dtype)` of each parameter, bit for bit,
whoever sends; no tensor is made whole but those that are computed from several (adapters merged in, a base in 4 bits).
With replicas of the sharded model the first one sends, or with "all" each rank its part of the rows that its replicas share.
Called by `step`. Gathering is a collective of the ranks of a replica, but for own rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from asyncrl.learner.collecting import Collector
from asyncrl.learner.outgoing import Outgoing
from asyncrl.learner.outgoing_float8 import in_float8
from asyncrl.learner.send_order import arranged
from asyncrl.learner.shares import Range, divided, held
from asyncrl.weight_sync.config import Senders
from asyncrl.weight_sync.plan import Adapter, Bucket, Piece, Plan, TensorSpec, Tied, make_plan

REST_OF_FLOAT8 = "bfloat16"
"""What is not quantised travels as engines compute with it."""


class Sending:
    """One rank's part in it."""

    def __init__(
        self,
        outgoing: Mapping[str, Outgoing],
        mesh: DeviceMesh,
        device: torch.device,
        *,
        tied: list[Tied],
        adapter: Adapter | None,
        linear: Collection[str] = (),
    ) -> None:
        """`outgoing`: every tensor by its checkpoint name, in model order. `mesh`: as `init_distributed` makes it. `device`: where
        the masters are. `linear`: what travels as float8 where the plan says so."""
        self._whole, self._linear = outgoing, linear
        self._outgoing, self._device, self._tied, self._adapter = outgoing, device, tied, adapter
        shard_dimension = mesh.ndim - 1
        self._group = mesh.get_group(shard_dimension)
        self._shards, self._shard = mesh.size(shard_dimension), mesh.get_local_rank(shard_dimension)
        self._replicas = mesh.size() // self._shards
        self._rank = mesh.get_rank()
        self._collector: Collector | None = None
        """For the plan that was gathered last."""
        self._made: tuple[str, torch.Tensor | None] = ("", None)
        """The tensor that was computed last, while its pieces are sent; on rank 0."""

    def plan(self, bucket_bytes: int, wire_dtype: str | None, senders: Senders) -> Plan:
        """See `Learner.plan`."""
        if wire_dtype == "float8":
            self._outgoing, wire_dtype = in_float8(self._whole, self._linear), REST_OF_FLOAT8
        else:
            self._outgoing = self._whole
        names, fused = (list(self._outgoing), []) if self._adapter else arranged(list(self._outgoing))
        masters = {name: _name(each.cast_from or each.dtype) for name, each in self._outgoing.items()}
        return make_plan(
            [(name, self._travels_as(name, wire_dtype), self._outgoing[name].shape) for name in names],
            bucket_bytes,
            self._adapter,
            shares=self._shares() if senders == "all" else None,
            cast_from=masters,
            tied=self._tied,
            fused=fused,
        )

    def gather(self, plan: Plan, bucket: Bucket) -> list[torch.Tensor]:
        """See `Learner.gather`."""
        specs = [plan.tensors[piece.tensor] for piece in bucket.pieces]
        if plan.senders > 1 or self._rank >= self._shards:
            own = bucket.sender == self._rank
            return [self._own(spec, piece) for spec, piece in zip(specs, bucket.pieces, strict=True) if own]
        plain = [at for at, spec in enumerate(specs) if self._outgoing[spec.name].parameter is not None]
        if self._shards == 1:
            found = {at: self._own(specs[at], bucket.pieces[at]) for at in plain}
        else:
            found = self._collector_of(plan).collect(bucket, plain)
        for at in sorted(set(range(len(specs))) - set(plain)):
            if (made := self._part_of_made(specs[at], bucket.pieces[at])) is not None:
                found[at] = made
        return [found[at] for at in sorted(found)]

    def _travels_as(self, name: str, wire_dtype: str | None) -> str:
        each = self._outgoing[name]
        return _name(each.dtype) if wire_dtype is None or each.cast_from else wire_dtype

    def forget(self) -> None:
        """Weights have changed: what was computed of them is of no use."""
        self._made = ("", None)

    def _shares(self) -> dict[str, list[Range]]:
        """What each rank sends of each tensor. Raises ValueError where that is not the ranks' own rows."""
        computed = [name for name, each in self._outgoing.items() if each.parameter is None]
        if computed:
            raise ValueError(
                f'senders = "all": {len(computed)} of {len(self._outgoing)} tensors are computed from several parameters, such as '
                f"{computed[0]} (adapters merged in, or a base in 4 bits), so no rank has rows of them to send: set "
                'weight_sync.senders = "one", or learner.lora.sync = "adapter"'
            )
        return {name: self._shares_of(each.shape) for name, each in self._outgoing.items()}

    def _shares_of(self, shape: tuple[int, ...]) -> list[Range]:
        """By rank: replica after replica."""
        parts = [divided(rows, self._replicas) for rows in held(shape, self._shards)]
        return [rows[replica] for replica in range(self._replicas) for rows in parts]

    def _own(self, spec: TensorSpec, piece: Piece) -> torch.Tensor:
        """A piece of this rank's own rows, in the master's memory."""
        first, _ = held(spec.shape, self._shards)[self._shard]
        return self._rows(spec.name)[piece.start - first : piece.start - first + piece.count]

    def _rows(self, name: str) -> torch.Tensor:
        parameter = self._outgoing[name].parameter
        assert parameter is not None
        data = parameter.detach()
        return (data.to_local() if isinstance(data, DTensor) else data).reshape(-1)

    def _part_of_made(self, spec: TensorSpec, piece: Piece) -> torch.Tensor | None:
        """Of a tensor that is computed whole, once for all of its pieces. A collective; None but on rank 0."""
        name, whole = self._made
        if name != spec.name or piece.start == 0:
            self._made = ("", None)  # free it before the next one is made
            made = self._outgoing[spec.name].whole(getattr(torch, spec.dtype)).reshape(-1)
            whole = made if self._rank == 0 else None
            self._made = (spec.name, whole)
        if piece.ends:
            self._made = ("", None)
        return None if whole is None else whole[piece.start : piece.start + piece.count]

    def _collector_of(self, plan: Plan) -> Collector:
        if self._collector is None or self._collector.plan is not plan:
            self._collector = Collector(plan, self._group, self._rows, self._device)
        return self._collector


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
