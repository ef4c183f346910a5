"""`asyncrl sft`: the model that a recipe starts from, made from prompt/answer pairs. Called by the CLI.

Prompts come from `generators`, training from `learner`; here the two meet.
"""

from __future__ import annotations

from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from asyncrl.generators.prompts import pairs
from asyncrl.learner.config import SFTConfig
from asyncrl.learner.sft import SFTProgress, sft_tokenizer, train_sft
from asyncrl.recipes import Recipe
from asyncrl.recipes.preflight import usable_cores

_LINE_EVERY = 50


def make(recipe: Recipe, config: SFTConfig, console: Console) -> None:
    """Writes `recipe.model.path`. Nothing else runs meanwhile, so every core of the machine computes."""
    transformers.logging.disable_progress_bar()
    examples = pairs(config.source, config.answer_field, sft_tokenizer(config), recipe.prompts, config.seed)
    bar = Progress(
        TextColumn("supervised fine-tuning"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("sft", total=config.steps, loss=float("nan"))

        def show(done: SFTProgress) -> None:
            bar.update(task, completed=done.step, loss=done.loss)
            if not console.is_terminal and (done.step % _LINE_EVERY == 0 or done.step == done.steps):
                console.print(f"sft step {done.step}/{done.steps} loss {done.loss:.3f}", highlight=False)

        cores = usable_cores() if recipe.learner.device == "cpu" else 1
        train_sft(
            config,
            examples,
            Path(recipe.model.path),
            cores=cores,
            device=recipe.learner.device,
            progress=show,
        )
