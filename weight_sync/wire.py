"""What publisher and receivers say to each other (msgspec structs, MessagePack on the wire, never pickle).

A sync may be tried again under the same version, so every message of a transaction carries its `attempt`, which never
repeats at one publisher: a late answer cannot be taken for an answer to another attempt. The sender of a message is
the connection's routing id, which is the engine's id; it is not in the message.
"""

from __future__ import annotations

from typing import Final

import msgspec

from asyncrl.weight_sync.plan import Plan


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """A version is ready to be taken: where its bytes are and what they must sum to."""

    version: int
    transport: str
    """`shm`: `location` is a file under /dev/shm with the bytes of `plan`, complete, not written again until every
    receiver has applied or discarded this version."""
    location: str
    plan: Plan
    checksums: tuple[int, ...]
    """xxh3_64 of each bucket's bytes."""


class Propose(msgspec.Struct, frozen=True, kw_only=True, tag="propose"):
    """To an engine: stage this. Answered by `Staged` or `Failed`."""

    attempt: int
    offer: Offer
    timeout_s: float
    """Time left to stage it; afterwards nobody waits for the answer."""


class Apply(msgspec.Struct, frozen=True, kw_only=True, tag="apply"):
    """To an engine: make the staged version live. Answered by `Applied` or `Failed`."""

    attempt: int
    probe: tuple[int, ...]
    """Tokens to answer with logprobs under the new weights; empty: none."""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """To an engine: forget the staged version. Not answered."""

    attempt: int
    reason: str


class Dismiss(msgspec.Struct, frozen=True, kw_only=True, tag="dismiss"):
    """To an engine that took part in `attempt`: you are out of service. Nothing more comes over this connection, and what
    you generate is of older versions than the others'. Not answered."""

    attempt: int
    reason: str


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """To an engine: nothing to do. That it cannot be sent is how the publisher learns that an engine is gone."""


class Join(msgspec.Struct, frozen=True, kw_only=True, tag="join"):
    """To the publisher, at every (re)connection: I take versions from now on."""

    version: int
    """The one I run, -1 for none."""


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag="leave"):
    """To the publisher: I take no more."""

    reason: str


class Staged(msgspec.Struct, frozen=True, kw_only=True, tag="staged"):
    """To the publisher: the bytes are here and their checksums are right."""

    attempt: int
    stage_s: float


class Applied(msgspec.Struct, frozen=True, kw_only=True, tag="applied"):
    """To the publisher: the version is live."""

    attempt: int
    apply_s: float
    stall_s: float
    """Time in which no decode step could run."""
    probe: tuple[float, ...]
    """Logprob of each probe token after the first."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """To the publisher: it did not work."""

    attempt: int
    error: str
    """The traceback."""


ToEngine = Propose | Apply | Abort | Dismiss | Ping
ToPublisher = Join | Leave | Staged | Applied | Failed

encode: Final = msgspec.msgpack.Encoder().encode
decode_for_engine: Final = msgspec.msgpack.Decoder(ToEngine).decode
decode_for_publisher: Final = msgspec.msgpack.Decoder(ToPublisher).decode
"""Both decoders raise `msgspec.DecodeError` (or its subclass `ValidationError`) for anything else."""
