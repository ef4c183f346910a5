"""Where rows come from: generated tasks, JSONL, Parquet, Hugging Face data sets. Called by `prompts`.

Invariants:
- Every source gives random access: row `i` is the same each time it is asked for.
- What can be wrong with a source (file, line, field) is found when it is opened, not in the middle of a run.
Nothing here knows of tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pyarrow as pa
import pyarrow.parquet as parquet

from asyncrl.generators.tasks import GeneratedTask, TaskError

Row = Mapping[str, Any]


class SourceError(ValueError):
    """A source that cannot be read, or does not hold what the recipe says it holds."""


class Rows(Protocol):
    """Rows by index."""

    @property
    def name(self) -> str:
        """Short and stable: prompt ids are made of it."""
        ...

    @property
    def size(self) -> int | None:
        """Number of rows; None where they never end."""
        ...

    def row(self, index: int) -> Row: ...


class TaskRows:
    """A generated task as a source."""

    size = None

    def __init__(self, spec: str, settings: Mapping[str, int], seed: int, fields: Sequence[str]) -> None:
        task, _, split = spec.partition(":")
        self.name = f"{spec}@{seed}"
        try:
            self._task = GeneratedTask(task, split, settings, seed)
        except TaskError as error:
            raise SourceError(f"source {spec!r}: {error}") from error
        _demand_fields(spec, fields, self.row(0))

    def row(self, index: int) -> Row:
        return msgspec.structs.asdict(self._task.row(index))


class JsonlRows:
    """One JSON object a line. Only the offsets of the lines stay in memory; blank lines are skipped."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.name = path.name
        self._path = path.absolute()
        self._offsets, offset = array("q"), 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    _demand_fields(where, fields, _json_object(line, where))
                    self._offsets.append(offset)
                offset += len(line)

    @property
    def size(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> Row:
        with self._path.open("rb") as lines:
            lines.seek(self._offsets[index])
            return _json_object(lines.readline(), f"{self._path}, row {index}")


class ParquetRows:
    """A Parquet file, memory-mapped and decoded once into Arrow columns."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.name = path.name
        try:
            self._table = parquet.read_table(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{path} is no readable Parquet file: {error}") from error
        _demand_fields(str(path), fields, dict.fromkeys(self._table.column_names, ""))
        for field in fields:
            if nulls := self._table.column(field).null_count:
                raise SourceError(f"{path}: {nulls} rows have no {field!r}; leave them out of the file")

    @property
    def size(self) -> int:
        return int(self._table.num_rows)

    def row(self, index: int) -> Row:
        row: Row = self._table.slice(index, 1).to_pylist()[0]
        return row


class DatasetRows:
    """A Hugging Face data set: `NAME[:SPLIT]` or `NAME:CONFIG:SPLIT` of the hub, or a folder of `save_to_disk`."""

    def __init__(self, spec: str, fields: Sequence[str]) -> None:
        name, *rest = spec.removeprefix("hf:").split(":")
        if not name or len(rest) > 2 or not all(rest):
            raise SourceError(f"source {spec!r}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
        split = rest[-1] if rest else "train"
        self.name = f"{Path(name).name}:{split}"
        self._rows = _load_dataset(spec, name, rest[0] if len(rest) == 2 else None, split)
        _demand_fields(spec, fields, dict.fromkeys(self._rows.column_names, ""))

    @property
    def size(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        row: Row = self._rows[index]
        return row


def open_rows(source: str, fields: Sequence[str], task: Mapping[str, int], seed: int) -> Rows:
    """The rows of `source` (see `PromptsConfig.source`), each of which has `fields`. Raises `SourceError`."""
    if source.startswith("hf:"):
        rows: Rows = DatasetRows(source, fields)
    elif source.endswith((".jsonl", ".parquet")):
        path = Path(source)
        if not path.is_file():
            raise SourceError(f"source {source!r}: there is no file {path.absolute()}")
        rows = JsonlRows(path, fields) if path.suffix == ".jsonl" else ParquetRows(path, fields)
    elif ":" in source:
        rows = TaskRows(source, task, seed, fields)
    else:
        raise SourceError(
            f"source {source!r} is none of: a generated task such as sums:train, a .jsonl or .parquet file, hf:NAME[:SPLIT]"
        )
    if rows.size == 0:
        raise SourceError(f"source {source!r} has no rows")
    return rows


def _demand_fields(where: str, fields: Sequence[str], row: Row) -> None:
    for field in fields:
        if row.get(field) is None:
            raise SourceError(
                f"{where}: no field {field!r}; the fields there are: {', '.join(row)}. "
                "Name the right one with prompt_field or answer_field."
            )


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise SourceError(f"{where}: expected one JSON object: {error}") from error


def _load_dataset(spec: str, name: str, config: str | None, split: str) -> Any:
    """A `datasets.Dataset`. The import is slow and only this source needs it."""
    import datasets

    folder = Path(name)
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(name)
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, config, split=split)
    except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(
            f"source {spec!r}: {type(error).__name__}: {error}. Expected hf:NAME[:SPLIT] or hf:NAME:CONFIG:SPLIT, where "
            "NAME is a data set of the hub or a folder made by Dataset.save_to_disk."
        ) from error
