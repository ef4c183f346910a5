"""What is said to the buffer and what it answers: msgspec structs in MessagePack, Arrow IPC bodies, never pickle.

A request is the frames [request id, header, body?], a reply [request id, header, body?]. `body` is one Arrow record
batch of the schema that the header's docstring names. Requests that can wait carry `timeout_s`: the service answers
as soon as it can and at the latest then, with an empty result.
"""

from __future__ import annotations

import msgspec
import pyarrow as pa

from asyncrl.buffer.records import Counts, Selection


class _Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"):
    pass


class Capacity(_Request, frozen=True, kw_only=True, tag="capacity"):
    """How many prompts may be admitted? Waits until at least one may. -> Number"""

    timeout_s: float


class Admit(_Request, frozen=True, kw_only=True, tag="admit"):
    """Body: PROMPTS. -> Number (admitted)"""


class Lease(_Request, frozen=True, kw_only=True, tag="lease"):
    """Up to `limit` rollouts to work on; waits until there is one. -> Rows, body LEASES"""

    engine_id: str
    limit: int
    timeout_s: float


class Append(_Request, frozen=True, kw_only=True, tag="append"):
    """Body: SEGMENTS. -> Refused (rollouts whose lease is lost: stop working on them)"""

    engine_id: str


class Scored(msgspec.Struct, frozen=True):
    rollout_id: int
    lease_id: int
    reward: float


class Score(_Request, frozen=True, kw_only=True, tag="score"):
    """-> Refused"""

    rollouts: list[Scored]


class Fail(_Request, frozen=True, kw_only=True, tag="fail"):
    """-> Refused"""

    rollout_id: int
    lease_id: int
    reason: str


class Release(_Request, frozen=True, kw_only=True, tag="release"):
    """The engine hands back what it held; prefixes stay. -> Refused"""

    leases: list[tuple[int, int]]
    """(rollout_id, lease_id)"""


class Heartbeat(_Request, frozen=True, kw_only=True, tag="heartbeat"):
    """-> Number (0)"""

    engine_id: str


class ReadBatch(_Request, frozen=True, kw_only=True, tag="read_batch"):
    """The next batch; waits until there is a valid one. -> Batch, body BATCH (or Rows(0) at the deadline)"""

    timeout_s: float


class Commit(_Request, frozen=True, kw_only=True, tag="commit"):
    """The batch is trained and `version` is published. -> Balance"""

    batch_id: int
    version: int


class Publish(_Request, frozen=True, kw_only=True, tag="publish"):
    """The first version is published and confirmed by the engines. -> Number"""

    version: int


class Status(_Request, frozen=True, kw_only=True, tag="status"):
    """-> Report"""


class Stop(_Request, frozen=True, kw_only=True, tag="stop"):
    """Flush, answer, end the process' loop. -> Balance"""


Request = (
    Capacity
    | Admit
    | Lease
    | Append
    | Score
    | Fail
    | Release
    | Heartbeat
    | ReadBatch
    | Commit
    | Publish
    | Status
    | Stop
)


class _Reply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="reply"):
    pass


class Number(_Reply, frozen=True, kw_only=True, tag="number"):
    value: int


class Rows(_Reply, frozen=True, kw_only=True, tag="rows"):
    rows: int


class Refused(_Reply, frozen=True, kw_only=True, tag="refused"):
    rollout_ids: list[int]
    """Their leases are lost; what was sent for them was not taken."""


class Batch(_Reply, frozen=True, kw_only=True, tag="batch"):
    selection: Selection


class Balance(_Reply, frozen=True, kw_only=True, tag="balance"):
    counts: Counts


class Report(_Reply, frozen=True, kw_only=True, tag="report"):
    version: int
    states: dict[str, int]
    counts: Counts
    held_groups: int
    capacity_groups: int
    spanning_trained: int
    most_versions: int
    waits_s: dict[str, float]
    """Seconds so far in which somebody waited, by cause."""


class Problem(_Reply, frozen=True, kw_only=True, tag="problem"):
    """The request was refused; nothing was changed."""

    kind: str
    message: str


Reply = Number | Rows | Refused | Batch | Balance | Report | Problem

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(Request).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def pack_rows(rows: pa.RecordBatch) -> pa.Buffer:
    """A record batch without its schema, which both sides know."""
    return rows.serialize()


def unpack_rows(body: memoryview | bytes, layout: pa.Schema) -> pa.RecordBatch:
    """Raises pa.ArrowInvalid where the bytes are no batch of this schema. Zero-copy: `body` must stay alive."""
    rows = pa.ipc.read_record_batch(pa.py_buffer(body), layout)
    rows.validate(full=True)
    return rows
