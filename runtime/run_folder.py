"""The folder of one run, and where each thing lies in it. Called by launch, the CLI and every part."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec

from asyncrl.recipes import Recipe, dump_recipe, recipe_from


class RunFolder:
    """`runs/NAME`: recipe.json, metrics.jsonl, summary.json, report.png, rollouts/SHARD/ (Arrow), logs/, model/, and what the
    parts find one another by: keys/ (its owner's alone) and endpoints/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.report = path / "report.png"
        self.rollouts = path / "rollouts"
        self.logs = path / "logs"
        self.model = path / "model"
        self.keys = path / "keys"
        self.control = path / "endpoints" / "control"

    def log(self, part: str) -> Path:
        return self.logs / f"{part}.log"

    def endpoint(self, shard: int) -> Path:
        """Where that shard of the buffer listens, from its first start on."""
        return self.path / "endpoints" / f"buffer-{shard}"

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
    folder.recipe.write_bytes(msgspec.json.format(msgspec.json.encode(dump_recipe(recipe)), indent=2))
    return folder
