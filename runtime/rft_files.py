"""What a round of `asyncrl rft` leaves on disk: `samples.parquet` and `kept.parquet` in its run folder, whole or not at all.

Both have one row per answer: rollout_id int64, prompt_id string, prompt_tokens and tokens lists of int32, sampled list of bool
(of each of `tokens`: the model said it, not the environment), reward float64, finish_reason string. Called by `rft`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from asyncrl.buffer.reading import read_log, rollouts_table
from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.runtime.rft_keep import Sample

LAYOUT: Final = pa.schema(
    [
        ("rollout_id", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("sampled", pa.list_(pa.bool_())),
        ("reward", pa.float64()),
        ("finish_reason", pa.string()),
    ]
)


def scored(rollouts: Path) -> list[Sample]:
    """Every scored rollout of a run's log (the folder `rollouts`). Raises `LogError`."""
    table = rollouts_table(read_log(rollouts))
    table = table.filter(pc.is_valid(table["reward"]))
    columns = ("rollout_id", "prompt_id", "prompt_tokens", "tokens", "versions", "reward", "finish_reason")
    return [
        Sample(sampled=[version != ENVIRONMENT for version in row.pop("versions")], **row)
        for row in table.select(columns).to_pylist()
    ]


def write(samples: Iterable[Sample], path: Path) -> None:
    rows = [{name: getattr(sample, name) for name in LAYOUT.names} for sample in samples]
    partial = path.with_name(path.name + ".partial")
    parquet.write_table(pa.Table.from_pylist(rows, LAYOUT), partial)
    os.replace(partial, path)


def read(path: Path) -> list[Sample]:
    return [Sample(**row) for row in parquet.read_table(path, schema=LAYOUT).to_pylist()]
