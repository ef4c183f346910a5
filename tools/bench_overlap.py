"""One load run synchronously and asynchronously, in turns: how much of the possible overlap is reached.

    python tools/bench_overlap.py --json out.json              engines that sleep, answers with a long tail
    python tools/bench_overlap.py --engine vllm --recipe quickstart --steps 30       the real engine, one core each

Both sides are `asyncrl launch` as a user starts it, with `staleness.max_staleness_versions` 0 and `--staleness`. The learner
trains for real. Of the synchronous run T_generate is the mean wait of the learner for its batch, and T_train the rest of the
step; the bound is what two phases that overlap wholly would gain:

    bound = (T_generate + T_train) / max(T_generate, T_train)          share = (synchronous step / asynchronous step) / bound

Engines that never stand still generate a long-tailed load in less than T_generate a batch, so that a share above 1 is possible
where generation is the slower phase. Steps until the pipeline is full are left out on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from asyncrl.learner.tiny_model import character_tokenizer, new_model
from asyncrl.runtime.facts import StepFacts
from asyncrl.runtime.metrics import read_facts

RUN_S = 900.0
"""Longest that one side may take."""

RECIPE = """
[run]
name = "bench"
steps = 12
[model]
path = "{model}"
max_context_tokens = 1024
[prompts]
source = "sums:train"
prompts_per_step = 16
rollouts_per_prompt = 8
[sampling]
max_new_tokens = 640
[staleness]
over_stale = "mask"
[[pools]]
name = "sleeping"
engine = "fake"
engines = 2
device = "cpu"
concurrency = 64
dtype = "float32"
fake = {{ step_s = {step_s}, lengths = {{ median_tokens = {median}, sigma = {sigma} }} }}
[rewards]
terms = [{{ function = "sums" }}]
[learner]
device = "cpu"
cores = 1
learning_rate = 1e-6
tokens_per_microbatch = 4096
[weight_sync]
verify = "never"           # engines that sleep do not compute with the weights
"""


def main() -> None:
    arguments = _arguments()
    rows = []
    with tempfile.TemporaryDirectory(prefix="asyncrl-bench-") as folder:
        recipe = arguments.recipe or str(_write_load(arguments, Path(folder)))
        for turn in range(arguments.rounds):
            for name, bound in (("synchronous", 0), ("asynchronous", arguments.staleness)):
                where = Path(folder) / f"{name}-{turn}"
                steps = _run(recipe, where, bound, arguments)
                rows.append({"mode": name, "round": turn + 1, **_measured(steps, arguments)})
    result = {"rows": rows, **_compared(rows)}
    _show(result)
    if arguments.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"settings": settings, **result}, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("fake", "vllm"), default="fake")
    parser.add_argument(
        "--recipe", default="", help="with --engine vllm: whose load is run, such as quickstart"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--skip", type=int, default=4, help="steps left out at the start")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--staleness", type=int, default=2, help="bound of the asynchronous side, in versions"
    )
    parser.add_argument("--step-s", type=float, default=0.04, help="sleep of one decode step")
    parser.add_argument("--median", type=float, default=20.0, help="median answer, in tokens")
    parser.add_argument("--sigma", type=float, default=0.8, help="of the lognormal lengths")
    parser.add_argument("--hidden", type=int, default=512, help="width of the learner's model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.engine == "vllm") != bool(arguments.recipe):
        parser.error("--engine vllm goes with --recipe, and --engine fake without")
    return arguments


def _write_load(arguments: argparse.Namespace, folder: Path) -> Path:
    """A model of random weights and the recipe over it."""
    model = folder / "model"
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(model)
    sizes = {"hidden_size": arguments.hidden, "layers": arguments.layers, "heads": arguments.hidden // 64}
    new_model(tokenizer, **sizes, max_tokens=1024, seed=0).save_pretrained(model)
    recipe = folder / "recipe.toml"
    values = {"step_s": arguments.step_s, "median": arguments.median, "sigma": arguments.sigma}
    recipe.write_text(RECIPE.format(model=model, **values))
    return recipe


def _run(recipe: str, folder: Path, bound: int, arguments: argparse.Namespace) -> list[StepFacts]:
    """One side from start to end; its steps."""
    settings = [
        "run.name=bench",
        f"run.folder={folder}",
        f"run.steps={arguments.steps}",
        f"staleness.max_staleness_versions={bound}",
        *arguments.overrides,
    ]
    command = [sys.executable, "-P", "-m", "asyncrl.runtime.cli", "launch", recipe]
    for setting in settings:
        command += ["--set", setting]
    folder.mkdir()
    output = folder / "output.txt"
    with output.open("wb") as file:
        launch = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            _keep_to_cores(launch, folder / "bench" / "metrics.jsonl", bind=arguments.engine == "vllm")
        finally:
            if launch.poll() is None:
                launch.terminate()
                launch.wait(60)
    if launch.returncode:
        sys.exit(f"the run ended with exit code {launch.returncode}:\n{output.read_text()[-3000:]}")
    return [fact for fact in read_facts(folder / "bench" / "metrics.jsonl") if isinstance(fact, StepFacts)]


def _keep_to_cores(launch: subprocess.Popen[bytes], metrics: Path, *, bind: bool) -> None:
    """Waits for the run's end or its deadline; meanwhile, once it trains, the engine computes on the first core and the
    learner on the second, if asked for and there are two."""
    deadline = time.monotonic() + RUN_S
    cores = sorted(os.sched_getaffinity(0))
    bind = bind and len(cores) > 1
    while launch.poll() is None:
        if time.monotonic() > deadline:
            sys.exit(f"the run took longer than {RUN_S:.0f} s")
        if bind and metrics.is_file() and '"kind":"step"' in metrics.read_text():
            for process in psutil.Process(launch.pid).children(recursive=True):
                _bind(process, cores)
            bind = False
        time.sleep(0.2)


def _bind(process: psutil.Process, cores: list[int]) -> None:
    try:
        title = " ".join(process.cmdline())
        core = cores[0] if "EngineCore" in title else cores[1] if "LearnerPart" in title else None
        if core is not None:
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {core})
    except (psutil.NoSuchProcess, ProcessLookupError):
        return  # it has ended: nothing computes there


def _measured(steps: list[StepFacts], arguments: argparse.Namespace) -> dict[str, Any]:
    kept = steps[arguments.skip :]
    total_s = kept[-1].seconds - steps[arguments.skip - 1].seconds
    return {
        "steps": len(kept),
        "step_s": total_s / len(kept),
        "wait_s": statistics.mean(step.wait_s for step in kept),
        "train_s": statistics.mean(step.train_s for step in kept),
        "publish_s": statistics.mean(step.publish_s for step in kept),
        "answer_tokens_per_s": sum(step.tokens_trained + step.tokens_masked for step in kept) / total_s,
        "staleness_max": max(step.staleness_max for step in kept),
        "tokens_masked": sum(step.tokens_masked for step in kept),
    }


def _compared(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds."""
    side = {mode: [row for row in rows if row["mode"] == mode] for mode in ("synchronous", "asynchronous")}
    sync_s, async_s = (statistics.median(r["step_s"] for r in side[m]) for m in side)
    generate_s = statistics.median(r["wait_s"] for r in side["synchronous"])
    train_s = statistics.median(r["step_s"] - r["wait_s"] for r in side["synchronous"])
    bound = (generate_s + train_s) / max(generate_s, train_s)
    return {
        "generate_s": generate_s,
        "train_s": train_s,
        "speedup": sync_s / async_s,
        "bound": bound,
        "share_of_bound": sync_s / async_s / bound,
    }


def _show(result: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in result["rows"][0]:
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=130)
    console.print(table)
    console.print(
        f"T_generate {result['generate_s']:.2f} s, T_train {result['train_s']:.2f} s: asynchronous is "
        f"{result['speedup']:.2f} times as fast, {result['share_of_bound']:.2f} of the bound {result['bound']:.2f}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
