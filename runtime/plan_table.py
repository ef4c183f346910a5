"""A plan on the terminal: the split, both sides' seconds, what else was found and what did not fit. Called by `cli_plan`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from asyncrl.recipes.plan import Plan, PlannedSplit

MOST_REJECTED = 12


def show_plan(plan: Plan, console: Console) -> None:
    active = (
        f", {plan.active_parameters / 1e9:.2f} G active" if plan.active_parameters != plan.parameters else ""
    )
    console.print(
        f"{plan.model}: {plan.parameters / 1e9:.2f} G parameters{active}, {plan.kv_bytes_per_token:,} bytes of KV cache a token",
        highlight=False,
    )
    console.print(
        f"a step: {plan.rollouts_per_step:,} rollouts; prompts of {plan.prompt_tokens:,.0f} tokens, answers of "
        f"{plan.mean_tokens:,.0f} on average and {plan.max_tokens:,} at most (assumed: --prompt-tokens, --mean-tokens)\n",
        highlight=False,
    )
    console.print(_best(plan))
    console.print(_seconds(plan.best))
    if plan.idle_gpus:
        console.print(
            f"{plan.idle_gpus} GPUs are left over: with them a step would take as long\n", highlight=False
        )
    if plan.alternatives:
        console.print(_alternatives(plan))
    if plan.rejected:
        console.print(_rejected(plan))


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column in right)
    return table


def _best(plan: Plan) -> Table:
    best, learner = plan.best, plan.best.learner
    right = ("engines", "tp", "concurrency", "KV holds", "GB a GPU", "tokens/s")
    table = _table(
        f"best of what fits: {best.gpus} GPUs, max_staleness_versions = {best.max_staleness_versions}",
        "part",
        "GPU",
        *right,
        right=right,
    )
    for pool in best.pools:
        table.add_row(
            f"pool {pool.name}",
            pool.gpu_type,
            f"{pool.engines}",
            f"{pool.tensor_parallel}",
            f"{pool.concurrency}",
            f"{pool.most_slots}",
            f"{pool.weights_bytes_per_gpu / 1e9:.1f} weights",
            f"{pool.tokens_per_s:,.0f}",
        )
    table.add_row(
        "learner",
        learner.gpu_type,
        f"{learner.ranks} ranks",
        "",
        "",
        "",
        f"{learner.memory_bytes_per_gpu / 1e9:.1f} in all",
        f"{best.tokens_per_s:,.0f}",
    )
    return table


def _seconds(best: PlannedSplit) -> Table:
    learner = best.learner
    table = _table("\npredicted seconds of a step", "", "s", "from", right=("s",))
    table.add_row(
        "generate", f"{best.generate_s:.1f}", "decode steps with their prefills, all pools together"
    )
    table.add_row(
        "train",
        f"{best.train_s:.1f}",
        f"the longer of compute {learner.compute_s:.1f} and FSDP traffic {learner.traffic_s:.1f}; optimizer {learner.optimizer_s:.1f}; "
        f"publish {learner.publish_s:.1f}",
    )
    table.add_row(
        "asynchronous",
        f"{best.step_s:.1f}",
        "the longer of the two" if best.max_staleness_versions else "taking turns is as fast",
    )
    table.add_row("synchronous", f"{best.synchronous_s:.1f}", "generate to the last answer, then train")
    return table


def _alternatives(plan: Plan) -> Table:
    right = ("GPUs", "staleness", "generate s", "train s", "step s")
    table = _table("\nother learners", "learner", "engines", *right, right=right)
    for split in plan.alternatives:
        engines = " + ".join(f"{p.engines} x {p.gpu_type} tp {p.tensor_parallel}" for p in split.pools)
        table.add_row(
            f"{split.learner.ranks} x {split.learner.gpu_type}",
            engines,
            f"{split.gpus}",
            f"{split.max_staleness_versions}",
            f"{split.generate_s:.1f}",
            f"{split.train_s:.1f}",
            f"{split.step_s:.1f}",
        )
    return table


def _rejected(plan: Plan) -> Table:
    table = _table("\nwhat does not fit", "shape", "reason")
    for misfit in plan.rejected[:MOST_REJECTED]:
        table.add_row(misfit.shape, misfit.reason)
    if len(plan.rejected) > MOST_REJECTED:
        table.add_row(f"{len(plan.rejected) - MOST_REJECTED} more", "--json lists all")
    return table
