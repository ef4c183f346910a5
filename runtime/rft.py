"""`asyncrl rft`: rejection-sampling fine-tuning. Sample with the model, keep the answers that score, imitate them; again.

    round 1: sampling run (its own process) --> samples.parquet --> kept.parquet --> supervised fine-tuning --> model
    round 2: the same with that model ...     the last round's model is `rft.out`     --> held-out accuracy of it

- Each round is a run folder below `FOLDER/NAME-rft`: `asyncrl inspect` reads it, `asyncrl status` its process while it samples.
- What is on disk is not done again: a second call goes on with the log of a round that was killed, with the samples of one that
  was sampled, and after the model of one that was trained. It refuses to where the recipe is another one.
Called by the CLI.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from asyncrl.buffer import base
from asyncrl.generators.prompts import permuted
from asyncrl.generators.sources import open_rows
from asyncrl.learner.sft import Pair
from asyncrl.recipes import Recipe, dump_recipe, recipe_from
from asyncrl.recipes.rft_config import RFTConfig, sampling_recipe
from asyncrl.runtime import rft_files
from asyncrl.runtime.facts import Evaluation
from asyncrl.runtime.metrics import read_facts
from asyncrl.runtime.rft_keep import Sample, kept
from asyncrl.runtime.run_folder import RunFolder, held
from asyncrl.runtime.warm_start import imitate

_STOP_S = 20.0
"""For a sampling run to end in order after Ctrl-C."""
RESULT = "result"
"""The folder in which the model that was made is measured."""


class RFTError(RuntimeError):
    """It cannot be done, or not gone on with: why, and the way out."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """What one round came to."""

    model: str
    """That it sampled with."""
    accuracy: float | None
    """Held out, of that model; None where it was not measured."""
    samples: int
    reward_mean: float
    prompts: int
    prompts_kept: int
    """Prompts with an answer that was kept."""
    kept: int
    steps: int


class RFTSummary(msgspec.Struct, frozen=True, kw_only=True):
    """`summary.json`."""

    out: str
    rounds: list[Round]
    accuracy: float | None
    """Held out, of the model that was made."""


def run_rft(recipe: Recipe, config: RFTConfig, run_id: str, console: Console) -> RFTSummary:
    """All rounds, as far as they are not done. Raises RFTError; KeyboardInterrupt after the sampling run has ended in order."""
    return _RFT(recipe, config, run_id, console).run()


class _RFT:
    def __init__(self, recipe: Recipe, config: RFTConfig, run_id: str, console: Console) -> None:
        self._recipe, self._config, self._run_id, self._console = recipe, config, run_id, console
        self._folder = RunFolder(Path(recipe.run.folder).resolve() / f"{recipe.run.name}-rft")
        self._out = Path(config.out).resolve()

    def run(self) -> RFTSummary:
        self._open()
        with held(self._folder, self._run_id):
            rounds = [self._round(number) for number in range(1, self._config.rounds + 1)]
            accuracy = self._measure(RESULT, str(self._out)) if self._measures else None
            summary = RFTSummary(out=str(self._out), rounds=rounds, accuracy=accuracy)
            base.write(self._folder.summary, msgspec.json.format(msgspec.json.encode(summary)))
        return summary

    @property
    def _measures(self) -> bool:
        return self._config.evaluate and bool(self._recipe.evaluation.source)

    def _open(self) -> None:
        """A new folder, or that of a call before with the same recipe."""
        folder, tables = self._folder, msgspec.json.encode(dump_recipe(self._recipe))
        if folder.path.exists():
            if not folder.recipe.is_file() or msgspec.json.decode(
                folder.recipe.read_bytes()
            ) != msgspec.json.decode(tables):
                raise RFTError(
                    f"{folder.path} is of a call with another recipe: repeat that one to go on with it, or choose another "
                    "run.name, or remove the folder"
                )
            if not folder.summary.is_file():
                self._console.print(f"goes on in {folder.path}", highlight=False, soft_wrap=True)
                return
        if self._out.exists():
            raise RFTError(f"rft.out = {self._config.out} is there already: remove it or choose another")
        if folder.path.exists():
            raise RFTError(
                f"{folder.path} is done, but its model {self._out} is gone: remove the folder to make it anew"
            )
        folder.path.mkdir(parents=True)
        base.write(folder.recipe, tables)

    # ---- a round -------------------------------------------------------------------------------------------------

    def _round(self, number: int) -> Round:
        model = self._recipe.model.path if number == 1 else str(self._model(number - 1))
        folder = RunFolder(self._folder.path / f"round-{number}")
        samples = self._samples(folder, model, number)
        chosen = kept(samples, self._config)
        if not chosen:
            raise RFTError(_nothing(samples, self._config, number))
        rft_files.write(chosen, folder.path / "kept.parquet")
        settings = self._config.sft(model, len(chosen), number)
        self._console.print(
            f"round {number}: {len(chosen):,} of {len(samples):,} answers are kept, for {len({s.prompt_id for s in chosen}):,} "
            f"prompts; {settings.steps} steps on them",
            highlight=False,
            soft_wrap=True,
        )
        if not self._model(number).exists():
            examples = _pairs(chosen, self._config.seed)
            imitate(self._recipe, settings, examples, self._model(number), self._console, f"round {number}")
        accuracy = _accuracy(folder)
        return Round(
            model=model,
            accuracy=accuracy,
            samples=len(samples),
            reward_mean=sum(sample.reward for sample in samples) / len(samples),
            prompts=len({sample.prompt_id for sample in samples}),
            prompts_kept=len({sample.prompt_id for sample in chosen}),
            kept=len(chosen),
            steps=settings.steps,
        )

    def _model(self, number: int) -> Path:
        return self._out if number == self._config.rounds else self._folder.path / f"round-{number}" / "model"

    def _samples(self, folder: RunFolder, model: str, number: int) -> Sequence[Sample]:
        file = folder.path / "samples.parquet"
        if not file.exists():
            self._start(folder, self._sampling(folder, model, number))
            rft_files.write(rft_files.scored(folder.rollouts), file)
        return rft_files.read(file)

    def _measure(self, name: str, model: str) -> float | None:
        folder = RunFolder(self._folder.path / name)
        if _accuracy(folder) is None:
            self._start(folder, self._sampling(folder, model, 1), "--only-measure")
        return _accuracy(folder)

    # ---- the sampling run ----------------------------------------------------------------------------------------

    def _sampling(self, folder: RunFolder, model: str, number: int) -> Recipe:
        recipe, config, prompts = self._recipe, self._config, self._recipe.prompts
        fields = (prompts.prompt_field, prompts.answer_field)
        size = open_rows(config.source or prompts.source, fields, prompts.task, prompts.seed).size
        wanted = config.prompts if size is None else min(config.prompts, size)
        derived = sampling_recipe(
            recipe,
            config,
            folder=str(folder.path.parent),
            name=folder.path.name,
            model=model,
            round_number=number,
            prompts=wanted,
        )
        return recipe_from(dump_recipe(derived), f"the sampling of {folder.path.name}")

    def _start(self, folder: RunFolder, recipe: Recipe, *flags: str) -> None:
        """Waits for the run's end; Ctrl-C ends it in order. Raises RFTError where it failed."""
        folder.logs.mkdir(parents=True, exist_ok=True)
        folder.write_recipe(recipe)
        module = [sys.executable, "-P", "-m", "asyncrl.runtime.rft_sampling"]
        command = [*module, str(folder.path), self._run_id, str(os.getpid()), *flags]
        child = subprocess.Popen(command)
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait(_STOP_S)
            raise
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise RFTError(
                f"{folder.path.name} ended with exit code {code}; why is above, and in {folder.logs}"
            )


def _pairs(chosen: Sequence[Sample], seed: int) -> Iterator[Pair]:
    """Endless, each pass in another order. Ends when the caller stops asking."""
    for epoch in itertools.count():
        for place in range(len(chosen)):
            sample = chosen[permuted(place, len(chosen), f"{seed}/{epoch}")]
            yield sample.prompt_tokens, sample.tokens, sample.sampled


def _nothing(samples: Sequence[Sample], config: RFTConfig, number: int) -> str:
    good = [sample for sample in samples if sample.reward >= config.min_reward]
    if good:
        return (
            f"round {number}: {len(good)} of {len(samples)} answers score, and none of them ended by itself: raise "
            "sampling.max_new_tokens"
        )
    best = max((sample.reward for sample in samples), default=float("nan"))
    return (
        f"round {number}: none of {len(samples)} answers is kept (rft.min_reward = {config.min_reward}, the best reward is "
        f"{best:g}): lower it, sample more, or begin with a better model"
    )


def _accuracy(folder: RunFolder) -> float | None:
    """The last one that was measured there."""
    found = [fact for fact in read_facts(folder.metrics) if isinstance(fact, Evaluation)]
    return found[-1].accuracy.value if found else None
