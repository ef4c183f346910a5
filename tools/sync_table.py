"""What the weight sync benchmark measures and how it prints it. Called by `bench_weight_sync`."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

from sync_models import plan_of, random_weights


@dataclass(frozen=True)
class Case:
    """One row."""

    model: str
    dtype: str
    transport: str
    receivers: int
    lag: int
    chunk_kb: int
    """Of `tcp`."""


@dataclass(frozen=True)
class Times:
    """Seconds of one sync."""

    memcpy: float
    sync: float
    """Until every engine runs the version."""
    learner: float
    write: float
    stage: float
    """Of the slowest engine, as are the next two."""
    apply: float
    stall: float


def row(case: Case, rounds: list[Times]) -> dict[str, object]:
    """Medians."""
    plan = plan_of(random_weights(case.model, case.dtype, "meta"), case.dtype, 2**28)
    middle = {name: statistics.median(getattr(each, name) for each in rounds) for name in asdict(rounds[0])}
    return {
        **asdict(case),
        "mb": round(plan.total_bytes / 1e6, 1),
        "tensors": len(plan.tensors),
        "rounds": len(rounds),
        **{f"{name}_s": round(value, 5) for name, value in middle.items()},
        "gb_per_s": round(plan.total_bytes / 1e9 / middle["sync"], 2),
        "sync_over_memcpy": round(statistics.median(each.sync / each.memcpy for each in rounds), 2),
    }


HEADER = (
    f"{'model':>5} {'dtype':>8} {'transport':>10} {'recv':>4} {'lag':>3} {'chunk kB':>8} {'MB':>7} {'memcpy ms':>9} {'sync ms':>8} {'GB/s':>5} "
    f"{'x memcpy':>8} | {'learner ms':>10} {'of it write':>11} | {'stage ms':>8} {'stall ms':>8}"
)


def line(found: dict[str, object]) -> str:
    ms = {
        name: 1000 * float(str(found[f"{name}_s"]))
        for name in ("memcpy", "sync", "learner", "write", "stage", "stall")
    }
    return (
        f"{found['model']:>5} {found['dtype']:>8} {found['transport']:>10} {found['receivers']:>4} {found['lag']:>3} {found['chunk_kb']:>8} "
        f"{found['mb']:>7} {ms['memcpy']:>9.1f} {ms['sync']:>8.1f} {found['gb_per_s']:>5} {found['sync_over_memcpy']:>8} | "
        f"{ms['learner']:>10.1f} {ms['write']:>11.1f} | {ms['stage']:>8.1f} {ms['stall']:>8.1f}"
    )
