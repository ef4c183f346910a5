"""`asyncrl sft`: the model that a recipe starts from, made from prompt/answer pairs. Called by the CLI, `imitate` by `rft` as well.

Prompts come from `generators`, training from `learner`; here the two meet. Demonstrations of several turns are played with
the recipe's environment, in its worker processes, so that what is imitated is what a run will see.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.generators.config import EnvironmentConfig
from asyncrl.generators.prompts import Reply, pairs
from asyncrl.generators.turns import open_turns
from asyncrl.learner.config import SFTConfig
from asyncrl.learner.sft import Pair, SFTProgress, sft_tokenizer, train_sft
from asyncrl.recipes import Recipe
from asyncrl.recipes.preflight import usable_cores

_LINE_EVERY = 50


def make(recipe: Recipe, config: SFTConfig, console: Console) -> None:
    """Writes `recipe.model.path`. Nothing else runs meanwhile, so every core of the machine computes."""
    tokenizer = sft_tokenizer(config)
    with _replies(recipe.environment, tokenizer) as reply:
        examples = pairs(
            config.source,
            config.answer_field,
            tokenizer,
            recipe.prompts,
            config.seed,
            stop_tokens=recipe.environment.stop_tokens if recipe.environment else (),
            reply=reply,
        )
        imitate(recipe, config, examples, Path(recipe.model.path), console)


def imitate(
    recipe: Recipe,
    config: SFTConfig,
    examples: Iterable[Pair],
    out: Path,
    console: Console,
    name: str = "sft",
) -> None:
    """Trains on `examples` and writes the model folder `out`; shows how it goes."""
    transformers.logging.disable_progress_bar()
    bar = Progress(
        TextColumn("supervised fine-tuning"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(name, total=config.steps, loss=float("nan"))

        def show(done: SFTProgress) -> None:
            bar.update(task, completed=done.step, loss=done.loss)
            if not console.is_terminal and (done.step % _LINE_EVERY == 0 or done.step == done.steps):
                console.print(f"{name} step {done.step}/{done.steps} loss {done.loss:.3f}", highlight=False)

        cores = usable_cores() if recipe.learner.device == "cpu" else 1
        train_sft(config, examples, out, cores=cores, device=recipe.learner.device, progress=show)


@contextlib.contextmanager
def _replies(config: EnvironmentConfig | None, tokenizer: PreTrainedTokenizerBase) -> Iterator[Reply | None]:
    """The recipe's environment with the new model's tokenizer, as a plain function; None where it has none.

    Its workers read the tokenizer from a folder, which the model does not have yet. Raises `FunctionError`.
    """
    with tempfile.TemporaryDirectory(prefix="asyncrl-tokenizer-") as folder, asyncio.Runner() as runner:
        tokenizer.save_pretrained(folder)
        turns = open_turns(config, folder)
        if turns is None:
            yield None
            return

        def reply(prompt: list[int], answer: list[int], said: list[bool], payload: str) -> list[int] | None:
            origin = [0 if by_model else ENVIRONMENT for by_model in said]
            return runner.run(turns.next_turn(prompt, answer, origin, payload))

        try:
            yield reply
        finally:
            turns.end()
