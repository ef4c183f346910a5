"""What the buffer reports, on its way to the view and the metrics."""

import math
import time
from pathlib import Path

import msgspec

from asyncrl.learner.metrics import StepMetrics
from asyncrl.recipes import load_recipe
from asyncrl.runtime.facts import ENGINES_WAIT, LEARNER_WAITS
from asyncrl.runtime.observer import Observer
from asyncrl.runtime.reported import Waits, buffer_facts, part_figures
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
