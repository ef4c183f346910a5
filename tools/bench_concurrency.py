"""Turns the concurrency of a run up and down while it goes on, and shows how soon it follows and what it costs.

    python tools/bench_concurrency.py --phases 8:30,64:40,4:30,auto:120 --json out.json --png docs/concurrency.png

Launches the recipe as a user does, and gives each phase's setting by `asyncrl scale`, from a process of its own. What is
shown comes from the run's own snapshots, one a second. For each phase: seconds from the command until every engine has the
new limit and, downwards, holds no more rollouts than that; mean slots in use, tokens/s and KV use once it has.
Nothing may be lost: the run is stopped at the end, and its account must hold.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from asyncrl.runtime.facts import Snapshot
from asyncrl.runtime.metrics import read_facts
from asyncrl.runtime.report_panels import BLUE, FAINT, GREEN, ORANGE, PURPLE

_START_S = 600.0


class Phase(NamedTuple):
    """One setting of the run, and when it was asked for."""

    setting: str
    begin_s: float
    """Seconds since launch at which the command was given."""
    took_s: float
    """Until `asyncrl scale` had ended, with the start of its process."""
    end_s: float


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="asyncrl-bench-") as folder:
        phases, run = drive(arguments, Path(folder))
        snapshots = [fact for fact in read_facts(run / "metrics.jsonl") if isinstance(fact, Snapshot)]
        summary = json.loads((run / "summary.json").read_text())
        rows = [measured(phase, snapshots) for phase in phases]
        show(rows, summary)
        if arguments.png:
            draw(snapshots, phases, arguments.png)
    if arguments.json:
        held = {name: summary[name] for name in ("outcome", "conservation", "rollouts_trained")}
        arguments.json.write_text(json.dumps({"phases": rows, "run": held}, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--phases", default="8:30,64:40,4:30,auto:120", help="SETTING:SECONDS, one after the other"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    return parser.parse_args()


def drive(arguments: argparse.Namespace, folder: Path) -> tuple[list[Phase], Path]:
    """Runs the whole of it; the phases and the run's folder."""
    wanted = [(s, float(t)) for s, _, t in (part.partition(":") for part in arguments.phases.split(","))]
    command = ["launch", arguments.recipe, "--set", "run.name=bench", "--set", f"run.folder={folder}"]
    for override in ["run.steps=1000000", "evaluation.source=", *arguments.overrides]:
        command += ["--set", override]
    run = folder / "bench"
    with (folder / "output.txt").open("wb") as output:
        launch = subprocess.Popen(_asyncrl(*command), stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_it_trains(launch, run, folder / "output.txt")
            phases = [_phase(run, setting, seconds) for setting, seconds in wanted]
        finally:
            launch.send_signal(signal.SIGINT)
            launch.wait(60)
    return phases, run


def _wait_until_it_trains(launch: subprocess.Popen[bytes], run: Path, output: Path) -> None:
    """Waits for the first step; ends with the launch, or at its deadline."""
    deadline = time.monotonic() + _START_S
    while '"kind":"step"' not in (
        (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").is_file() else ""
    ):
        if launch.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the run made no step within {_START_S:.0f} s:\n{output.read_text()[-3000:]}")
        time.sleep(0.5)


def _phase(run: Path, setting: str, seconds: float) -> Phase:
    status = _ask(run)
    launched_at = time.time() - float(status["snapshot"]["seconds"])
    began = time.time()
    subprocess.run(_asyncrl("scale", str(run), "--concurrency", setting), check=True, capture_output=True)
    took_s = time.time() - began
    time.sleep(max(0.0, seconds - took_s))
    return Phase(setting, began - launched_at, took_s, began - launched_at + seconds)


def _ask(run: Path) -> dict[str, Any]:
    done = subprocess.run(_asyncrl("status", str(run), "--json"), check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _asyncrl(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "asyncrl.runtime.cli", *arguments]


def measured(phase: Phase, snapshots: list[Snapshot]) -> dict[str, Any]:
    """A row of the table. Snapshots come once a second, so a time to follow is known to a second."""
    during = [s for s in snapshots if phase.begin_s <= s.seconds < phase.end_s]
    followed = next((s.seconds - phase.begin_s for s in during if _follows(s, phase.setting)), float("nan"))
    settled = [
        s for s in during if s.seconds >= phase.begin_s + (followed if followed == followed else 0.0)
    ] or during
    engines = [engine for s in settled for engine in s.engines]
    return {
        "setting": phase.setting,
        "command_s": round(phase.took_s, 2),
        "followed_s": round(followed, 2),
        "slots_used": round(statistics.mean(sum(e.slots_used for e in s.engines) for s in settled), 1),
        "slots": sum(engine.slots for engine in settled[-1].engines),
        "tokens_per_s": round(statistics.mean(s.engine_tokens_per_s for s in settled)),
        "kv_used": round(statistics.mean(engine.kv_used_fraction for engine in engines), 3),
        "preemptions": sum(e.preemptions for e in settled[-1].engines)
        - sum(e.preemptions for e in settled[0].engines),
        "steps": settled[-1].step - settled[0].step,
    }


def _follows(snapshot: Snapshot, setting: str) -> bool:
    if setting == "auto":
        return all(pool.concurrency == "auto" for pool in snapshot.pools)
    limit = int(setting)
    return all(engine.slots == limit and engine.slots_used <= limit for engine in snapshot.engines)


def show(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = Console()
    console.print(table)
    console.print(
        f"outcome {summary['outcome']}, rollouts trained {summary['rollouts_trained']}, account holds: "
        f"{summary['conservation']['holds']}",
        highlight=False,
    )


def draw(snapshots: list[Snapshot], phases: list[Phase], path: Path) -> None:
    """Slots, tokens per second, and KV cache with the staleness of what was trained, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    zero = phases[0].begin_s
    shown = [s for s in snapshots if zero - 5 <= s.seconds <= phases[-1].end_s]
    seconds = [s.seconds - zero for s in shown]
    figure, axes = plt.subplots(3, 1, figsize=(10, 8), sharex=True, layout="constrained")
    slots, speed, cache = axes
    slots.step(
        seconds, [sum(e.slots for e in s.engines) for s in shown], color=FAINT, where="post", label="limit"
    )
    slots.plot(seconds, [sum(e.slots_used for e in s.engines) for s in shown], color=BLUE, label="in use")
    slots.set_ylabel("slots")
    slots.legend(frameon=False)
    speed.plot(seconds, [s.engine_tokens_per_s for s in shown], color=GREEN)
    speed.set_ylabel("tokens/s generated")
    cache.plot(
        seconds,
        [100 * max(e.kv_used_fraction for e in s.engines) for s in shown],
        color=ORANGE,
        label="KV cache used, %",
    )
    cache.plot(seconds, [s.buffer.queued for s in shown], color=PURPLE, label="rollouts queued")
    cache.set_xlabel("seconds")
    cache.legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylim(bottom=0)
        for phase in phases:
            ax.axvline(phase.begin_s - zero, color=FAINT, linewidth=0.8, linestyle=":")
    for phase in phases:
        slots.annotate(phase.setting, (phase.begin_s - zero, slots.get_ylim()[1]), fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
