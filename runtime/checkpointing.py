"""When a run takes checkpoints, and how one comes to count.

    step trained, published, committed --> buffer's snapshot --> learner's state in memory --> training goes on
                                                  state is on the disk, some time later --> `run.json`: it counts

- The learner's ranks take it between two steps: nothing is trained or handed over between the snapshot and the state.
- One is written at a time: the next one that is due waits for it (`Learner.checkpoint`).
- One that cannot be written is told of, and training goes on: those before are as they were.
- Step 0 has one as well, of the buffer alone: the model is where it was. So every run can go on from something.
On the supervisor's event loop; called by the supervisor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from asyncrl.learner.checkpoint import CheckpointFailed
from asyncrl.recipes import Recipe
from asyncrl.recipes.resume_rules import fixed_digest
from asyncrl.runtime.checkpoints import Checkpoints, Manifest
from asyncrl.runtime.learner_part import Taken
from asyncrl.runtime.learner_ranks import LearnerRanks
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.watch import PartFailed

_LOOK_S = 0.25


class Checkpointing:
    """`begin` once prompts may come, `take` between two steps, `finish` at the end; `keep` beside them."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, ranks: LearnerRanks, note: Callable[[str], None]
    ) -> None:
        self._recipe, self._folder, self._ranks, self._note = recipe, folder, ranks, note
        self._checkpoints = Checkpoints(folder)
        self._pending: dict[int, Manifest] = {}
        """By step: taken, and not yet known to be written."""
        self._counting = asyncio.Lock()

    def due(self, step: int) -> bool:
        """After this step: the last one is always."""
        every = self._recipe.checkpoints.every_steps
        return step == self._recipe.run.steps or bool(every and step % every == 0)

    async def begin(self) -> None:
        """That of step 0, where the run begins there."""
        if not self._checkpoints.steps():
            taken = await self._ranks.first("checkpoint", (), False)
            await self._count(self._manifest(taken, learner=False))

    async def take(self) -> float:
        """Of the step that the learner has done; returns the seconds for which training stood still. Nothing is done where that
        step has one."""
        began = time.monotonic()
        step = await self._ranks.first("steps_done")
        known = (*self._checkpoints.steps(), *self._pending)
        if step not in known:
            taken = await self._try("checkpoint", known, True)
            if taken is not None:
                self._pending[step] = self._manifest(taken, learner=True)
        return time.monotonic() - began

    async def keep(self) -> None:
        """Has each count when it is written. Waits for the ranks' own threads; ends when cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._count_written()

    async def finish(self, timeout_s: float) -> None:
        """Waits for what is under way to be written; the learner's answer or the deadline ends that. Raises PartFailed."""
        if self._pending:
            await self._try("checkpoint_finished", timeout_s)
            await self._count_written()
        for step in self._pending:
            self._note(
                f"the checkpoint of step {step} was not written within {timeout_s:g} s, and does not count"
            )

    async def _try(self, method: str, *arguments: Any) -> Any:
        """None where a checkpoint could not be written, which is noted."""
        try:
            return await self._ranks.everyone(method, *arguments)
        except PartFailed as error:
            if not isinstance(error.raised, CheckpointFailed):
                raise
            await self._count_written()
            self._pending.clear()  # what is not there now will not come
            self._note(f"a checkpoint was not written, those before are as they were: {error.cause}")
            return None

    async def _count_written(self) -> None:
        async with self._counting:
            for step, manifest in sorted(self._pending.items()):
                if self._checkpoints.learner_state(step).is_dir():
                    await self._count(manifest)
                    del self._pending[step]

    async def _count(self, manifest: Manifest) -> None:
        try:
            await asyncio.to_thread(self._checkpoints.count, manifest, self._recipe.checkpoints.keep)
        except OSError as error:
            self._note(f"the checkpoint of step {manifest.step} does not count: {error}")

    def _manifest(self, taken: Taken, *, learner: bool) -> Manifest:
        metrics = self._folder.metrics
        return Manifest(
            step=taken.step,
            version=taken.version,
            frontier=taken.frontier,
            recipe_digest=fixed_digest(self._recipe),
            metrics_bytes=metrics.stat().st_size if metrics.exists() else 0,
            learner=learner,
        )
