"""One round's sampling of `asyncrl rft`: a run without learner steps, in a process of its own.

    start as any run --> held-out accuracy --> admit one batch of prompts --> all of it scored --> end

Prompts, rollouts, scores and engines take the way of any run, so a round that was killed goes on with the log that it left: what
is scored stays, and partial answers go on from their prefix. Started by `rft` as `python -m asyncrl.runtime.rft_sampling FOLDER
RUN_ID`; the run's recipe is in its folder. Exit codes as of `asyncrl launch`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from rich.console import Console

from asyncrl.buffer import BufferClient
from asyncrl.runtime.attempt import Run, attempt
from asyncrl.runtime.fleet import Fleet
from asyncrl.runtime.guard import follow_parent
from asyncrl.runtime.metrics import last_seconds
from asyncrl.runtime.processes import adopt_orphans
from asyncrl.runtime.run_folder import RunFolder, held
from asyncrl.runtime.supervisor import Supervisor
from asyncrl.runtime.view import open_view

_LOOK_S = 0.25
_PATIENCE_S = 30.0
"""For the buffer's processes of a round that was killed to let go of the log."""


class Sampling(Supervisor):
    """Its one step ends when the batch is scored, and hands nothing over."""

    WORK = "sampling"

    async def _step(self, step: int, client: BufferClient, fleet: Fleet) -> bool:
        """Waits for the engines and the rewards; ends when every rollout is scored, or drained, or when nothing moves."""
        wanted = self.recipe.rollouts_per_step
        while True:
            states = (await client.status()).states
            if states["scored"] >= wanted or (self.draining and await self._is_drained(client)):
                return False
            self.observer.check_progress(self.recipe.run.stall_timeout_s)
            await asyncio.sleep(_LOOK_S)

    async def _checkpoint_at_end(self) -> None:
        """The log is all that is kept."""

    async def _evaluate_after(self, fleet: Fleet) -> None:
        """The model is the same as before."""

    async def _save(self) -> None:
        """As above."""

    async def _save_in_mid_run(self) -> None:
        """As above."""


class Measuring(Sampling):
    """Only the held-out accuracy of a model."""

    async def _step(self, step: int, client: BufferClient, fleet: Fleet) -> bool:
        return False

    def feed(self) -> None:
        """No prompt is wanted."""


def main(folder: Path, run_id: str, *, only_measure: bool) -> int:
    console = Console()
    found = RunFolder(folder)
    with held(found, run_id, _PATIENCE_S):
        recipe = found.read_recipe()
        view = open_view(found.path.name, console, bound=0, plain=recipe.telemetry.plain)
        run = Run(
            recipe=recipe,
            folder=found,
            run_id=run_id,
            view=view,
            began=time.monotonic() - last_seconds(found.metrics),
            supervisor=Measuring if only_measure else Sampling,
        )
        try:
            outcome = attempt(run, None).outcome
        finally:
            view.close()
    return {"finished": 0, "drained": 0, "stopped": 130}.get(outcome, 1)


if __name__ == "__main__":
    adopt_orphans()
    follow_parent(int(sys.argv[3]))
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], only_measure=sys.argv[4:] == ["--only-measure"]))
