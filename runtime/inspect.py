"""`asyncrl inspect`: a run's rollouts, from its log on disk, also while the run goes on. Called by the CLI.

Data goes to `out`, everything that is said about it (notes, what went wrong) to `errors`, so that a pipe gets data
alone. On a pipe a query's answer is lines of tab-separated values, everything else the same text as on a terminal.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import msgspec
from rich.console import Console

from asyncrl.buffer.reading import LogError, RolloutLog, read_log
from asyncrl.runtime import inspect_facts as facts
from asyncrl.runtime.find_run import NoSuchRun, find_run
from asyncrl.runtime.inspect_sql import QueryFailed, Rows, query
from asyncrl.runtime.inspect_text import Decoder, one_line
from asyncrl.runtime.inspect_views import draw_group, draw_life, draw_overview, draw_rows
from asyncrl.runtime.run_folder import RunFolder

NEWEST = 8
"""Rollouts of the overview, where no limit is asked for."""
QUERY_ROWS = 50
"""Rows of a query that are shown, where no limit is asked for."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked on the command line. At most one of `sql`, `rollout` and `group` is set."""

    run: str
    sql: str | None = None
    rollout: int | None = None
    group: int | None = None
    limit: int | None = None
    as_json: bool = False


def inspect_run(request: Request, out: Console, errors: Console) -> int:
    """Shows what was asked for. The exit code: 0, or 2 after one line that says what is wrong."""
    try:
        folder = find_run(request.run)
        log = read_log(folder.rollouts)
        if not log.states.num_rows:
            raise NoSuchRun(f"{folder.path} has no rollouts yet: the first come once version 0 is live")
        decoder = Decoder(folder)
        _show(request, folder, log, decoder, out, errors)
    except (NoSuchRun, LogError, QueryFailed, facts.NotInLog) as error:
        _say(errors, str(error))
        return 2
    for note in (*log.notes, *([decoder.problem] if decoder.problem else [])):
        _say(errors, f"note: {note}")
    return 0


def _show(
    request: Request, folder: RunFolder, log: RolloutLog, decoder: Decoder, out: Console, errors: Console
) -> None:
    if request.sql is not None:
        _show_query(request, log, decoder, out, errors)
        return
    found: msgspec.Struct
    if request.rollout is not None:
        found = life = facts.life(log, request.rollout, decoder)
        drawn = draw_life(life)
    elif request.group is not None:
        found = group = facts.group(log, request.group, decoder)
        drawn = draw_group(group)
    else:
        found = whole = facts.overview(str(folder.path), log, decoder, request.limit or NEWEST)
        drawn = draw_overview(whole)
    if request.as_json:
        _line(out, msgspec.json.encode(found).decode())
    else:
        out.print(drawn, highlight=False)


def _show_query(request: Request, log: RolloutLog, decoder: Decoder, out: Console, errors: Console) -> None:
    assert request.sql is not None
    for_eyes = out.is_terminal and not request.as_json
    answer = query(request.sql, log, decoder, request.limit or (QUERY_ROWS if for_eyes else None))
    if request.as_json:
        for row in answer.rows:
            _line(out, json_line(answer.columns, row))
    elif for_eyes:
        out.print(draw_rows(answer.columns, answer.rows, out.width), highlight=False)
    else:
        for line in tab_separated(answer):
            _line(out, line)
    if answer.more:
        _say(errors, f"note: these are the first {len(answer.rows)} rows; --limit N shows more")


def tab_separated(answer: Rows) -> list[str]:
    """A line of names, then one for each row. NULL is empty; line ends and tabs in a value are escapes."""
    values = ([("" if v is None else one_line(str(v))) for v in row] for row in answer.rows)
    return ["\t".join(cells) for cells in (map(one_line, answer.columns), *values)]


def json_line(columns: Sequence[str], row: Sequence[Any]) -> str:
    """One JSON object. Of columns with the same name the later ones are numbered: a, a_2."""
    named: dict[str, Any] = {}
    for name, value in zip(columns, row, strict=True):
        free = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(columns) + 2))) if n not in named)
        named[free] = _plain(value)
    return json.dumps(named, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """What JSON knows: numbers that are not finite are null, sums (DuckDB's 128-bit integers) are numbers."""
    match value:
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case None | bool() | int() | str():
            return value
        case _:
            return str(value)


def _line(out: Console, text: str) -> None:
    """As it stands: neither wrapped nor coloured."""
    out.file.write(text + "\n")


def _say(errors: Console, text: str) -> None:
    errors.print(text, highlight=False, markup=False, soft_wrap=True)
