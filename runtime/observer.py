"""Turns what the parts report into facts, and hands them to the view and the metrics log.

The supervisor calls it, on its event loop; it decides nothing but whether the run still moves.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from asyncrl.buffer.batches import OVER_STALE
from asyncrl.buffer.records import Recovery
from asyncrl.buffer.wire import Report
from asyncrl.recipes import Recipe
from asyncrl.runtime import facts
from asyncrl.runtime.held_out_results import sentence
from asyncrl.runtime.learner_part import StepOutcome
from asyncrl.runtime.metrics import MetricsLog
from asyncrl.runtime.reported import Waits, buffer_facts, step_facts
from asyncrl.runtime.view import View
from asyncrl.weight_sync.report import SyncReport

_WEIGHTS_KEPT = 4
"""Versions whose digests are shown."""


class RunStalled(RuntimeError):
    """Nothing was generated and no step was made for too long."""


class Observer:
    """`learner_state` is set by the supervisor, which is the one who knows."""

    def __init__(self, recipe: Recipe, view: View, metrics: MetricsLog, began: float) -> None:
        self.learner_state: facts.LearnerState = "starting"
        self.state: facts.RunState = "starting"
        self.last: facts.Snapshot | None = None
        """The newest, and the one before it: who waits for whom is told from the two."""
        self.before: facts.Snapshot | None = None
        self.phase_seconds: dict[str, float] = defaultdict(float)
        self._recipe, self._view, self._metrics, self._began = recipe, view, metrics, began
        self._phase = ""
        self._step = 0
        self._version = -1
        self._weights: dict[int, str] = {}
        self._learner_tokens_per_s = 0.0
        self._engines: list[facts.EngineFacts] = []
        self._pools: list[facts.PoolFacts] = []
        self._waits = Waits()
        self._held_out = facts.HeldOut()
        self._recoveries = 0
        self._disk_full = False
        self.stale_rollouts = 0
        """Since launch: as good as masked (by their tokens), or dropped, for staleness."""
        self._stale_dropped = 0
        self.step_s = 0.0
        """The learner's last step, from the wait for its batch to the last engine's confirmation."""
        self._moved = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows and times a phase; the same name may come again."""
        self._phase = name
        self._view.phase(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self.phase_seconds[name] += time.monotonic() - began

    @property
    def steps_done(self) -> int:
        return self._step

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def note(self, text: str) -> None:
        self._view.note(text)

    @property
    def version(self) -> int:
        """The learner's; 0 before the first."""
        return max(self._version, 0)

    def evaluating(self, step: int = -1) -> None:
        """One is under way that began after so many steps; -1: none is."""
        self._held_out = msgspec.structs.replace(self._held_out, wanted=True, under_way_step=step)
        self._moved = time.monotonic()

    def evaluated(self, found: facts.Evaluation) -> None:
        self._held_out = msgspec.structs.replace(
            self._held_out,
            step=found.step,
            accuracy=found.accuracy.value,
            standard_error=found.accuracy.standard_error,
        )
        self._metrics.write(found)
        self._view.note(sentence(found))

    def evaluation_missed(self, step: int, reason: str) -> None:
        self._metrics.write(
            facts.EvaluationMissed(seconds=self.seconds, step=step, version=self.version, reason=reason)
        )
        self._view.note(f"no held-out evaluation at step {step}: {reason}")

    def goes_on_from(self, step: int, version: int) -> None:
        """A checkpoint: so many steps are done."""
        self._step, self._version = step, version

    def published(self, report: SyncReport) -> None:
        """A version is live, or on its way from engine to engine."""
        self._weights[report.version] = report.digest
        self._weights = dict(sorted(self._weights.items())[-_WEIGHTS_KEPT:])

    def stepped(
        self, step: int, outcome: StepOutcome, waited_s: float, checkpoint_stall_s: float = 0.0
    ) -> None:
        self._step, self._version = step, outcome.sync.version
        self.published(outcome.sync)
        self.step_s = waited_s + outcome.train_s + outcome.publish_s
        self._learner_tokens_per_s = outcome.metrics.tokens_per_s
        self._moved = time.monotonic()
        groups = self._recipe.prompts.prompts_per_step
        fact = step_facts(step, outcome, waited_s, self.seconds, groups, checkpoint_stall_s)
        self.stale_rollouts += math.ceil(fact.tokens_masked / max(1.0, fact.response_tokens_mean))
        self._metrics.write(fact)
        self._view.step(fact)

    def snapshot(
        self, report: Report, engines: list[facts.EngineFacts], pools: list[facts.PoolFacts]
    ) -> None:
        self._engines, self._pools = engines, pools
        self._version = max(self._version, report.version)
        if any(engine.tokens_per_s > 0 for engine in engines):
            self._moved = time.monotonic()
        self.buffer_report(report)

    def recovered(self, shard: int, found: Recovery | None) -> None:
        """A process of the buffer died and its next one goes on; `found` is what the log gave back."""
        self._recoveries += 1
        what = "its log was empty"
        if found is not None:
            what = (
                f"recovered {found.live_rollouts:,} rollouts with {found.live_tokens:,} tokens, "
                f"cut {found.cut_bytes:,} bytes"
            )
        self.note(f"buffer shard {shard} died; {what}")

    def buffer_report(self, report: Report) -> None:
        """A snapshot with the engines as they were last seen."""
        if bool(report.disk_full) != self._disk_full:
            self._disk_full = bool(report.disk_full)
            self.note(report.disk_full or "the buffer's disk has room again; the run goes on")
        dropped = report.counts.dropped.get(OVER_STALE, 0)
        self.stale_rollouts += max(0, dropped - self._stale_dropped)
        self._stale_dropped = dropped
        self._waits.add(report.waits_s, max(1, len(self._engines)))
        fact = self._snapshot(report)
        self.before, self.last = self.last, fact
        self._metrics.write(fact)
        self._view.update(fact)

    def check_progress(self, timeout_s: float) -> None:
        """Raises RunStalled with who waits for whom when nothing has moved for `timeout_s`; a paused run need not."""
        if self.state == "paused":
            self._moved = time.monotonic()
        still_s = time.monotonic() - self._moved
        if still_s <= timeout_s:
            return
        waits = ", ".join(f"{cause} ({seconds:.0f} s)" for cause, seconds in self._waits.mean_s.items())
        engines = ", ".join(f"{e.engine_id} {e.state} {e.slots_used}/{e.slots} slots" for e in self._engines)
        raise RunStalled(
            f"nothing was generated and no step was made for {still_s:.0f} s (run.stall_timeout_s): {waits}; {engines}"
        )

    def _snapshot(self, report: Report) -> facts.Snapshot:
        return facts.Snapshot(
            seconds=self.seconds,
            phase=self._phase,
            step=self._step,
            steps=self._recipe.run.steps,
            version=self._version,
            weights=self._weights,
            engines=self._engines,
            buffer=buffer_facts(report, self._recoveries),
            learner_state=self.learner_state,
            learner_tokens_per_s=self._learner_tokens_per_s,
            engine_tokens_per_s=sum(engine.tokens_per_s for engine in self._engines),
            waits=dict(self._waits.mean_s),
            state=self.state,
            pools=self._pools,
            held_out=self._held_out,
        )
