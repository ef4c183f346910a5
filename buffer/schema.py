"""The words of asyncrl and the Arrow shape of what the parts hand each other. Imported by every part; imports none.

Words
-----
prompt    what is asked; its tokens never change once admitted
rollout   one sampled answer to a prompt
segment   a run of tokens of one rollout, sampled by one engine at one version, or given by the environment
group     the rollouts of one prompt
baseline  a rollout of a group that is sampled greedily and not trained: its reward is what the others are measured by
version   count of published weight updates; version 0 is the model that the run started from
origin    who a token is from: the model (its version is the weights') or the environment (its version is `ENVIRONMENT`)
turn      what the model samples in one go, up to a stop token; the environment answers it or ends the rollout
lease     an engine's right to continue one rollout; every append names its lease, and a lost lease can append no more
slot      one concurrent rollout in an engine
engine    one inference engine, of whatever number of devices
pool      engines of one shape
bucket    bytes of weights sent at once
hand-over the moment a batch leaves the buffer for the learner; staleness is measured there

frontier  the walk through the prompts; a prompt's position in it never changes
shard     one process of the buffer; a group lives in the shard that its id names (id modulo shards)

Tokens are int32, logprobs float32, versions int32. A token's logprob is the behaviour policy's, as the engine sampled it;
that of an environment's token is 0: nobody sampled it.
"""

from __future__ import annotations

import enum
from typing import Final

import pyarrow as pa

ENVIRONMENT: Final = -1
"""Version of tokens that no model sampled. They are context: never trained, without an age."""


class State(enum.IntEnum):
    """Where a rollout is. TRAINED, DROPPED and FAILED are terminal; each rollout ends in exactly one of them."""

    QUEUED = 0
    LEASED = 1
    COMPLETE = 2
    """All tokens are there; the lease is kept until it is scored."""
    SCORED = 3
    BATCHED = 4
    TRAINED = 5
    DROPPED = 6
    FAILED = 7


def _schema(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


TOKENS: Final = pa.list_(pa.field("item", pa.int32(), nullable=False))
LOGPROBS: Final = pa.list_(pa.field("item", pa.float32(), nullable=False))
IDS: Final = pa.list_(pa.field("item", pa.int64(), nullable=False))
FLAGS: Final = pa.list_(pa.field("item", pa.bool_(), nullable=False))

BATCH: Final = _schema(
    ("rollout_id", pa.int64()),
    ("group_id", pa.int64()),
    ("prompt_tokens", TOKENS),
    ("tokens", TOKENS),
    ("logprobs", LOGPROBS),
    ("versions", TOKENS),  # per token; ENVIRONMENT where it is the environment's
    # Per token: false where it is past the staleness bound, the environment's or a baseline's.
    ("trainable", FLAGS),
    ("reward", pa.float32()),
    ("cost", pa.float32()),  # 0 where no reward term gives one
    ("greedy", pa.bool_()),  # the group's baseline
    ("finish_reason", pa.string()),
)
"""What the learner gets: whole groups, rows of one group together, its baseline (where the objective needs one) first. The version at hand-over is in the reply's header."""
