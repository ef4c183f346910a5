"""`metrics.jsonl`: every fact of a run as one JSON line, and its mirror in wandb.

Invariants:
- A line is written whole and flushed before `write` returns, so a killed run keeps all but the line being written.
- Reading gives back the facts as they were written; a torn last line is left out, any other bad line is an error.
- Numbers that are not finite are `null` in the file (JSON has no NaN) and NaN when read.

The supervisor writes; `summary` and `report` read. One writer per file, called from one thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import msgspec

from asyncrl.recipes.telemetry_config import TelemetryConfig
from asyncrl.runtime.facts import Fact, Snapshot, StepFacts

logger = logging.getLogger(__name__)

WANDB_START_TIMEOUT_S = 60.0
WANDB_FINISH_TIMEOUT_S = 60


class MetricsError(RuntimeError):
    """The metrics cannot be written, mirrored or read; the message says where and what to do."""


class Mirror(Protocol):
    """Somewhere else that wants each fact's scalars."""

    def log(self, scalars: Mapping[str, float]) -> None: ...

    def close(self, exit_code: int) -> None: ...


class MetricsLog:
    """Appends facts to `path`. Close it, or use it as a context manager: an exception then marks the wandb run failed."""

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path = path
        self._mirror = mirror
        self._encoder = msgspec.json.Encoder()
        cut_torn_tail(path)
        self._file = path.open("ab")

    def write(self, fact: Fact) -> None:
        self._file.write(self._encoder.encode(fact) + b"\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror.log(scalars(fact))

    def close(self, exit_code: int = 0) -> None:
        """Ends the file and the mirror; a second call does nothing. `exit_code` other than 0: the run failed."""
        if self._file.closed:
            return
        self._file.close()
        if self._mirror is not None:
            self._mirror.close(exit_code)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self.close(0 if kind is None else 1)


def open_metrics(
    path: Path, telemetry: TelemetryConfig, *, run: str, settings: Mapping[str, Any]
) -> MetricsLog:
    """The metrics log of a run, mirrored to wandb if `telemetry` asks for it.

    `settings` is the recipe as plain data; wandb shows it beside the run. Raises `MetricsError` if wandb cannot start.
    """
    mirror = None
    if telemetry.wandb != "off":
        mirror = WandbMirror(telemetry, run=run, folder=path.parent, settings=settings)
    return MetricsLog(path, mirror)


class WandbMirror:
    """One wandb run, kept inside the run folder. Steps lie over `train/step`, snapshots over `now/seconds`."""

    def __init__(
        self, telemetry: TelemetryConfig, *, run: str, folder: Path, settings: Mapping[str, Any]
    ) -> None:
        self._wandb = wandb = _import_wandb(telemetry)
        try:
            self._run = wandb.init(
                project=telemetry.project,
                name=run,
                dir=str(folder),
                mode=telemetry.wandb,
                config=dict(settings),
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    x_disable_stats=True,
                    init_timeout=WANDB_START_TIMEOUT_S,
                    login_timeout=WANDB_START_TIMEOUT_S,
                    finish_timeout=WANDB_FINISH_TIMEOUT_S,
                ),
            )
        except wandb.Error as error:
            raise MetricsError(
                f"[telemetry] wandb = {telemetry.wandb!r}: wandb could not start: {error}; "
                f'run `wandb login`, or set wandb = "offline" or "off"'
            ) from error
        for group, axis in (("train", "step"), ("now", "seconds"), ("held_out", "step")):
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/{axis}")

    def log(self, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars))

    def close(self, exit_code: int) -> None:
        """Waits for what is not yet written or sent, for at most `WANDB_FINISH_TIMEOUT_S`, and ends wandb's process."""
        self._run.finish(exit_code=exit_code)
        self._wandb.teardown(exit_code=exit_code)


def _import_wandb(telemetry: TelemetryConfig) -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise MetricsError(
            f"[telemetry] wandb = {telemetry.wandb!r}, but the package wandb cannot be imported: {error}; "
            'install it with `pip install wandb`, or set wandb = "off"'
        ) from error
    return wandb


def scalars(fact: Fact) -> dict[str, float]:
    """The numbers of one fact under flat names: `train/...` for steps, `now/...` for snapshots, `held_out/...`."""
    if isinstance(fact, StepFacts):
        return _flat("train", msgspec.structs.asdict(fact))
    if isinstance(fact, Snapshot):
        plain = msgspec.structs.asdict(fact)
        del plain["engines"]
        plain["buffer"] = msgspec.structs.asdict(fact.buffer)
        plain["engines_serving"] = sum(engine.state == "serving" for engine in fact.engines)
        plain["slots_used"] = sum(engine.slots_used for engine in fact.engines)
        return _flat("now", plain)
    return _flat("held_out", msgspec.to_builtins(fact, str_keys=True))


def _flat(prefix: str, tree: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(f"{prefix}/{name}", value))
        elif isinstance(value, int | float):
            flat[f"{prefix}/{name}"] = value
    return flat


def read_facts(path: Path) -> Iterator[Fact]:
    """Facts of one `metrics.jsonl` in the order written, one at a time; of a file that is not there, none.

    Raises `MetricsError` with the line number if a line other than a torn last one is not a fact.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                logger.warning("torn last line left out path=%s line=%d", path, number)
                return
            try:
                yield _decode(line)
            except msgspec.DecodeError as error:
                raise MetricsError(
                    f"{path}:{number}: expected one fact as JSON: {error}; was the file edited, or written by "
                    "another version of asyncrl?"
                ) from error


def last_seconds(path: Path) -> float:
    """Of the last fact in the file, where a run that goes on counts on from; 0 where there is none."""
    cut_torn_tail(path)
    if not path.exists() or not path.stat().st_size:
        return 0.0
    with path.open("rb") as file:
        lines, at = b"", file.seek(0, 2)
        # Ends: with a whole line before the last newline, or with the file's beginning.
        while at and b"\n" not in lines[:-1]:
            start = max(0, at - 65536)
            file.seek(start)
            lines, at = file.read(at - start) + lines, start
    return _decode(lines[:-1].rpartition(b"\n")[2]).seconds


def cut_torn_tail(path: Path) -> None:
    """Removes a last line without its end, so that what is appended next starts a line of its own."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            logger.warning("torn last line cut path=%s bytes=%d", path, size - end)
            file.truncate(end)


def _decode(line: bytes) -> Fact:
    fact: Fact = msgspec.convert(_null_to_nan(msgspec.json.decode(line)), Fact, str_keys=True)
    return fact


def _null_to_nan(value: Any) -> Any:
    if value is None:
        return float("nan")
    if isinstance(value, dict):
        return {name: _null_to_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_null_to_nan(item) for item in value]
    return value
