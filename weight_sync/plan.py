"""The bucket plan: which bytes travel together, in which order, and from which learner rank. Pure, the same on every rank.

A version is one space of bytes in which every tensor lies whole. A plan is derived once from the names, dtypes and shapes of
the parameters as they will be sent (checkpoint names, wire dtype), so sender and receiver never negotiate. Where every rank
sends (`senders` above 1), each has the pieces of the tensors that it holds anyway, and nothing is gathered.

Called by the learner (gather order) and carried by every offer.

Invariants of `make_plan`: the order of the tensors is the order given; every tensor starts at a multiple of `ALIGNMENT`; no
two overlap; each element is in exactly one piece of one bucket; no bucket is larger than `bucket_bytes`; the buckets of a
sender follow one another, in the order of the version's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

ALIGNMENT: Final = 64
"""Bytes. A cache line, and enough for every dtype and for vectorised copies."""

DTYPE_BYTES: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
"""Bytes per element of the dtypes that may travel."""

Shares = Mapping[str, Sequence[tuple[int, int]]]
"""Tensor -> (first element, elements) of each sender, in row-major order."""


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a version: contiguous, row-major, little-endian."""

    name: str
    dtype: str
    """A torch dtype's name without the `torch.`: `float32`, `bfloat16`, ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the version's bytes."""
    size: int
    """Bytes."""
    cast_from: str = ""
    """The learner's dtype where it is another one; the cast is done before sending."""


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive elements of one tensor."""

    tensor: int
    """Which one of the plan's."""
    start: int
    """First element, row-major."""
    count: int
    """Elements."""
    offset: int
    """First byte, counted from the start of the version's bytes."""
    size: int
    """Bytes."""
    ends: bool
    """Whether its last element is the tensor's."""


class Run(msgspec.Struct, frozen=True):
    """The bytes [offset, offset + size) of a version."""

    offset: int
    size: int


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """What is gathered, sent and checked at once."""

    index: int
    sender: int
    """The learner rank that sends it."""
    size: int
    """Bytes that travel: those of the runs."""
    pieces: tuple[Piece, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Where its bytes lie in the version, in the order in which they travel and are summed. The gap that alignment leaves
        between two neighbours belongs to it: its bytes are 0."""
        found: list[Run] = []
        for index, piece in enumerate(self.pieces):
            gap = _gap(self.pieces[index - 1], piece) if index else None
            if gap is None:
                found.append(Run(piece.offset, piece.size))
            else:
                found[-1] = Run(found[-1].offset, found[-1].size + gap + piece.size)
        return tuple(found)

    @property
    def places(self) -> tuple[int, ...]:
        """Where each piece begins in the bytes that travel."""
        found: list[int] = []
        end = 0
        for index, piece in enumerate(self.pieces):
            end += (_gap(self.pieces[index - 1], piece) or 0) if index else 0
            found.append(end)
            end += piece.size
        return tuple(found)


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """Says that the tensors are a LoRA adapter's, in the names of peft's adapter folders, to be put on a base that engines
    have: W x + alpha / rank B (A x)."""

    rank: int
    alpha: float


class Tied(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter that is not sent, as it is another one."""

    name: str
    of: str


class Fused(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters that engines keep as one, so they are sent one after the other."""

    name: str
    parts: tuple[str, ...]


FUSED_LAYERS: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers that vLLM makes one of, by the name that it gives it; the models that it has are alike in this."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Every tensor and bucket of one model, in sending order."""

    tensors: tuple[TensorSpec, ...]
    buckets: tuple[Bucket, ...]
    total_bytes: int
    senders: int = 1
    adapter: Adapter | None = None
    """None: the tensors are the whole model, in checkpoint names."""
    tied: tuple[Tied, ...] = ()
    fused: tuple[Fused, ...] = ()

    def of(self, sender: int) -> tuple[Bucket, ...]:
        """The buckets of one learner rank, in the order in which it sends them."""
        return tuple(bucket for bucket in self.buckets if bucket.sender == sender)


def make_plan(
    specs: Sequence[tuple[str, str, Sequence[int]]],
    bucket_bytes: int,
    adapter: Adapter | None = None,
    *,
    shares: Shares | None = None,
    cast_from: Mapping[str, str] | None = None,
    tied: Sequence[Tied] = (),
    fused: Sequence[Fused] = (),
) -> Plan:
    """Lay the tensors `(name, dtype name, shape)` out in the order given and cut them into buckets.

    A piece begins a new bucket when it would take the present one past `bucket_bytes`; a tensor that is larger is cut.
    `shares`: what each sender has of each tensor; None: one sender has all. `cast_from`: see `TensorSpec`.

    Raises `ValueError` for no tensors, a name given twice, an unknown dtype, a negative dimension, `bucket_bytes` below
    `ALIGNMENT`, shares that are not each element once, and for tied or fused names that the tensors do not bear out.
    """
    if bucket_bytes < ALIGNMENT:
        raise ValueError(f"bucket_bytes: expected at least {ALIGNMENT}, got {bucket_bytes}")
    if not specs:
        raise ValueError("a plan of no tensors: expected at least one parameter to send, got none")
    tensors = tuple(_laid_out(specs, cast_from or {}))
    shares = shares or {spec.name: ((0, _elements(spec)),) for spec in tensors}
    _check_shares(tensors, shares)
    _check_names(tensors, tied, fused)
    senders = len(next(iter(shares.values())))
    buckets: list[Bucket] = []
    for sender in range(senders):
        for bucket in _filled(_pieces(tensors, shares, sender, bucket_bytes), bucket_bytes):
            buckets.append(msgspec.structs.replace(bucket, index=len(buckets), sender=sender))
    return Plan(
        tensors=tensors,
        buckets=tuple(buckets),
        total_bytes=max(spec.offset + spec.size for spec in tensors),
        senders=senders,
        adapter=adapter,
        tied=tuple(tied),
        fused=tuple(fused),
    )


def _laid_out(
    specs: Sequence[tuple[str, str, Sequence[int]]], cast_from: Mapping[str, str]
) -> Iterator[TensorSpec]:
    offset = 0
    seen: set[str] = set()
    for name, dtype, shape in specs:
        if name in seen:
            raise ValueError(f"tensor {name!r} is given twice: tied parameters are sent once, under one name")
        seen.add(name)
        size = _tensor_bytes(name, dtype, shape)
        source = cast_from.get(name, dtype)
        yield TensorSpec(
            name=name,
            dtype=dtype,
            shape=tuple(shape),
            offset=offset,
            size=size,
            cast_from=source if source != dtype else "",
        )
        offset = -(-(offset + size) // ALIGNMENT) * ALIGNMENT


def _tensor_bytes(name: str, dtype: str, shape: Sequence[int]) -> int:
    if dtype not in DTYPE_BYTES:
        raise ValueError(
            f"tensor {name!r}: unknown dtype {dtype!r}, expected one of {', '.join(DTYPE_BYTES)}"
        )
    if any(length < 0 for length in shape):
        raise ValueError(f"tensor {name!r}: expected dimensions of at least 0, got shape {tuple(shape)}")
    return math.prod(shape) * DTYPE_BYTES[dtype]


def _elements(spec: TensorSpec) -> int:
    return spec.size // DTYPE_BYTES[spec.dtype]


def _check_shares(tensors: Sequence[TensorSpec], shares: Shares) -> None:
    counts = {len(each) for each in shares.values()}
    if {spec.name for spec in tensors} != set(shares) or len(counts) != 1:
        raise ValueError(
            f"shares: expected one for each sender of each of {len(tensors)} tensors, got {shares}"
        )
    for spec in tensors:
        end = 0
        for start, count in sorted(each for each in shares[spec.name] if each[1]):
            if start != end or count < 0:
                raise ValueError(f"tensor {spec.name!r}: expected each element once, got {shares[spec.name]}")
            end += count
        if end != _elements(spec):
            raise ValueError(
                f"tensor {spec.name!r}: expected shares of {_elements(spec)} elements, got {shares[spec.name]}"
            )


def _check_names(tensors: Sequence[TensorSpec], tied: Sequence[Tied], fused: Sequence[Fused]) -> None:
    place = {spec.name: index for index, spec in enumerate(tensors)}
    for each in tied:
        if each.name in place or each.of not in place:
            raise ValueError(
                f"{each.name!r} is tied to {each.of!r}: expected the second alone among the tensors sent"
            )
    for group in fused:
        places = [place.get(part, -1) for part in group.parts]
        if not places or places[0] < 0 or places != list(range(places[0], places[0] + len(places))):
            raise ValueError(
                f"{group.name!r} is fused of {group.parts}: expected these one after the other among the tensors, "
                f"got places {places}"
            )


def _pieces(tensors: Sequence[TensorSpec], shares: Shares, sender: int, bucket_bytes: int) -> Iterator[Piece]:
    for index, spec in enumerate(tensors):
        item = DTYPE_BYTES[spec.dtype]
        # A multiple of the alignment: pieces of one tensor then start where copies are fast, but for a share's first.
        most = bucket_bytes // ALIGNMENT * ALIGNMENT // item
        start, left = shares[spec.name][sender]
        if _elements(spec) == 0 and sender == 0:
            yield Piece(tensor=index, start=0, count=0, offset=spec.offset, size=0, ends=True)
        # Ends: each round takes at least one element of finitely many.
        while left:
            count = min(left, most)
            yield Piece(
                tensor=index,
                start=start,
                count=count,
                offset=spec.offset + start * item,
                size=count * item,
                ends=start + count == _elements(spec),
            )
            start, left = start + count, left - count


def _filled(pieces: Iterable[Piece], bucket_bytes: int) -> Iterator[Bucket]:
    pending: list[Piece] = []
    size = 0
    for piece in pieces:
        gap = (_gap(pending[-1], piece) or 0) if pending else 0
        if pending and size + gap + piece.size > bucket_bytes:
            yield Bucket(index=0, sender=0, size=size, pieces=tuple(pending))
            pending, size, gap = [], 0, 0
        pending.append(piece)
        size += gap + piece.size
    if pending:
        yield Bucket(index=0, sender=0, size=size, pieces=tuple(pending))


def _gap(before: Piece, piece: Piece) -> int | None:
    """Bytes between two pieces that are neighbours in the version; None for two that are not: what lies between them may be
    another sender's."""
    gap = piece.offset - (before.offset + before.size)
    adjoining = before.ends and piece.start == 0 and piece.tensor == before.tensor + 1
    return gap if gap == 0 or adjoining else None
