"""Held-out evaluation of a run: when it is due, asking the engines of the fleet, and what is told of it.

    before training --> [every `every_steps` steps, beside training: one at a time] --> the last one ends --> after training

- An evaluation deals its prompts out to the engines that are up; what a dying engine leaves undone goes to the others.
- During training it goes on beside the learner's steps, and says which versions answered; with `one_version` the learner's
  next step waits for it, so that no weights are published meanwhile (rollouts go on).
- One that is due while the one before is under way is left out; one that passes its deadline is given up. Both are told of
  (`EvaluationMissed`), and training goes on. Only the one before training ends the run when it fails: what breaks it would
  cost every rollout, and nothing is lost yet. A mistake of the recipe ends any at once, and the run with it.
On the supervisor's event loop; called by the supervisor.
"""

from __future__ import annotations

import asyncio
import time

import msgspec

from asyncrl.generators.evaluation import Asking, HeldOutAnswer
from asyncrl.generators.evaluation_config import EvaluationConfig
from asyncrl.generators.prompts import Prompt
from asyncrl.recipes import Recipe
from asyncrl.runtime.deaths import ends_the_run
from asyncrl.runtime.engine_keeper import EngineKeeper
from asyncrl.runtime.fleet import Fleet
from asyncrl.runtime.held_out_results import NothingScored, evaluation_of
from asyncrl.runtime.observer import Observer
from asyncrl.runtime.watch import PartFailed

_LOOK_S = 0.5
_FAILURES = (PartFailed, NothingScored)


class Evaluations:
    """Those of one run. `before`, `after_step` after each step, `settle`, `after`; `close` at the end in any case."""

    def __init__(self, recipe: Recipe, prompts: list[Prompt], observer: Observer) -> None:
        self._config: EvaluationConfig = recipe.evaluation
        self._answer_tokens = recipe.held_out_answer_tokens
        self._last_step = recipe.run.steps
        self._prompts, self._observer = prompts, observer
        self._under_way: asyncio.Task[None] | None = None
        if prompts:
            observer.evaluating()

    @property
    def wanted(self) -> bool:
        return bool(self._prompts)

    async def before(self, fleet: Fleet, step: int) -> None:
        """Waits for its end. Raises PartFailed or NothingScored."""
        await self._evaluate(fleet, step)

    async def after(self, fleet: Fleet, step: int) -> None:
        """Waits for its end; raises PartFailed for a mistake of the recipe alone."""
        await self._try(fleet, step)

    async def after_step(self, fleet: Fleet, step: int) -> None:
        """Begins the evaluation that is due, if one is; with `one_version` waits for its end."""
        every = self._config.every_steps
        if not self.wanted or not every or step % every or step >= self._last_step:
            return
        if self._under_way is not None and not self._under_way.done():
            self._observer.evaluation_missed(step, "the one before was still under way")
            return
        await self.settle()  # what it may have raised
        self._under_way = asyncio.create_task(self._try(fleet, step), name=f"evaluation at step {step}")
        if self._config.one_version:
            await self.settle()

    async def settle(self) -> None:
        """Waits for the one that is under way, which its deadline ends."""
        task, self._under_way = self._under_way, None
        if task is not None:
            await task

    async def close(self) -> None:
        """What is under way is given up."""
        task, self._under_way = self._under_way, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _try(self, fleet: Fleet, step: int) -> None:
        try:
            await self._evaluate(fleet, step)
        except _FAILURES as error:
            if isinstance(error, PartFailed) and ends_the_run(error.raised):
                raise
            self._observer.evaluation_missed(step, str(error).partition("\n")[0])

    async def _evaluate(self, fleet: Fleet, step: int) -> None:
        if not self.wanted:
            return
        began = time.monotonic()
        self._observer.evaluating(step)
        try:
            version = self._observer.version
            answers = await ask(fleet, self._prompts, self._config, self._answer_tokens, str(step), version)
            took_s = time.monotonic() - began
            found = evaluation_of(
                self._config, answers, step=step, seconds=self._observer.seconds, took_s=took_s
            )
            self._observer.evaluated(found)
        finally:
            self._observer.evaluating()


async def ask(
    fleet: Fleet,
    prompts: list[Prompt],
    config: EvaluationConfig,
    max_new_tokens: int,
    label: str,
    version: int,
) -> list[list[HeldOutAnswer]]:
    """The answers to each prompt, by `version` or later ones. Waits for engines to be up; unblocked by their keepers. Raises
    PartFailed at the deadline, with what the last engine that was lost said, and at once for a mistake of the recipe."""
    found: dict[int, list[HeldOutAnswer]] = {}
    deadline, failure, rounds = time.monotonic() + config.timeout_s, None, 0
    asking = Asking(
        label=label,
        rollouts_per_prompt=config.rollouts_per_prompt,
        temperature=config.temperature,
        max_new_tokens=max_new_tokens,
        slots=config.slots_per_engine,
        version=version,
    )
    try:
        async with asyncio.timeout(config.timeout_s):
            while left := [i for i in range(len(prompts)) if i not in found]:
                up = [keeper for keeper in fleet.keepers() if keeper.actor is not None]
                if not up:
                    await asyncio.sleep(_LOOK_S)
                    continue
                rounds += 1
                shares = [share for i in range(len(up)) if (share := left[i :: len(up)])]
                own = msgspec.structs.replace(asking, label=f"{label}.{rounds}")
                calls = (
                    _answers(fleet, keeper, [prompts[i] for i in share], own, deadline)
                    for keeper, share in zip(up, shares, strict=False)
                )
                for share, result in zip(shares, await asyncio.gather(*calls), strict=True):
                    if isinstance(result, PartFailed):
                        if ends_the_run(result.raised):
                            raise result
                        failure = result
                    else:
                        found.update(zip(share, result, strict=True))
    except TimeoutError:
        late = (
            f"the held-out evaluation was not done within {config.timeout_s:.0f} s (evaluation.timeout_s): "
            f"{len(found)} of {len(prompts)} prompts are answered"
        )
        raise (failure or PartFailed(late)) from None
    return [found[i] for i in range(len(prompts))]


async def _answers(
    fleet: Fleet, keeper: EngineKeeper, prompts: list[Prompt], asking: Asking, deadline: float
) -> list[list[HeldOutAnswer]] | PartFailed:
    """Or what its engine died of, a little later: its keeper is about to find it dead.

    An engine without rollouts gives all that it has; asked past the deadline it stops by itself."""
    if not fleet.dispatching.is_set():
        asking = msgspec.structs.replace(asking, slots=keeper.pool.max_concurrency)
    call = keeper.actor.evaluate.remote(prompts, asking, deadline - time.monotonic())
    try:
        answers: list[list[HeldOutAnswer]] = await fleet.watch.outcome(keeper.engine_id, call)
        return answers
    except PartFailed as error:
        await asyncio.sleep(_LOOK_S)
        return error
