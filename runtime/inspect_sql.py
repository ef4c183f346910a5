"""SQL over a run's rollouts, with DuckDB in this process: the tables prompts, segments, states and rollouts.

`prompt` and `answer` are columns that decode tokens as a query asks for them: a query that does not name them does not
wait for the tokenizer. `origin` of a segment says whose its tokens are. The tables are views on what was read; a query can write files (COPY ... TO), never the log.
Called by `inspect`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from asyncrl.buffer.reading import RolloutLog, rollouts_table
from asyncrl.runtime.inspect_text import Decoder

_VIEWS = """
create view prompts as select *, prompt_text(tokens) as prompt from log_prompts;
create view segments as
    select *, case when version = -1 then 'environment' else 'model' end as origin from log_segments;
create view states as select * from log_states;
create view rollouts as
    select *, prompt_text(prompt_tokens) as prompt, answer_text(tokens) as answer from log_rollouts;
"""


class QueryFailed(ValueError):
    """DuckDB does not understand the query, or could not carry it out; the message is one line."""


class Rows(NamedTuple):
    """The answer to a query."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    more: bool
    """There are further rows."""


def query(text: str, log: RolloutLog, decoder: Decoder, limit: int | None) -> Rows:
    """The first `limit` rows (None: all). Raises `QueryFailed`."""
    # Without replacements a name that is no table is an error, not a variable of this process.
    with duckdb.connect(config={"python_enable_replacements": "false"}) as connection:
        _open(connection, log, decoder)
        try:
            relation = connection.sql(text)
            if relation is None:
                raise QueryFailed("the query is empty: expected SQL such as SELECT * FROM rollouts LIMIT 5")
            table = (relation if limit is None else relation.limit(limit + 1)).to_arrow_table()
        except duckdb.Error as error:
            raise QueryFailed(one_line_error(str(error))) from error
    values = [column.to_pylist() for column in table.columns]
    rows = list(zip(*values, strict=True))
    return Rows(table.column_names, rows[:limit], limit is not None and len(rows) > limit)


def _open(connection: duckdb.DuckDBPyConnection, log: RolloutLog, decoder: Decoder) -> None:
    for name, decode in (("prompt_text", decoder.prompt), ("answer_text", decoder.answer)):
        connection.create_function(  # type: ignore[call-overload]  # its enums' module is another in each release
            name, _vectorised(decode), ["INTEGER[]"], "VARCHAR", type="arrow", null_handling="special"
        )
    tables = {
        "prompts": log.prompts,
        "segments": log.segments,
        "states": log.states,
        "rollouts": rollouts_table(log),
    }
    for name, table in tables.items():
        connection.register(f"log_{name}", table)
    connection.execute(_VIEWS)


def _vectorised(decode: Callable[[Sequence[int] | None], str | None]) -> Callable[[Any], pa.Array]:
    return lambda column: pa.array([decode(tokens) for tokens in column.to_pylist()], pa.string())


def one_line_error(message: str) -> str:
    """DuckDB's message without its picture of the query."""
    lines = [line.strip() for line in message.partition("\nLINE ")[0].splitlines()]
    return " ".join(line for line in lines if line)
