"""What the buffer reports, on its way to the view and the metrics."""

import math
import time
from pathlib import Path

import msgspec

from asyncrl.buffer.records import Selection
from asyncrl.learner.metrics import StepMetrics
from asyncrl.recipes import load_recipe
from asyncrl.runtime.facts import ENGINES_WAIT, LEARNER_WAITS
from asyncrl.runtime.learner_part import Handover, StepOutcome
from asyncrl.runtime.observer import Observer
from asyncrl.runtime.reported import Waits, buffer_facts, part_figures, step_facts
from asyncrl.weight_sync.report import MemberReport, SyncReport
from tests.buffers import buffer_service

RECIPE = load_recipe(Path(__file__).resolve().parents[3] / "recipes" / "quickstart.toml")


def report(tmp_path):
    with buffer_service(tmp_path) as (_, client):
        client.publish(0)
        return client.status()


def test_waits_go_on_growing_when_a_process_counts_from_0_again():
    waits = Waits()
    waits.add({LEARNER_WAITS: 10.0, ENGINES_WAIT: 8.0}, engines=2)
    waits.add({LEARNER_WAITS: 12.0, ENGINES_WAIT: 9.0}, engines=1)
    waits.add({LEARNER_WAITS: 1.0, ENGINES_WAIT: 0.5}, engines=2)
    waits.add({LEARNER_WAITS: 1.5, ENGINES_WAIT: 0.5}, engines=2)
    assert waits.mean_s == {LEARNER_WAITS: 13.5, ENGINES_WAIT: 8.0 / 2 + 1.0 + 0.5 / 2}


def test_the_buffer_s_report_becomes_facts(tmp_path):
    found = msgspec.structs.replace(
        report(tmp_path),
        quarantined=2,
        lengths={10: 9, 100: 1},
        dropped_lengths={100: 1},
        held_bytes=5,
        capacity_groups=3,
        held_groups=1,
    )
    facts = buffer_facts(found, recoveries=4)
    assert (facts.quarantined_prompts, facts.held_bytes) == (2, 5)
    assert facts.drops_by_length_decile == [0] * 9 + [1] and facts.capacity_groups == 4
    assert facts.recoveries == 4 and facts.memory_bytes == found.memory_bytes > 0
    assert buffer_facts(report(tmp_path), 0).drops_by_length_decile == []


class Recorder:
    """View and metrics in one."""

    def __init__(self):
        self.notes, self.written = [], []

    def note(self, text):
        self.notes.append(text)

    def update(self, fact):
        pass

    def write(self, fact):
        self.written.append(fact)


def test_a_full_disk_is_noted_once_when_it_begins_and_once_when_it_ends(tmp_path):
    recorder = Recorder()
    observer = Observer(RECIPE, recorder, recorder, time.monotonic())
    sound = report(tmp_path)
    full = msgspec.structs.replace(sound, disk_full="runs/x/rollouts/0: no space left")
    for now in (sound, full, full, sound, sound):
        observer.buffer_report(now)
    assert recorder.notes == [
        "runs/x/rollouts/0: no space left",
        "the buffer's disk has room again; the run goes on",
    ]
    assert len(recorder.written) == 5


def zeros(kind, **changes):
    """A struct of numbers, all 0 but for `changes`."""
    return kind(**(dict.fromkeys(kind.__struct_fields__, 0) | changes))


def sync_report(version, stall_s, **changes):
    member = MemberReport(outcome="applied", stall_s=stall_s)
    empty = {"out_of_service": {}, "probe_max_diff": {}, "ignored": {}}
    return zeros(SyncReport, version=version, engines={"a": member}, digest="", **empty, **changes)


def test_a_step_tells_what_its_sync_took_and_the_longest_stall_since_the_step_before():
    outcome = StepOutcome(
        selection=zeros(Selection, rollout_ids=()),
        handover=zeros(Handover),
        metrics=zeros(StepMetrics),
        sync=sync_report(4, 0.0, wait_s=0.25),
        welcomes=[sync_report(3, 0.5), sync_report(3, 0.125)],
        train_s=2.0,
        publish_s=0.375,
    )
    facts = step_facts(4, outcome, 1.0, 10.0, groups=1, checkpoint_stall_s=0.0)
    assert (facts.version, facts.publish_s, facts.lag_wait_s, facts.engine_stall_s) == (4, 0.375, 0.25, 0.5)


def test_figures_of_critic_reference_and_costs_are_told_where_there_are_any():
    plain = StepMetrics(**dict.fromkeys(StepMetrics.__struct_fields__, math.nan))
    assert part_figures(plain) == {}
    some = msgspec.structs.replace(plain, value_loss=0.5, explained_variance=-1.0, cost_mean=0.25)
    assert part_figures(some) == {"value_loss": 0.5, "explained_variance": -1.0}
    costly = msgspec.structs.replace(some, cost_multiplier=2.0, kl_reference=0.0)
    assert part_figures(costly) == {
        "value_loss": 0.5,
        "explained_variance": -1.0,
        "kl_reference": 0.0,
        "cost_mean": 0.25,
        "cost_multiplier": 2.0,
    }
