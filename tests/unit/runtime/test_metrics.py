from __future__ import annotations

import json
import math
import subprocess
import sys

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.generators.estimates import Estimate
from asyncrl.recipes.telemetry_config import TelemetryConfig
from asyncrl.runtime.facts import BufferFacts, EvaluationMissed, StepFacts
from asyncrl.runtime.metrics import (
    MetricsError,
    MetricsLog,
    last_seconds,
    open_metrics,
    read_facts,
    scalars,
)


class Recorder:
    """A mirror that keeps what it is given."""

    def __init__(self):
        self.logged = []
        self.exit_codes = []

    def log(self, scalars):
        self.logged.append(dict(scalars))

    def close(self, exit_code):
        self.exit_codes.append(exit_code)


def test_facts_are_read_as_they_were_written(tmp_path, run_facts):
    facts = run_facts(8)
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for fact in facts:
            log.write(fact)
    assert list(read_facts(tmp_path / "metrics.jsonl")) == facts


def test_every_line_names_its_kind_and_is_there_at_once(
    tmp_path, step_facts, snapshot_facts, evaluation_facts
):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(step_facts(1))
    assert json.loads(path.read_text())["kind"] == "step"
    log.write(snapshot_facts(41.0, step=1))
    log.write(evaluation_facts(1, 3, 4))
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "step",
        "snapshot",
        "evaluation",
    ]
    log.close()


@given(value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path_factory, value, request):
    step_facts = request.getfixturevalue("step_facts")
    path = tmp_path_factory.mktemp("nan") / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(step_facts(1, loss=value, learner={"entropy": value}))
    assert json.loads(path.read_text())["loss"] is None
    (fact,) = read_facts(path)
    assert isinstance(fact, StepFacts)
    assert math.isnan(fact.loss) and math.isnan(fact.learner["entropy"])


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_left_out_and_cut_by_the_next_writer(tmp_path, step_facts, cut):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(step_facts(1))
        log.write(step_facts(2))
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_facts(path)) == [step_facts(1)]
    with MetricsLog(path) as log:
        log.write(step_facts(3))
    assert list(read_facts(path)) == [step_facts(1), step_facts(3)]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path, step_facts):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "step", ' + b" " * 200_000)
    with MetricsLog(path) as log:
        log.write(step_facts(1))
    assert list(read_facts(path)) == [step_facts(1)]


def test_a_bad_line_is_an_error_with_its_number(tmp_path, step_facts):
    path = tmp_path / "metrics.jsonl"
    good = msgspec.json.encode(step_facts(1))
    path.write_bytes(good + b"\n" + b'{"kind": "weather"}\n' + good + b"\n")
    facts = read_facts(path)
    assert next(facts) == step_facts(1)
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:2: .*weather"):
        next(facts)


def test_a_missing_file_has_no_facts(tmp_path):
    assert list(read_facts(tmp_path / "none.jsonl")) == []


def test_a_mirror_gets_the_scalars_and_the_end_once(tmp_path, step_facts):
    mirror = Recorder()
    log = MetricsLog(tmp_path / "metrics.jsonl", mirror)
    log.write(step_facts(4))
    log.close(0)
    log.close(1)
    assert mirror.logged == [scalars(step_facts(4))]
    assert mirror.exit_codes == [0]


def test_a_run_that_raises_is_marked_failed(tmp_path):
    mirror = Recorder()
    with pytest.raises(KeyError), MetricsLog(tmp_path / "metrics.jsonl", mirror):
        raise KeyError("the run")
    assert mirror.exit_codes == [1]


def test_evaluations_come_back_as_they_were_written(tmp_path, evaluation_facts):
    by_k = {1: Estimate(0.5, 0.1), 8: Estimate(0.9, 0.05)}
    facts = [
        evaluation_facts(4, 3, 8, rollouts_per_prompt=8, pass_at=by_k, maj_at=by_k),
        EvaluationMissed(seconds=5.0, step=6, version=6, reason="the one before was still under way"),
    ]
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for fact in facts:
            log.write(fact)
    assert list(read_facts(tmp_path / "metrics.jsonl")) == facts


def test_scalars_are_flat_numbers_under_the_kind_of_fact(step_facts, snapshot_facts, evaluation_facts):
    step = scalars(step_facts(7, reward_mean=0.25))
    assert step["train/reward_mean"] == 0.25 and step["train/learner/entropy"] > 0
    buffer = BufferFacts(queued=3, dropped={"over_stale": 2})
    now = scalars(snapshot_facts(50.0, step=3, buffer=buffer))
    assert now["now/buffer/queued"] == 3 and now["now/buffer/dropped/over_stale"] == 2
    assert now["now/slots_used"] > 0 and "now/phase" not in now
    held_out = scalars(evaluation_facts(0, 3, 4, pass_at={2: Estimate(0.9, 0.1)}))
    assert held_out["held_out/accuracy/value"] == 0.75 and held_out["held_out/pass_at/2/value"] == 0.9
    for flat in (step, now, held_out):
        assert all(isinstance(value, int | float) for value in flat.values())


def test_wandb_offline_writes_a_run_into_the_run_folder(tmp_path, step_facts, snapshot_facts):
    pytest.importorskip("wandb")
    telemetry = TelemetryConfig(wandb="offline", project="asyncrl-tests")
    with open_metrics(
        tmp_path / "metrics.jsonl", telemetry, run="unit", settings={"run": {"steps": 2}}
    ) as log:
        for step in (1, 2):
            log.write(step_facts(step))
            log.write(snapshot_facts(41.0 + step, step=step))
    (recorded,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = recorded.read_bytes()
    assert b"train/reward_mean" in content and b"now/buffer/queued" in content
    assert len(list(read_facts(tmp_path / "metrics.jsonl"))) == 4
    left = [child.name() for child in psutil.Process().children(recursive=True)]
    assert not [name for name in left if "wandb" in name], left


def test_telemetry_is_not_loaded_until_it_is_wanted():
    """Neither wandb nor matplotlib costs a run that does not use it anything."""
    code = (
        "import sys; import asyncrl.runtime.metrics, asyncrl.runtime.report, asyncrl.runtime.view;"
        "sys.exit(' '.join({'wandb', 'matplotlib', 'torch', 'ray'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_missing_wandb_is_an_error_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MetricsError, match=r'telemetry.*wandb = "off"'):
        open_metrics(tmp_path / "metrics.jsonl", TelemetryConfig(wandb="offline"), run="unit", settings={})


def test_telemetry_is_off_unless_asked_for():
    assert TelemetryConfig() == msgspec.convert({}, TelemetryConfig)
    assert TelemetryConfig().wandb == "off"
    with pytest.raises(msgspec.ValidationError, match="wandb_mode"):
        msgspec.convert({"wandb_mode": "online"}, TelemetryConfig)


def test_a_run_that_goes_on_counts_on_from_its_last_fact(tmp_path, step_facts):
    path = tmp_path / "metrics.jsonl"
    assert last_seconds(path) == 0.0
    path.touch()
    assert last_seconds(path) == 0.0
    with MetricsLog(path) as log:
        log.write(step_facts(1, seconds=3.5))
    assert last_seconds(path) == 3.5
    with MetricsLog(path) as log:
        for step in range(2, 400):  # more than is read at once
            log.write(step_facts(step, seconds=float(step)))
    with path.open("ab") as file:
        file.write(b'{"kind":"step","seconds":9999')  # torn
    assert last_seconds(path) == 399.0
