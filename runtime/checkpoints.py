"""The checkpoints of a run on disk: which there are, which of them are whole, and which go.

    checkpoints/step-12/                      the learner's state, under this name from when it is written whole
                        run.json              written last of all, into it
    rollouts/SHARD/snapshot-00000012.json     the buffer's state at that step, which it keeps in its log

Invariants:
- A checkpoint counts when its `run.json` is there, and that is written when the buffer's snapshot and the learner's state are
  both whole. What is found without one is what a death left behind: it is never picked, and goes when its step comes again.
- An older checkpoint goes only when `keep` newer ones count; its `run.json` goes first.
Called by the launcher, by the supervisor (through `checkpointing`), and by the learner's ranks for where to write.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from asyncrl.buffer import base
from asyncrl.buffer.store import lacks_of_snapshot
from asyncrl.learner import checkpoint_folder
from asyncrl.runtime.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `run.json` says."""

    step: int
    """Learner steps done."""
    version: int
    """The weights' own; the engines run it when the run goes on."""
    frontier: int
    """Position of the first prompt that the buffer had not taken."""
    recipe_digest: str
    """Of the settings that a resume may not change (`recipes.resume_rules`)."""
    metrics_bytes: int
    """Length of metrics.jsonl: what lies behind was done after it."""
    learner: bool
    """False at step 0: the weights are those of `model.path`, and there is no optimizer state yet."""


class Checkpoints:
    """Those of one run. Reads and writes small files, but for `newest`, which reads all of the one that it finds."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def learner_state(self, step: int) -> Path:
        """Where the learner's state of `step` comes to lie."""
        return self._folder.checkpoints / checkpoint_folder.name_of(step)

    def make_room(self, step: int) -> None:
        """What a death left of `step` goes. Raises FileExistsError where there is a checkpoint that counts."""
        path = self.learner_state(step)
        if self._manifest(step).is_file():
            raise FileExistsError(f"{path} is a whole checkpoint: expected none of step {step} yet")
        if path.exists():
            checkpoint_folder.remove(path)

    def count(self, manifest: Manifest, keep: int) -> None:
        """From now on it counts; of all that do, the newest `keep` stay."""
        self.learner_state(manifest.step).mkdir(parents=True, exist_ok=True)
        base.write(self._manifest(manifest.step), msgspec.json.encode(manifest) + b"\n")
        for step in self.steps()[:-keep]:
            self._remove(step)

    def steps(self) -> tuple[int, ...]:
        """Of those that count, ascending."""
        return tuple(sorted(step for step in self._all() if self._manifest(step).is_file()))

    def newest(self) -> Manifest | None:
        """The newest that can be gone on from; damaged ones are passed over, and logged. None where there is none."""
        for step in reversed(self.steps()):
            manifest = self.read(step)
            lacks = self._lacks(manifest)
            if not lacks:
                return manifest
            logger.warning("checkpoint of step %d is passed over: %s", step, lacks)
        return None

    def read(self, step: int) -> Manifest:
        """Raises ValueError that names the file if it holds something else."""
        path = self._manifest(step)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Manifest)
        except msgspec.DecodeError as error:
            raise ValueError(
                f"{path}: expected a checkpoint's run.json: {error}; was it written by another version of asyncrl?"
            ) from error

    def forget_after(self, step: int) -> None:
        """The run goes on from `step`: what came after it is done again, and is in nobody's way."""
        for other in self._all():
            if other > step or not self._manifest(other).is_file():
                self._remove(other)

    def _lacks(self, manifest: Manifest) -> str:
        """What is wrong with it; empty where it is whole."""
        for shard in sorted(path for path in self._folder.rollouts.iterdir() if path.name.isdigit()):
            if lacks := lacks_of_snapshot(shard, manifest.step):
                return lacks
        try:
            if manifest.learner:
                checkpoint_folder.check(self.learner_state(manifest.step))
        except checkpoint_folder.BrokenCheckpoint as error:
            return str(error)
        return ""

    def _all(self) -> list[int]:
        found = map(checkpoint_folder.step_of, checkpoint_folder.checkpoints(self._folder.checkpoints))
        return [step for step in found if step is not None]

    def _remove(self, step: int) -> None:
        checkpoint_folder.remove(self.learner_state(step))

    def _manifest(self, step: int) -> Path:
        return self.learner_state(step) / "run.json"
