"""What is said to a run's control socket and what it answers: msgspec structs in MessagePack, never pickle.

A request is the frames [request id (8 bytes), header], each answer [request id, header]. A request is answered by
`Taken` at once and by what it came to later; one that is wrong by `Problem` alone. It may be sent again: while it is under way
that changes nothing, and afterwards it is carried out again, which by `control` changes nothing either.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from asyncrl.runtime.control import RunStatus

MOST_REQUEST_BYTES = 2**14
MOST_ANSWER_BYTES = 2**26
ID_BYTES = 8

PoolName = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Slots = Annotated[int, msgspec.Meta(ge=1, le=65536)] | Literal["auto"]
Engines = Annotated[int, msgspec.Meta(ge=0, le=65536)]
ProblemKind = Literal["refused", "wrong", "malformed", "busy", "slow", "failed", "ending"]
"""slow: it had no answer within `COMMAND_S`. failed: the run broke on it. ending: the run ended before it was done."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"):
    pass


class AskStatus(_Message, frozen=True, tag="status"):
    """-> StatusIs"""


class Scale(_Message, frozen=True, kw_only=True, tag="scale"):
    """-> Done"""

    pool: PoolName | None = None
    concurrency: Slots | None = None
    engines: Engines | None = None


class Pause(_Message, frozen=True, tag="pause"):
    """-> Done"""


class GoOn(_Message, frozen=True, tag="continue"):
    """-> Done"""


class Drain(_Message, frozen=True, kw_only=True, tag="drain"):
    """-> Done"""

    pool: PoolName | None = None


class Stop(_Message, frozen=True, tag="stop"):
    """-> Done"""


Request = AskStatus | Scale | Pause | GoOn | Drain | Stop


class Taken(_Message, frozen=True, tag="taken"):
    """It was read and is under way; what it comes to follows within `COMMAND_S`."""


class StatusIs(_Message, frozen=True, kw_only=True, tag="status is"):
    run: RunStatus


class Done(_Message, frozen=True, kw_only=True, tag="done"):
    text: str
    """What happens now, in one sentence."""


class Problem(_Message, frozen=True, kw_only=True, tag="problem"):
    """Nothing was changed, or with `slow`, `failed` and `ending` perhaps a part."""

    kind: ProblemKind
    message: str


Answer = Taken | StatusIs | Done | Problem

encode = msgspec.msgpack.Encoder().encode
_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answer: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_TOO_DEEP = "it is nested deeper than any message is"


def decode_request(header: bytes) -> Request:
    """Raises ValueError, whatever the bytes are."""
    try:
        return _request.decode(header)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def decode_answer(header: bytes) -> Answer:
    """Raises ValueError, whatever the bytes are."""
    try:
        return _answer.decode(header)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
