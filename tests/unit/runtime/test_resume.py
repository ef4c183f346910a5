"""From what is typed to a run that goes on: which folder, which recipe, which checkpoint, and when not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asyncrl.buffer import base
from asyncrl.recipes import RecipeError, load_recipe
from asyncrl.recipes.resume_rules import fixed_digest
from asyncrl.runtime.checkpoints import Checkpoints, Manifest
from asyncrl.runtime.resume import (
    NothingToResume,
    checkpoint_of,
    go_where_it_was_launched,
    newest_run,
    recipe_as_run,
)
from asyncrl.runtime.run_folder import RunIsUp, held, new_run_folder
from asyncrl.weight_sync.shm import slot_path
from tests.buffers import buffer_service

QUICKSTART = Path(__file__).resolve().parents[3] / "recipes" / "quickstart.toml"
ASYNCRL = [sys.executable, "-P", "-m", "asyncrl.runtime.cli"]


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", *overrides):
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        mine = [f"run.name={name}", f"run.folder={tmp_path}/runs", f"model.path={model}"]
        recipe = load_recipe(QUICKSTART, [*mine, *overrides])
        return new_run_folder(recipe), recipe

    return make


def count(folder, recipe, step):
    """A checkpoint of the buffer alone: the learner's part is tested where it is written."""
    with buffer_service(folder.path, prompts_per_step=8) as (_, client):
        client.publish(0)
        client.snapshot(step)
    manifest = Manifest(
        step=step,
        version=step,
        frontier=0,
        recipe_digest=fixed_digest(recipe),
        metrics_bytes=0,
        learner=False,
    )
    Checkpoints(folder).count(manifest, 2)


def test_the_recipe_is_that_of_the_run_with_what_may_be_changed(make_run):
    folder, _ = make_run("run", "learner.learning_rate=1e-5")
    again = recipe_as_run(folder, ["run.steps=900", "learner.ranks=2"])
    assert (again.run.steps, again.learner.ranks, again.learner.learning_rate) == (900, 2, 1e-5)
    with pytest.raises(RecipeError, match=r"--set: 1 problem\n  prompts\.seed = 4: was 0 when the run began"):
        recipe_as_run(folder, ["prompts.seed=4"])
    with pytest.raises(RecipeError, match="unknown key"):
        recipe_as_run(folder, ["prompts.sead=4"])


def test_a_run_goes_on_from_its_checkpoint_unless_it_is_finished(make_run):
    folder, recipe = make_run("run", "run.steps=4")
    with pytest.raises(NothingToResume, match="no checkpoint to go on from") as caught:
        checkpoint_of(folder, recipe)
    assert caught.value.exit_code == 1
    count(folder, recipe, 4)
    with pytest.raises(NothingToResume, match=r"is finished: 4 of 4 .*--set run\.steps=8") as caught:
        checkpoint_of(folder, recipe)
    assert caught.value.exit_code == 0
    assert checkpoint_of(folder, recipe_as_run(folder, ["run.steps=5"])).step == 4


def test_a_recipe_that_was_changed_by_hand_is_found(make_run):
    folder, recipe = make_run()
    count(folder, recipe, 4)
    folder.recipe.write_text(folder.recipe.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(NothingToResume, match="belongs to another recipe"):
        checkpoint_of(folder, recipe_as_run(folder, []))


def test_of_several_runs_of_a_name_the_newest_with_a_checkpoint_goes_on(make_run):
    folders = [make_run() for _ in range(3)]
    assert [folder.path.name for folder, _ in folders] == ["run", "run-2", "run-3"]
    recipe = folders[0][1]
    other, other_recipe = make_run("run-9")  # another name, though it looks like a count
    count(other, other_recipe, 2)
    assert newest_run(recipe) is None
    for folder, _ in folders[:2]:
        count(folder, recipe, 2)
    assert newest_run(recipe).path.name == "run-2"
    assert newest_run(other_recipe).path.name == "run-9"


def test_relative_paths_are_those_of_the_launch(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = make_run()
    with pytest.raises(NothingToResume, match=r"origin\.json"):
        go_where_it_was_launched(folder)
    (tmp_path / "there").mkdir()
    base.write(folder.origin, f'{{"recipe": "/r/x.toml", "cwd": "{tmp_path}/there"}}'.encode())
    assert go_where_it_was_launched(folder) == Path("/r/x.toml")
    assert Path.cwd() == tmp_path / "there"


HOLD = "import sys, time; from pathlib import Path; from asyncrl.runtime.run_folder import RunFolder, held\n"


def test_a_run_that_is_up_is_refused_and_one_that_was_killed_is_free(make_run, tmp_path):
    folder, _ = make_run()
    one = f"test-{os.getpid()}"
    left = slot_path(one, 0)  # of its weights, in shared memory
    program = f"{HOLD}with held(RunFolder(Path(sys.argv[1])), sys.argv[2]): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-P", "-c", program, folder.path, one], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        left.touch()
        with pytest.raises(RunIsUp, match="is up"), held(folder, "two"):
            pass
        done = subprocess.run(
            [*ASYNCRL, "resume", str(folder.path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1 and "asyncrl stop" in done.stderr, done.stderr
    finally:
        holder.kill()
        holder.wait(10)
        holder.stdout.close()
    with held(folder, "two"):
        assert not left.exists()


def test_the_parts_of_a_killed_run_are_waited_for(make_run):
    folder, _ = make_run()
    with buffer_service(folder.path, prompts_per_step=8):
        began = time.monotonic()
        with pytest.raises(RunIsUp, match=f"still holds {folder.rollouts}"), held(folder, "two", 0.3):
            pass
        assert time.monotonic() - began >= 0.3
    with held(folder, "two"):
        assert os.path.samefile(folder.lock.parent, folder.path)


def test_a_name_that_is_no_run_is_told(tmp_path):
    done = subprocess.run(
        [*ASYNCRL, "resume", "nothing"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 2 and "no run nothing" in done.stderr
