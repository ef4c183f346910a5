"""The folder of one run, and where each thing lies in it. Called by launch, the CLI and every part."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from asyncrl.buffer import base
from asyncrl.recipes import Recipe, dump_recipe, recipe_from
from asyncrl.weight_sync.shm import remove_leftovers

_LOOK_S = 0.2


class RunIsUp(RuntimeError):
    """Another process runs in the folder."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run was launched: what its recipe names is found from there."""

    recipe: str
    """The file, absolute."""
    cwd: str


class RunFolder:
    """`runs/NAME`: recipe.json, metrics.jsonl, summary.json, report.png, rollouts/SHARD/ (Arrow), checkpoints/, logs/, model/, and
    what the parts find one another by: keys/ (its owner's alone) and endpoints/. `lock` is held while the run is up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.report = path / "report.png"
        self.rollouts = path / "rollouts"
        self.logs = path / "logs"
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.origin = path / "origin.json"
        self.lock = path / "lock"
        self.keys = path / "keys"
        self.control = path / "endpoints" / "control"

    def log(self, part: str) -> Path:
        return self.logs / f"{part}.log"

    def endpoint(self, shard: int) -> Path:
        """Where that shard of the buffer listens, from its first start on."""
        return self.path / "endpoints" / f"buffer-{shard}"

    def forget_endpoints(self) -> None:
        """The buffer's next processes listen at new ones: nobody of a start before this one finds them."""
        for path in self.control.parent.glob("buffer-*"):
            path.unlink()

    def write_recipe(self, recipe: Recipe) -> None:
        base.write(self.recipe, msgspec.json.format(msgspec.json.encode(dump_recipe(recipe)), indent=2))

    def read_recipe(self) -> Recipe:
        return recipe_from(msgspec.json.decode(self.recipe.read_bytes()), str(self.recipe))


def new_run_folder(recipe: Recipe) -> RunFolder:
    """Makes `FOLDER/NAME`, or `NAME-2`, `NAME-3`, ... where that is taken, and writes the recipe as run."""
    parent = Path(recipe.run.folder).resolve()
    parent.mkdir(parents=True, exist_ok=True)
    for count in itertools.count(1):
        path = parent / (recipe.run.name if count == 1 else f"{recipe.run.name}-{count}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        break
    folder = RunFolder(path)
    folder.logs.mkdir()
    folder.write_recipe(recipe)
    return folder


@contextlib.contextmanager
def held(folder: RunFolder, run_id: str, patience_s: float = 0.0) -> Iterator[None]:
    """This process runs in the folder; the system lets go of it with the process, however that ends.

    Waits at most `patience_s` for the parts of a run that was killed, which Ray's own processes end, and removes the shared
    memory that it left. Raises RunIsUp.
    """
    descriptor = os.open(folder.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _taken(descriptor):
            raise RunIsUp(f"run {folder.path.name} is up: another process holds {folder.lock}")
        wait_for_shards(folder, patience_s)
        if before := os.pread(descriptor, 200, 0).decode():
            remove_leftovers(before)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, run_id.encode(), 0)
        yield
    finally:
        os.close(descriptor)


def wait_for_shards(folder: RunFolder, patience_s: float) -> None:
    """Waits for each of the buffer's processes to let go of its log; unblocked by their ends. Raises RunIsUp after that time."""
    deadline = time.monotonic() + patience_s
    for lock in sorted(folder.rollouts.glob("*/lock")):
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            while not _taken(descriptor):
                if time.monotonic() > deadline:
                    raise RunIsUp(
                        f"a process of an earlier start of run {folder.path.name} still holds {lock} (`fuser {lock}` names it): "
                        "end it, then ask again"
                    )
                time.sleep(_LOOK_S)
        finally:
            os.close(descriptor)


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
