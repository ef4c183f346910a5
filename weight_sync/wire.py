"""What publisher and receivers say to each other (msgspec structs, MessagePack on the wire, never pickle).

A sync may be tried again under the same version, so every message of a transaction carries its `attempt`, which never
repeats at one publisher: a late answer cannot be taken for an answer to another attempt. The sender of a message is
the connection's routing id, which is the engine's id; it is not in the message.
"""

from __future__ import annotations

from typing import Final

import msgspec

from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.probe import Probe


class SharedFile(msgspec.Struct, frozen=True, kw_only=True, tag="shm"):
    """The bytes lie in a file of the engine's host: one under /dev/shm that the learner wrote, or the memory into which the
    engine's own process fetched them, named /proc/PID/fd/N. Complete, and not written again until this version was applied
    or discarded."""

    path: str


class Served(msgspec.Struct, frozen=True, kw_only=True, tag="tcp"):
    """The bytes are to be had from the learner's chunk server."""

    endpoint: str
    base: int = -1
    """The version against which it has deltas; -1 for none."""


class Group(msgspec.Struct, frozen=True, kw_only=True, tag="collective"):
    """The bytes come over a torch.distributed group for each sender, of which the sender is rank 0."""

    backend: str
    """`gloo` or `nccl`."""
    stores: tuple[str, ...]
    """host:port of each sender's TCPStore."""
    name: str
    """Of the groups: never used twice at one store."""
    rank: int
    """This engine's, in each of the groups; from 1."""
    size: int
    """Ranks of each group."""
    made: bool
    """False: the groups are to be made anew. True: those of this name are used again."""


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True, tag="ipc"):
    """The bytes lie in memory of the GPU that learner and engine share, complete, in an allocation of their own. The learner may
    write it again once it has given this engine up, so they are verified before and after they are loaded."""

    device: str
    """UUID of the GPU."""
    handle: bytes
    """CUDA IPC handle of the allocation (`cuda_memory`)."""
    allocation_bytes: int
    sums: tuple[int, ...]
    """Of each bucket's bytes, as a device can make it: `device_sum.bucket_sum`."""


Source = SharedFile | Served | Group | DeviceMemory


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """A version is ready to be taken: where its bytes are and what they must sum to."""

    version: int
    source: Source
    plan: Plan
    checksums: tuple[int, ...]
    """xxh3_64 of each bucket's bytes; empty where they come with the buckets (`Group`), or the source has sums of its own
    (`DeviceMemory`)."""


class Propose(msgspec.Struct, frozen=True, kw_only=True, tag="propose"):
    """To an engine: stage this. Answered by `Staged` or `Failed`."""

    attempt: int
    offer: Offer
    timeout_s: float
    """Time left to stage it; afterwards nobody waits for the answer."""


class Apply(msgspec.Struct, frozen=True, kw_only=True, tag="apply"):
    """To an engine: make the staged version live. Answered by `Applied` or `Failed`."""

    attempt: int
    probe: Probe | None = None
    """What to answer under the new weights before a token sampled from them may leave the engine."""


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
    host: str = ""
    """What names the memory that I can map: see `hosts.this_host`."""


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
    probe: tuple[float, ...] = ()
    """Logprob of each probe token after the first; empty where none was asked for."""
    digest: str = ""
    """Of the bytes that were verified and loaded (`checksum.version_digest`); empty where the device summed them."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """To the publisher: it did not work."""

    attempt: int
    error: str
    """The traceback."""
    probe: tuple[float, ...] = ()
    """The logprobs that did not pass; empty where it failed otherwise."""
    cut: bool = False
    """The group over which the bytes came broke; nothing is wrong with this engine."""


ToEngine = Propose | Apply | Abort | Dismiss | Ping
ToPublisher = Join | Leave | Staged | Applied | Failed

encode: Final = msgspec.msgpack.Encoder().encode
decode_for_engine: Final = msgspec.msgpack.Decoder(ToEngine).decode
decode_for_publisher: Final = msgspec.msgpack.Decoder(ToPublisher).decode
"""Both decoders raise `msgspec.DecodeError` (or its subclass `ValidationError`) for anything else."""
