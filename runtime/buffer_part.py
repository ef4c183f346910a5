"""The buffer's process. Made by `placement` as a Ray actor; its wire is ZMQ, Ray only starts and watches it."""

from __future__ import annotations

from pathlib import Path

from asyncrl.buffer import BufferService
from asyncrl.recipes import Recipe
from asyncrl.runtime.part_log import write_log_to
from asyncrl.runtime.run_folder import RunFolder


class BufferPart:
    """Two threads of Ray's: one in `run`, one for short calls."""

    def __init__(self, recipe: Recipe, folder: str, host: str) -> None:
        run = RunFolder(Path(folder))
        write_log_to(run.log("buffer"))
        self._service = BufferService(
            config=recipe.buffer,
            staleness=recipe.staleness,
            prompts_per_step=recipe.prompts.prompts_per_step,
            rollouts_per_prompt=recipe.prompts.rollouts_per_prompt,
            log_folder=run.rollouts,
            host=host,
        )

    def endpoint(self) -> str:
        return self._service.endpoint

    def run(self) -> None:
        """Serves until it is told to stop."""
        self._service.run()
