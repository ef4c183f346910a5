"""The small pieces that a run is put together from."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pyarrow as pa
import pytest

from asyncrl.buffer.columns import list_array
from asyncrl.buffer.schema import BATCH, FLAGS, LOGPROBS, TOKENS
from asyncrl.recipes import load_recipe
from asyncrl.runtime.engine_part import first_fault
from asyncrl.runtime.learner_part import examine
from asyncrl.runtime.observer import Observer, RunStalled
from asyncrl.runtime.part_log import tail
from asyncrl.runtime.run_folder import new_run_folder

ROOT = Path(__file__).resolve().parents[3]


def batch(versions, trainable):
    versions = [np.array(v, np.int32) for v in versions]
    ones = [np.ones(len(v), np.int32) for v in versions]
    count = len(versions)
    return pa.record_batch(
        [
            pa.array(range(count), pa.int64()),
            pa.array([0] * count, pa.int64()),
            list_array(ones, TOKENS),
            list_array(ones, TOKENS),
            list_array([o.astype(np.float32) for o in ones], LOGPROBS),
            list_array(versions, TOKENS),
            list_array([np.array(t, bool) for t in trainable], FLAGS),
            pa.array([0.0] * count, pa.float32()),
            pa.array([0.0] * count, pa.float32()),
            pa.array([False] * count, pa.bool_()),
            pa.array(["stop"] * count, pa.string()),
        ],
        schema=BATCH,
    )


def test_the_learner_recounts_what_it_was_handed():
    rows = batch([[5, 5, 6], [7, 7]], [[False, True, True], [True, True]])
    found = examine(rows, version=7, bound=2)
    assert (found.staleness_min, found.staleness_max, found.trained_tokens) == (0, 2, 4)
    assert found.staleness_mean == pytest.approx(1.0)
    assert (found.spanning_rollouts, found.versions_in_rollout_max, found.tokens_past_bound) == (1, 2, 0)


@pytest.mark.parametrize("versions", [[4, 5], [8, 7]])
def test_a_trained_token_past_the_bound_or_from_the_future_is_found(versions):
    assert examine(batch([versions], [[True, True]]), version=7, bound=2).tokens_past_bound == 1


def test_the_environment_s_tokens_have_no_age_and_are_no_version_of_their_own():
    rows = batch([[5, -1, -1, 6], [7, -1], [-1]], [[True, False, False, True], [True, False], [False]])
    found = examine(rows, version=7, bound=2)
    assert (found.staleness_min, found.staleness_mean, found.staleness_max) == (0, 1.0, 2)
    assert (found.trained_tokens, found.tokens_past_bound) == (3, 0)
    assert (found.spanning_rollouts, found.versions_in_rollout_max) == (1, 2)
    alone = examine(batch([[-1]], [[False]]), version=7, bound=2)
    assert (alone.staleness_min, alone.staleness_mean, alone.staleness_max) == (0, 0.0, 0)


def test_a_trained_token_of_the_environment_is_found():
    """Also at version 0, where it would count as one version old."""
    for version in (0, 7):
        rows = batch([[version, -1]], [[True, True]])
        assert examine(rows, version=version, bound=2).tokens_past_bound == 1


def test_the_first_fault_of_nested_groups_is_the_cause():
    cause = ValueError("it")
    inner = BaseExceptionGroup("inner", [asyncio.CancelledError(), cause])
    assert first_fault(BaseExceptionGroup("outer", [asyncio.CancelledError(), inner])) is cause


def test_run_folders_never_overwrite_one_another(tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "quickstart.toml", [f"run.folder={tmp_path}"])
    first, second = new_run_folder(recipe), new_run_folder(recipe)
    assert (first.path.name, second.path.name) == ("quickstart", "quickstart-2")
    assert first.read_recipe() == recipe and first.logs.is_dir()


def test_the_tail_of_a_log_is_its_end(tmp_path):
    path = tmp_path / "part.log"
    assert tail(path) == ""
    path.write_text("x" * 10_000 + "the end")
    assert tail(path).endswith("the end") and len(tail(path)) <= 3000


def test_a_run_in_which_nothing_moves_is_ended_with_its_reasons():
    observer = Observer(load_recipe(ROOT / "recipes" / "quickstart.toml"), None, None, time.monotonic())
    observer.check_progress(5.0)
    with pytest.raises(RunStalled, match="nothing was generated and no step was made"):
        observer.check_progress(-1.0)


def test_a_paused_run_may_stand_still_and_has_its_time_again_afterwards():
    observer = Observer(load_recipe(ROOT / "recipes" / "quickstart.toml"), None, None, time.monotonic())
    observer.state = "paused"
    time.sleep(0.05)
    observer.check_progress(0.04)
    observer.state = "running"
    observer.check_progress(0.04)
    time.sleep(0.05)
    with pytest.raises(RunStalled):
        observer.check_progress(0.04)


GUARDED = """
import os, subprocess, sys, time
from asyncrl.runtime.processes import adopt_orphans, end_processes
adopt_orphans()
orphan = "import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
subprocess.run([sys.executable, "-c", orphan + "; print(p.pid, flush=True)"], check=True)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
p = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
p.stdout.readline()
print(p.pid, flush=True)
print(len(end_processes(0.5)))
"""


def test_orphans_and_stubborn_processes_are_ended():
    done = subprocess.run(
        [sys.executable, "-P", "-c", GUARDED], capture_output=True, text=True, timeout=60, check=True
    )
    orphan, stubborn, killed = map(int, done.stdout.split())
    assert killed == 1  # the orphan went when it was asked
    assert not psutil.pid_exists(orphan) and not psutil.pid_exists(stubborn)


def test_facts_survive_the_way_through_metrics(tmp_path):
    """What the observer writes, the summary reads: one whole step by way of the file."""
    from asyncrl.runtime.facts import EvaluationMissed
    from asyncrl.runtime.metrics import MetricsLog, read_facts

    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write(EvaluationMissed(seconds=1.0, step=4, version=3, reason="late"))
    (fact,) = read_facts(tmp_path / "metrics.jsonl")
    assert msgspec.structs.asdict(fact)["reason"] == "late"
