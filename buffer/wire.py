"""What is said to a shard of the buffer and what it answers: msgspec structs in MessagePack, never pickle.

A request is the frames [request id, header, body?], a reply [request id, header, body?]. A body is raw columns,
whose lengths are in the header: no Arrow message for a few rows at a time, which costs more than all else. It lies in the last frame or,
between processes of one host, in the asker's arena or in the log's files: then the header says where, and the frame is left out.

Requests that can wait carry `timeout_s`: the service answers as soon as it can and at the latest then, with an empty result.
Every request may be sent again. What it asks for is named by position, lease, start, batch or step and is done once; what
an answer gave away is named by `after`, and is given again when it did not arrive. This holds across a crash of the service.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from asyncrl.buffer.arena import ArenaLocation, Region
from asyncrl.buffer.handover import Layout, Places
from asyncrl.buffer.leasing import UNKNOWN_ROOM
from asyncrl.buffer.records import Counts, Recovery, Selection
from asyncrl.buffer.schema import ENVIRONMENT

Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
_Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Int32 = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Origin = Annotated[int, msgspec.Meta(ge=ENVIRONMENT, le=2**31 - 1)]


class _Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"):
    pass


class Attach(_Request, frozen=True, kw_only=True, tag="attach"):
    """Bodies may lie in the asker's arena from now on. -> Attached"""

    location: ArenaLocation


class Capacity(_Request, frozen=True, kw_only=True, tag="capacity"):
    """How many prompts may be admitted? Waits until at least one may. -> Number"""

    timeout_s: Seconds


class Admit(_Request, frozen=True, kw_only=True, tag="admit"):
    """Body: the prompts' tokens, int32, one behind the other. Waits while a snapshot is made. -> Admitted"""

    positions: list[_Id]
    prompt_ids: list[str]
    payloads: list[str]
    """JSON: what the reward needs to know of the prompt, such as its answer."""
    lengths: list[_Int32]
    timeout_s: Seconds


class Lease(_Request, frozen=True, kw_only=True, tag="lease"):
    """Up to `limit` rollouts to work on; waits until there is one for this engine. -> Leases"""

    engine_id: str
    limit: Annotated[int, msgspec.Meta(ge=1, le=65536)]
    after: _Id
    """The last lease that this engine got from this shard; 0 before the first."""
    timeout_s: Seconds
    kv_free_tokens: Annotated[int, msgspec.Meta(ge=UNKNOWN_ROOM, le=2**63 - 1)] = UNKNOWN_ROOM
    """Tokens that fit into the engine's KV cache beside what it holds: partial rollouts that are longer go to others for
    as long as `leasing` says. -1: not known, any will do."""


class Append(_Request, frozen=True, kw_only=True, tag="append"):
    """Segments, one entry of each list. Body: all their tokens (int32), then all their logprobs (float32). -> Refused"""

    engine_id: str
    rollout_ids: list[_Id]
    lease_ids: list[_Id]
    starts: list[_Int32]
    """Index of the segment's first token within the rollout's answer."""
    versions: list[_Origin]
    """Of the weights that sampled the segment; `schema.ENVIRONMENT` where its tokens are the environment's."""
    lengths: list[_Int32]
    finish_reasons: list[str]
    """"" while the rollout goes on, "stop" or "length" on its last segment, which may be empty."""
    region: Region | None = None
    body_hash: int = 0
    """XXH3 (64 bits) of the body, where it lies in a region."""


class Scored(msgspec.Struct, frozen=True, array_like=True):
    rollout_id: _Id
    lease_id: _Id
    reward: float
    cost: float = 0.0
    """What Safe RLHF holds below a limit; 0 where no reward term gives one."""


class Score(_Request, frozen=True, kw_only=True, tag="score"):
    """-> Refused"""

    rollouts: list[Scored]


class Fail(_Request, frozen=True, kw_only=True, tag="fail"):
    """-> Refused"""

    rollout_id: _Id
    lease_id: _Id
    reason: str


class Release(_Request, frozen=True, kw_only=True, tag="release"):
    """The engine hands back what it held; prefixes stay. -> Refused"""

    leases: list[tuple[_Id, _Id]]
    """(rollout_id, lease_id)"""


class Heartbeat(_Request, frozen=True, kw_only=True, tag="heartbeat"):
    """-> Number (0)"""

    engine_id: str


class EngineLost(_Request, frozen=True, kw_only=True, tag="engine_lost"):
    """The engine is dead: what it held is queued again at once. -> Number (rollouts)"""

    engine_id: str
    for_good: bool = False
    """No lease goes out under this id any more, should its process live on somewhere."""


class ReadBatch(_Request, frozen=True, kw_only=True, tag="read_batch"):
    """The next batch; waits until there is a valid one. -> Batch, body as `handover` says (or Number at the deadline)"""

    after: _Id
    """The last batch that the reader got from this shard; 0 before the first."""
    timeout_s: Seconds
    from_files: bool
    """The reader takes tokens and logprobs from the log's files itself; else they come in the last frame."""


class Commit(_Request, frozen=True, kw_only=True, tag="commit"):
    """The batch is trained and `version` is published. -> Balance"""

    batch_id: _Id
    version: _Int32


class Publish(_Request, frozen=True, kw_only=True, tag="publish"):
    """The present version is live on the engines, at the start or after a restore. -> Number"""

    version: _Int32


class Freeze(_Request, frozen=True, kw_only=True, tag="freeze"):
    """Admit no prompt for so long, or until the next snapshot: all shards' snapshots show one frontier. -> Frozen"""

    seconds: Seconds


class Snapshot(_Request, frozen=True, kw_only=True, tag="snapshot"):
    """Ties the state to a learner checkpoint. -> Snapshotted"""

    step: _Id
    keep: list[_Id]
    """Steps whose snapshots are kept beside it."""


class Restore(_Request, frozen=True, kw_only=True, tag="restore"):
    """Back to the state at `step`. Leases are void; nothing goes out until `Publish`. -> Snapshotted"""

    step: _Id


class Status(_Request, frozen=True, kw_only=True, tag="status"):
    """-> Report"""


class Stop(_Request, frozen=True, kw_only=True, tag="stop"):
    """Flush, answer, end the process' loop. -> Balance"""


Request = (
    Attach
    | Capacity
    | Admit
    | Lease
    | Append
    | Score
    | Fail
    | Release
    | Heartbeat
    | EngineLost
    | ReadBatch
    | Commit
    | Publish
    | Freeze
    | Snapshot
    | Restore
    | Status
    | Stop
)
Waits = Capacity | Admit | Lease | ReadBatch


class _Reply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="reply"):
    pass


class Attached(_Reply, frozen=True, kw_only=True, tag="attached"):
    refused: str
    """Why bodies must come in frames; empty when the arena is used."""


class Number(_Reply, frozen=True, kw_only=True, tag="number"):
    value: int


class Admitted(_Reply, frozen=True, kw_only=True, tag="admitted"):
    admitted: int
    passed_over: int
    """Quarantined, or admitted before."""


class Leased(msgspec.Struct, frozen=True, array_like=True):
    """What an engine gets to work on."""

    rollout_id: int
    lease_id: int
    group_id: int
    prompt_tokens: bytes
    """int32"""
    tokens: bytes
    """int32: what earlier leases sampled, the prefix to go on from."""
    finish_reason: str
    """Not "" when all tokens are there and only the score is missing."""
    payload: str
    spans: list[tuple[int, int]]
    """Of `tokens`: (version, tokens) of each run, `schema.ENVIRONMENT` where they are the environment's."""
    greedy: bool = False
    """It is the baseline of its group: to be sampled greedily, by whoever goes on with it."""


class Leases(_Reply, frozen=True, kw_only=True, tag="leases"):
    rollouts: list[Leased]


class Refused(_Reply, frozen=True, kw_only=True, tag="refused"):
    rollout_ids: list[int]
    """Their leases are lost; what was sent for them was not taken."""


class Batch(_Reply, frozen=True, kw_only=True, tag="batch"):
    selection: Selection
    layout: Layout
    places: Places | None
    """Where the body lies in the log's files; None where it is in the last frame."""


class Balance(_Reply, frozen=True, kw_only=True, tag="balance"):
    counts: Counts


class Frozen(_Reply, frozen=True, kw_only=True, tag="frozen"):
    frontier: int
    """As it stands; a snapshot that has another one was made after the freeze was lost (a restart) or over."""


class Snapshotted(_Reply, frozen=True, kw_only=True, tag="snapshotted"):
    step: int
    version: int
    frontier: int
    """Prompts drawn from the source by then."""


class Report(_Reply, frozen=True, kw_only=True, tag="report"):
    version: int
    serving: bool
    states: dict[str, int]
    counts: Counts
    held_groups: int
    capacity_groups: int
    spanning_trained: int
    most_versions: int
    waits_s: dict[str, float]
    """Seconds so far in which somebody waited, by cause."""
    frontier: int
    quarantined: int
    """Prompts."""
    lengths: dict[int, int]
    """Answer tokens (coarse, see `staleness.coarse`) -> closed rollouts."""
    dropped_lengths: dict[int, int]
    memory_bytes: int
    """Budget of `held_bytes`: at it leases go out for the next batch alone."""
    held_bytes: int
    """Tokens and logprobs of live rollouts, which lie in the log's files."""
    disk_full: str
    """What the log's disk said, while it has no room."""
    rotations: int
    """Files of the log that were begun since the start because the one before was full."""
    longest_rotation_s: float
    """Requests wait meanwhile."""
    recovery: Recovery | None
    """What was found in the log at the start, where there was one."""


class Problem(_Reply, frozen=True, kw_only=True, tag="problem"):
    """The request was refused; nothing was changed but what the message names."""

    kind: str
    message: str


Reply = (
    Attached
    | Number
    | Admitted
    | Leases
    | Refused
    | Batch
    | Balance
    | Frozen
    | Snapshotted
    | Report
    | Problem
)

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
