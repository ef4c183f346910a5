"""`asyncrl export`: which checkpoint, where to, and what is told when there is none."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from asyncrl.learner.checkpoint_folder import name_of
from asyncrl.learner.config import LearnerConfig
from asyncrl.learner.step import Learner
from asyncrl.learner.tiny_model import character_tokenizer, new_model
from asyncrl.recipes import dump_recipe
from asyncrl.recipes.load import load_recipe
from asyncrl.runtime.cli import main
from asyncrl.runtime.cli_export import NothingToExport, choose, model_path_of
from asyncrl.runtime.run_folder import Origin, RunFolder
from tests.learner_states import write_state

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def _write(folder: RunFolder, step: int) -> Path:
    return write_state(folder.checkpoints / name_of(step))


def test_the_newest_or_the_one_that_was_asked_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(NothingToExport, match="no whole checkpoint"):
        choose(folder, None)
    paths = {step: _write(folder, step) for step in (5, 10)}
    (folder.checkpoints / name_of(0)).mkdir()  # of the buffer alone
    assert choose(folder, None) == (paths[10], 10)
    assert choose(folder, 5) == (paths[5], 5)
    for step in (0, 7):
        with pytest.raises(
            NothingToExport, match=f"of step {step} with weights; it has those of steps 5, 10$"
        ):
            choose(folder, step)


def test_a_relative_model_path_is_from_where_the_run_was_launched(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (tmp_path / "elsewhere" / "model").mkdir(parents=True)
    assert model_path_of(folder, "model") == "model"
    origin = Origin(recipe="recipe.toml", cwd=str(tmp_path / "elsewhere"))
    folder.origin.write_bytes(msgspec.json.encode(origin))
    assert model_path_of(folder, "model") == str(tmp_path / "elsewhere" / "model")
    assert model_path_of(folder, "some/hub-name") == "some/hub-name"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(base)
    new_model(tokenizer, hidden_size=64, layers=2, heads=2, max_tokens=128, seed=3).save_pretrained(base)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    recipe = load_recipe(RECIPES / "quickstart.toml", [f"model.path={base}"])
    folder.recipe.write_bytes(msgspec.json.encode(dump_recipe(recipe)))
    assert main(["export", str(folder.path)]) == 2
    assert "no whole checkpoint" in capsys.readouterr().err
    learner = Learner(LearnerConfig(device="cpu"), base, 1.0)
    try:
        learner.checkpoint(folder.checkpoints / name_of(3))
        assert learner.checkpoint_finished(60)
    finally:
        learner.close()
    assert main(["export", str(folder.path), "--dtype", "bfloat16"]) == 0
    out = folder.path / "model-step-3"
    assert f"wrote {out}: the model after step 3, in bfloat16" in capsys.readouterr().out
    assert (out / "model.safetensors").is_file() and (out / "tokenizer_config.json").is_file()
    assert main(["export", str(folder.path)]) == 2
    assert "never overwritten" in capsys.readouterr().err
